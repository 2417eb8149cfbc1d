# SPDX-License-Identifier: Apache-2.0
"""Lines of text about a run of reinforcement learning, from the host's metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from tunix.rl.rl_cluster import RLCluster
from tunix.rl.trainer import Trainer
from tunix.sft import hooks

from ..hooks import extends, overrides
from ..progress import NoBar, Progress, history
from .cluster import ACTOR
from .learner import EXTRA

# Short name, and the metric's prefix and name. The latest values are shown.
_SHOWN = (
    ("reward", "rewards", "score/mean"),
    ("std", "rewards", "score/std"),
    ("loss", ACTOR, "loss"),
    ("kl", ACTOR, "kl"),
    ("entropy", ACTOR, "entropy"),
    ("clipped", ACTOR, "pg_clipfrac"),
    ("length", "completions", "mean_length"),
    ("agreement", ACTOR, "rollout_agreement/max"),
    ("grad norm", ACTOR, "grad_norm"),
    ("s/step", "perf", "step_time_sec"),
)
_SAMPLES, _SHOWN_LETTERS = 3, 300


@extends()
class Report(hooks.TrainingHooks):
    """Writes a line every `logging_steps`, one for each evaluation, and samples if wanted.

    Args:
        cluster, progress: the run's; the total is that of optimizer steps.
        logging_steps, updates_per_batch, log_completions: see `GrpoRunConfig`.
        log: takes the lines.
        after_step: called with the trainer once for each optimizer step, when its metrics are
            there; by then the trainer may have taken the next, as its `train_steps` tells.
    """

    def __init__(
        self,
        cluster: RLCluster,
        *,
        progress: Progress,
        logging_steps: int,
        updates_per_batch: int,
        log: Callable[[str], None],
        log_completions: bool,
        after_step: Callable[[Trainer], None] | None = None,
    ):
        self._trainer = cluster.actor_trainer
        self._progress, self._logging_steps = progress, logging_steps
        self._updates, self._log = updates_per_batch, log
        self._log_completions, self._after_step = log_completions, after_step
        self._samples: list[str] = []
        self._rollouts_before = self._trainer.train_steps // updates_per_batch
        cluster.with_external_metrics_logger(self.take)
        self._trainer.with_training_hooks(self)
        self._trainer._pbar = NoBar()

    def take(self, buffer: Any) -> None:
        """Receives the metrics of a rollout step when the host has logged them."""
        if buffer.mode == "eval":
            means = {
                name: np.nanmean(np.concatenate([np.ravel(v) for v in buffer.metrics[key][0]]))
                for name, key in (("reward", "rewards/sum"), ("length", "completions/mean_length"))
                if key in buffer.metrics
            }
            step = buffer.global_steps * self._updates
            parts = [f"{name} {value:.4g}" for name, value in means.items()]
            self._log("  ".join([f"eval  step {step}", *parts]))
        elif self._log_completions and "completions" in buffer.metrics:
            self._samples = _samples(buffer.metrics)

    @overrides("train_ctx", "train_step", "train_loss")
    def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: float) -> None:
        """Called by the host when the metrics of an optimizer step are there."""
        self._progress.ended(train_step)
        if train_step % self._logging_steps == 0 or train_step == self._progress.total:
            self._line(train_step)
        if self._after_step is not None:
            self._after_step(train_ctx)

    def _line(self, train_step: int) -> None:
        parts = [self._progress.place(train_step)]
        rollouts = -(-train_step // self._updates) - self._rollouts_before
        for short, prefix, name in _SHOWN:
            values = history(self._trainer, prefix, name)
            # The host logs a rollout step's when it ends; until then the latest are another's.
            is_new = prefix == ACTOR or self._updates == 1 or len(values) >= rollouts
            if values and is_new:
                parts.append(f"{short} {values[-1]:.4g}")
        # The time of a step stays last.
        parts[-1:-1] = self._progress.rest(train_step)
        self._log("  ".join(parts))
        for sample in self._samples:
            self._log(sample)
        self._samples = []

    @overrides("train_ctx")
    def on_train_start(self, train_ctx: Any) -> None:
        """Nothing: the host calls this and the next once per micro-batch."""

    on_train_end = on_train_step_start = on_eval_step_start = on_train_start

    @overrides("train_ctx", "eval_loss")
    def on_eval_step_end(self, train_ctx: Any, eval_loss: float) -> None:
        """Nothing: the loss of completions to held-out prompts says little."""


def _samples(metrics: dict[str, Any]) -> list[str]:
    """Completions of the first prompts, with their rewards."""
    prompts, completions = (
        [text for part in metrics[name][0] for text in part] for name in ("prompts", "completions")
    )
    rewards = np.concatenate([np.ravel(part) for part in metrics["rewards/sum"][0]])
    extras = {
        name.removeprefix(EXTRA): [text for part in parts for text in part]
        for name, (parts, _) in metrics.items()
        if name.startswith(EXTRA)
    }
    # Spread over the step, so that they are not all of one prompt.
    chosen = np.linspace(0, len(completions) - 1, min(_SAMPLES, len(completions))).astype(int)
    return [
        f"  reward {rewards[index]:.3g}\n    prompt     {_short(prompts[index])}\n"
        f"    completion {_short(completions[index])}"
        + "".join(f"\n    {name:<10} {_short(said[index])}" for name, said in extras.items())
        for index in dict.fromkeys(chosen.tolist())
    ]


def _short(text: str) -> str:
    """`text` on one line; a run of image placeholders as one, and the middle of what is long."""
    text = repr(re.sub(r"(<\|image\|>)+", "<|image|>", text))
    half = _SHOWN_LETTERS // 2
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:half]} ... {text[-half:]}"
