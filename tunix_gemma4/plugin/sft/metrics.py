# SPDX-License-Identifier: Apache-2.0
"""Numbers of each optimizer step, for Tunix's metrics logger and for lines of text."""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from ...config.domains import require
from ...data.processor import Batch
from ..optimizer import StepRecord

_last = operator.itemgetter(-1)


def supervised_tokens(batch: Batch) -> int:
    """Targets of the loss; the first token of a row is predicted from nothing."""
    return int(np.count_nonzero(np.asarray(batch.loss_mask)[:, 1:]))


class StepMetrics:
    """Counts what goes into a step and times it.

    The host writes the metrics of a step when the next one has been dispatched, so that reading
    them does not hold the device up. A step's time is that between the moments at which its
    results and those of the step before were there, less evaluation.
    """

    def __init__(self, *, log: Callable[[str], None], logging_steps: int):
        require(logging_steps=logging_steps)
        self._log = log
        self._logging_steps = logging_steps
        self._tokens = self._supervised = 0  # of the current step and of this process
        self._since = time.perf_counter()
        self._reported = 0  # steps that were logged when the last line was written

    def count(self, batch: Batch) -> None:
        """Adds a micro-batch to the current step; call it before the batch goes to the device."""
        self._tokens += int(np.count_nonzero(batch.padding_mask))
        self._supervised += supervised_tokens(batch)

    def add_to(self, buffer: Any, record: StepRecord | None, skipped: Any | None) -> None:
        """Completes the host's buffer of the current step with the latest micro-batch."""
        metrics = buffer.additional_metrics
        metrics["tokens"] = ([self._tokens], _last)
        metrics["supervised_tokens"] = ([self._supervised], _last)
        if record is not None:
            metrics["grad_norm"] = ([record.gradient_norm], _last)
            metrics["learning_rate"] = ([record.learning_rate], _last)
        if skipped is not None:
            metrics["skipped_steps"] = ([skipped], _last)

    def finish(self, buffer: Any | None) -> None:
        """Ends the step of `buffer`, whose metrics are about to be written."""
        self._tokens = self._supervised = 0
        if buffer is None:
            return
        jax.block_until_ready(buffer.losses)
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        self._since = now
        metrics = buffer.additional_metrics
        metrics["step_time_s"] = ([seconds], _last)
        metrics["tokens_per_second"] = ([metrics["tokens"][0][-1] / seconds], _last)
        # Of the first device at its fullest, where it tells.
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if peak is not None:
            metrics["peak_memory_bytes"] = ([peak], _last)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as time of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    def report(self, trainer: Any, step: int) -> None:
        """Writes a line every `logging_steps`: values of the step, rates since the last line."""
        trainer.progress.ended(step)
        if step % self._logging_steps and step != trainer.progress.total:
            return
        losses = trainer.history("loss")
        new = slice(self._reported, len(losses))
        self._reported = len(losses)
        seconds = sum(trainer.history("step_time_s")[new])
        rates = trainer.history("learning_rate")
        # A step that was skipped would hide the loss of the others.
        finite = [loss for loss in losses[new] if np.isfinite(loss)]
        parts = [trainer.progress.place(step), f"loss {(finite or losses[new])[-1]:.4f}"]
        parts += [f"lr {rates[-1]:.2e}"] if rates else []
        parts += [
            f"grad norm {trainer.history('grad_norm')[-1]:.3g}",
            f"supervised {int(sum(trainer.history('supervised_tokens')[new]))}",
            f"tokens/s {sum(trainer.history('tokens')[new]) / seconds:.0f}",
            f"s/step {seconds / (new.stop - new.start):.3g}",
            *trainer.progress.rest(step),
        ]
        skipped = trainer.history("skipped_steps")
        parts += [f"skipped {skipped[-1]:.0f}"] if skipped and skipped[-1] else []
        peak = trainer.history("peak_memory_bytes")
        parts += [f"peak {peak[-1] / 2**30:.2f} GiB"] if peak else []
        self._log("  ".join(parts))
