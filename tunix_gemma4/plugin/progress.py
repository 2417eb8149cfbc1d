# SPDX-License-Identifier: Apache-2.0
"""How far a run is, in its own lines of text, in place of the host's progress bar."""

from __future__ import annotations

import time
from typing import Any

import jax
from tunix.sft import peft_trainer, progress_bar


class NoBar(progress_bar.ProgressBar):
    """Stands where the host would make its bar, which shows means over all steps as if of one."""

    def __init__(self):
        """Without a bar."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    update_metrics = close = update


def history(
    trainer: peft_trainer.PeftTrainer, prefix: str, name: str, mode: str = "train"
) -> list[float]:
    """Every logged value of a metric, oldest first; empty if there is none."""
    logger = trainer.metrics_logger
    if logger is None or not logger.metric_exists(prefix, name, mode):
        return []
    return logger.get_metric_history(prefix, name, mode).tolist()


class Progress:
    """Step of total, epoch and time left.

    Args:
        total: optimizer steps of the run; None where only its end will tell.
        per_epoch: optimizer steps of an epoch; None if that is not known.
        estimated: these were reckoned, not counted: the total is shown as "~100".
    """

    def __init__(
        self, total: int | None = None, per_epoch: float | None = None, *, estimated: bool = False
    ):
        self.total, self.per_epoch, self.estimated = total, per_epoch, estimated
        self._first: tuple[int, float] | None = None
        self._latest = (0, 0.0)

    def ended(self, step: int) -> None:
        """Notes that a step has ended. The first is not timed: it compiles."""
        self._latest = step, time.perf_counter()
        self._first = self._first or self._latest

    def place(self, step: int) -> str:
        """Such as "step 5/10"."""
        if self.total is None:
            return f"step {step}"
        return f"step {step}/{'~' if self.estimated else ''}{self.total}"

    def rest(self, step: int) -> list[str]:
        """Such as "epoch 0.50" and "left 1:23:45", as far as they are known.

        What is left is at the pace since the first step, evaluation and checkpoints included.
        """
        parts = [f"epoch {step / self.per_epoch:.2f}"] if self.per_epoch else []
        first, latest = self._first or self._latest, self._latest
        if self.total is not None and step < self.total and first[0] < latest[0]:
            seconds = (self.total - step) * (latest[1] - first[1]) / (latest[0] - first[0])
            parts.append(f"left {_clock(seconds)}")
        return parts


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def compiling(programs: str) -> str:
    """What to expect before the first step of `programs`, such as "the training step"."""
    settings = jax.config.values
    where = settings["jax_compilation_cache_dir"]
    kept = where is not None and settings["jax_enable_compilation_cache"]
    return (
        f"Compiling {programs}: nothing more is said until the first step has run, which takes "
        "seconds for a small model and minutes for a large one. "
        + (f"A later start reads what {where} holds." if kept else "Nothing is kept for later.")
    )
