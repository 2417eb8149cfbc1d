# SPDX-License-Identifier: Apache-2.0
"""Makes the micro-batches of an optimizer step add up to that step, in losses and in metrics.

The host averages over micro-batches what is a mean over the tokens of each, and so lets the
tokens of a micro-batch with few of them count for more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.rl import algo_core
from tunix.rl.rl_cluster import Mode

from ...model.gemma4 import Gemma4Model
from ..train_step import gradient_sums
from .context import bound

AGREEMENT = "rollout_agreement"
# Beside the metrics of a micro-batch: how many tokens they are means over.
TOKENS = "completion_tokens"


# ---- Losses.


def needs_whole_step(learner: Any) -> bool:
    """Whether the gradient of a micro-batch depends on the others of its optimizer step."""
    return _is_token_mean(learner.algo_config) or _whitens(learner.algo_config)


def _is_token_mean(algorithm: Any) -> bool:
    mode = getattr(algorithm, "loss_agg_mode", None)
    return algorithm.policy_loss_fn == "ppo" or mode == "token-mean"


def _whitens(algorithm: Any) -> bool:
    return algorithm.advantage_estimator == "gae"


def share_step(learner: Any, examples: Sequence[Any]) -> list[Any]:
    """The micro-batches of one optimizer step, told what their losses need of each other."""
    examples, algorithm = list(examples), learner.algo_config
    if _whitens(algorithm):
        examples = _whitened(examples)
    if _is_token_mean(algorithm) and hasattr(examples[0], "loss_denominator"):
        tokens = sum(int(np.sum(example.completion_mask)) for example in examples)
        share = np.float32(tokens / len(examples))
        examples = [
            example.replace(loss_denominator=np.full(len(example.completion_ids), share))
            for example in examples
        ]
    return examples


def _whitened(examples: list[Any]) -> list[Any]:
    """Advantages of mean 0 and variance 1 over the tokens of all examples together."""
    advantages, mask = (
        jnp.concatenate([getattr(example, name) for example in examples])
        for name in ("advantages", "completion_mask")
    )
    # They were whitened before, with all others of the rollout step: scaled and shifted alike.
    white = algo_core.masked_whiten(advantages, mask)
    ends = np.cumsum([len(example.advantages) for example in examples])[:-1]
    parts = jnp.split(white, ends)
    return [example.replace(advantages=part) for example, part in zip(examples, parts, strict=True)]


def step_mean(loss: jax.Array, example: Any) -> jax.Array:
    """A mean over the tokens of a micro-batch, as its share of the mean over those of the step."""
    if example.loss_denominator is None:
        return loss
    return loss * example.completion_mask.sum() / example.loss_denominator.mean()


# ---- Metrics.


def wrap_post_process_train_step(original: Callable) -> Callable:
    """Means over tokens are those over the step's, and agreement is that of its first update."""

    @functools.wraps(original)
    def post_process_train_step(self, aux: Any) -> None:
        if not isinstance(aux, dict) or TOKENS not in aux:
            return original(self, aux)
        updates = getattr(self, "updates_per_rollout", 1)
        _record(self, self._buffered_train_metrics, aux, fresh=self.train_steps % updates == 0)

    return post_process_train_step


def wrap_post_process_eval_step(original: Callable) -> Callable:
    """Means over tokens are those over all tokens of the evaluation."""

    @functools.wraps(original)
    def post_process_eval_step(self, aux: Any) -> None:
        if not isinstance(aux, dict) or TOKENS not in aux:
            return original(self, aux)
        _record(self, self._buffered_eval_metrics, aux, fresh=True)

    return post_process_eval_step


def wrap_cluster_buffer_metrics(original: Callable) -> Callable:
    """A mean over a piece of a rollout step or an evaluation counts as often as it has rows."""

    @functools.wraps(original)
    def buffer_metrics(self, metrics: dict[str, Any], mode: Mode = Mode.TRAIN) -> None:
        original(self, metrics, mode)
        work = bound()
        if work is None or not work.count:
            return
        is_train = mode == Mode.TRAIN
        buffers = self._buffered_train_metrics if is_train else self._buffered_eval_metrics
        for name, (value, combine) in metrics.items():
            if combine in (np.mean, np.nanmean) and np.ndim(value) == 0:
                buffers[-1].metrics[name][0].extend([value] * (work.count - 1))

    return buffer_metrics


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


class _Watched:
    """An optimizer that notes the norm of the gradient it is given, or gathers."""

    def __init__(self, optimizer: Any):
        self._optimizer, self.norm = optimizer, None

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        mean = updates
        if isinstance(state, optax.MultiStepsState):
            share = 1 / (state.mini_step + 1)
            mean = jax.tree.map(lambda acc, g: acc + (g - acc) * share, state.acc_grads, updates)
        self.norm = optax.tree.norm(mean)
        return self._optimizer.update(updates, state, params, **extra)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def wrap_train_step(original: Callable) -> Callable:
    """The norm of what the optimizer gets, which is the mean over micro-batches, for Gemma 4."""

    @functools.wraps(original)
    def train_step(
        self, model: Any, optimizer: Any, *inputs: Any, **more: Any
    ) -> tuple[Any, Any, Any]:
        # Newer hosts give the optimizer the mean alone.
        if not isinstance(model, Gemma4Model) or gradient_sums(self) is not None:
            return original(self, model, optimizer, *inputs, **more)
        plain = optimizer.tx
        optimizer.tx = watched = _Watched(plain)
        try:
            loss, aux, _ = original(self, model, optimizer, *inputs, **more)
        finally:
            optimizer.tx = plain
        return loss, aux, watched.norm

    return train_step


def wrap_buffer_metrics(original: Callable) -> Callable:
    """Of the norms of a step's micro-batches the last, that of their mean, for Gemma 4."""

    @functools.wraps(original)
    def buffer_metrics(
        self, metrics_buffer: Any, loss: Any, step: int, additional_metrics: Any = None
    ) -> Any:
        norm = (additional_metrics or {}).get("grad_norm")
        if norm is not None and isinstance(self.model, Gemma4Model):
            additional_metrics = additional_metrics | {"grad_norm": (norm[0], _last)}
        return original(self, metrics_buffer, loss, step, additional_metrics)

    return buffer_metrics


def _last(values: Sequence[Any]) -> Any:
    return values[-1]
