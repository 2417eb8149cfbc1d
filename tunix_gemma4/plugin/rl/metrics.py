# SPDX-License-Identifier: Apache-2.0
"""Metrics of a step that add up from its micro-batches, and their names.

The host averages over micro-batches what is a mean over the tokens of each, and so lets the
tokens of a micro-batch with few of them count for more.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from tunix.rl.rl_cluster import Mode

from ...model.gemma4 import Gemma4Model
from ..hooks import around
from ..train_step import gradient_sums
from .context import current

AGREEMENT = "rollout_agreement"
# Beside the metrics of a micro-batch: how many tokens they are means over.
TOKENS = "completion_tokens"
_last = operator.itemgetter(-1)


@around
def wrap_post_process_train_step(original, self, aux: Any) -> None:
    """Metrics that are means over tokens do not depend on micro-batches.

    Agreement is that of a rollout step's first update.
    """
    if not isinstance(aux, dict) or TOKENS not in aux:
        return original(self, aux)
    updates = getattr(self, "updates_per_rollout", 1)
    return _record(self, self._buffered_train_metrics, aux, fresh=self.train_steps % updates == 0)


@around
def wrap_post_process_eval_step(original, self, aux: Any) -> None:
    """The same of evaluation."""
    if not isinstance(aux, dict) or TOKENS not in aux:
        return original(self, aux)
    return _record(self, self._buffered_eval_metrics, aux, fresh=True)


@around
def wrap_cluster_buffer_metrics(original, self, metrics: dict, mode: Mode = Mode.TRAIN) -> None:
    """A mean over a piece of what is sampled counts by its rows."""
    original(self, metrics, mode)
    context = current()
    if context is None or not context.count:
        return
    is_train = mode == Mode.TRAIN
    buffers = self._buffered_train_metrics if is_train else self._buffered_eval_metrics
    for name, (value, combine) in metrics.items():
        if combine in (np.mean, np.nanmean) and np.ndim(value) == 0:
            # The host has it once already.
            buffers[-1].metrics[name][0].extend([value] * (context.count - 1))


def _record(trainer: Any, buffer: Any, aux: dict[str, Any], *, fresh: bool) -> None:
    for name, combine in trainer.rl_metrics_to_log.items():
        if name.startswith(AGREEMENT) and not fresh:
            continue  # The policy has moved since it sampled.
        new = ([], functools.partial(_combined, combine))
        buffer.additional_metrics.setdefault(name, new)[0].append((aux[name], aux[TOKENS]))


def _combined(combine: Callable, pairs: Sequence[tuple[Any, Any]]) -> Any:
    values, tokens = (np.asarray(jax.device_get(part)) for part in zip(*pairs, strict=True))
    if combine is np.mean and tokens.sum() > 0:
        return np.average(values, weights=tokens)
    return combine(values)


# ---- The norm of the gradient.


@around
def wrap_train_step(original, self, model: Any, optimizer: Any, *inputs: Any, **more: Any) -> Any:
    """The norm of the gradient that the optimizer gets, not a mean over micro-batches."""
    # Newer hosts give the optimizer the mean alone.
    if not isinstance(model, Gemma4Model) or gradient_sums(self) is not None:
        return original(self, model, optimizer, *inputs, **more)
    plain, norms = optimizer.tx, []

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        mean = updates
        if isinstance(state, optax.MultiStepsState):
            share = 1 / (state.mini_step + 1)
            mean = jax.tree.map(lambda acc, g: acc + (g - acc) * share, state.acc_grads, updates)
        norms.append(optax.tree.norm(mean))
        return plain.update(updates, state, params, **extra)

    # The host's step calls `optimizer.tx` while it is traced: there the gradient can be seen.
    optimizer.tx = optax.GradientTransformationExtraArgs(plain.init, update)
    try:
        loss, aux, _ = original(self, model, optimizer, *inputs, **more)
    finally:
        optimizer.tx = plain
    return loss, aux, norms[-1]


@around
def wrap_norm(original, self, metrics_buffer, loss, step: int, additional_metrics=None) -> Any:
    """The same norm among the metrics.

    Of the norms of a step's micro-batches it is the last, that of their mean.
    """
    more = dict(additional_metrics or {})
    if "grad_norm" in more and isinstance(self.model, Gemma4Model):
        values, _ = more["grad_norm"]
        more["grad_norm"] = (values, _last)
    return original(self, metrics_buffer, loss, step, more)


# ---- Names.

_STATISTICS = ("mean", "min", "max")
_ADVANTAGES = ("advantages", "advantages/returns", "advantages/old_values")
# What the host and these learners write themselves.
_TAKEN = {
    *("prompts", "completions", "rewards/sum", "rewards/score/std"),
    *("rewards/groups_without_spread", "rewards/reward_kl_penalty", "completions/truncated"),
    *(f"rewards/{name}" for name in _STATISTICS),
    *(f"{of}completions/{name}_length" for of in ("", "generation/") for name in _STATISTICS),
    *(
        f"{of}/{name}"
        for of in ("rewards/score", "rewards/reward", *_ADVANTAGES)
        for name in _STATISTICS
    ),
}
# Before the names of the trainers' own metrics.
_TRAINERS = ("actor/", "critic/", "perf/")


class MetricNames:
    """Hands out names, so that no two metrics of a run share one, whoever gives them.

    One that another has taken gets a number behind it.
    """

    def __init__(self) -> None:
        self._owners: dict[str, object] = {}

    def of(self, wanted: str, owner: object) -> str:
        """A name of the owner's own: `wanted`, or the first free of `wanted_2`, `wanted_3`, ..."""
        numbers = itertools.count(2 if wanted.startswith(_TRAINERS) else 1)
        names = (wanted if number == 1 else f"{wanted}_{number}" for number in numbers)
        free = (name for name in names if name not in _TAKEN)
        name = next(name for name in free if self._owners.get(name, owner) == owner)
        if name != wanted and name not in self._owners:
            logging.warning(
                "There is a metric %r already: another of this name is called %r.", wanted, name
            )
        self._owners[name] = owner
        return name
