# SPDX-License-Identifier: Apache-2.0
"""Losses of the host's learners, told of what their example carries and of the whole step.

They see the images of their rows, are means over an optimizer step however it is cut, and measure
how sampler and policy agree. PPO's rewards arrive whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tunix.rl import algo_core

from ..hooks import around
from .context import Record, RolloutContext, bind
from .metrics import AGREEMENT, TOKENS

# ---- An example and its loss.


class InWork:
    """Marks examples that carry what `extended` adds to the host's."""

    completion_mask: jax.Array
    images: Any
    loss_denominator: Any
    image_repeats: int
    group: int
    columns: tuple[int, int]
    temperature: float
    suppressed: tuple[int, ...]


@functools.cache
def extended(kind: type) -> type:
    """The host's example `kind` with what the loss needs besides.

    One class for each kind: a compiled step takes another class for another structure.
    """

    @struct.dataclass
    class Example(kind, InWork):
        images: Any = None
        rollout_logps: Any = None
        # [B]: tokens of the optimizer step over its micro-batches, where the loss is their mean.
        loss_denominator: Any = None
        image_repeats: int = struct.field(pytree_node=False, default=1)
        group: int = struct.field(pytree_node=False, default=1)
        columns: tuple[int, int] = struct.field(pytree_node=False, default=(0, 0))
        temperature: float = struct.field(pytree_node=False, default=1.0)
        suppressed: tuple[int, ...] = struct.field(pytree_node=False, default=())

    return Example


@around
def wrap_with_loss_fn(original, self, loss_fn: Callable, has_aux: bool = False) -> Any:
    """The loss sees the images of its example and measures rollout agreement."""
    return original(self, with_images(loss_fn) if has_aux else loss_fn, has_aux)


def with_images(loss_fn: Callable) -> Callable:
    """A loss with metrics, computed while the context of its example is bound."""

    @functools.wraps(loss_fn)
    def loss(model: Any, train_example: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        if not isinstance(train_example, InWork):
            return loss_fn(model, train_example, *args, **kwargs)
        images, repeats = train_example.images, train_example.image_repeats
        context = RolloutContext(
            # The example has them for each row, since the host cuts it by rows.
            images=None if images is None else images[::repeats],
            image_repeats=repeats,
            group=train_example.group,
            columns=train_example.columns,
            temperature=train_example.temperature,
            suppressed=train_example.suppressed,
        )
        with bind(context):
            value, aux = _computed(loss_fn(model, train_example, *args, **kwargs))
        aux = aux | _agreement(context.record, train_example)
        return _step_mean(value, train_example), aux | {TOKENS: train_example.completion_mask.sum()}

    return loss


def _computed(out: Any) -> tuple[Any, dict[str, Any]]:
    """A loss and its metrics; newer hosts leave their divisions for later."""
    if isinstance(out, tuple):
        return out
    metrics = {
        name: value.compute() if hasattr(value, "compute") else value
        for name, value in out.aux_metrics.items()
    }
    return out.primary_loss.compute(), metrics


def _agreement(record: Record, example: Any) -> dict[str, Any]:
    """The mean entropy, and how far log-probabilities of sampled tokens are from the sampler's.

    In the first update on a rollout, which alone is reported, both are of one policy.
    """
    if record.logps is None:
        return {}
    mask = example.completion_mask.astype(jnp.float32)
    count = jnp.maximum(mask.sum(), 1)
    difference = jnp.abs(record.logps - example.rollout_logps) * mask
    return {
        "entropy": (record.entropy * mask).sum() / count,
        f"{AGREEMENT}/mean": difference.sum() / count,
        f"{AGREEMENT}/max": difference.max(),
    }


# ---- Micro-batches of one optimizer step.


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


def _step_mean(loss: jax.Array, example: Any) -> jax.Array:
    """A mean over the tokens of a micro-batch, as its share of the mean over those of the step."""
    if example.loss_denominator is None:
        return loss
    return loss * example.completion_mask.sum() / example.loss_denominator.mean()


# ---- PPO.


def wrap_jnp(original: ModuleType) -> ModuleType:
    """Fractional rewards of PPO arrive whole, of every model."""

    def zeros_like(array: Any, *args: Any, **kwargs: Any) -> jax.Array:
        # The host's PPO learner calls it once: it adds a reward to zeros shaped and typed like the
        # completion's ids, which are integers, so that 0.7 becomes 0.
        if not (args or kwargs) and jnp.issubdtype(array.dtype, jnp.integer):
            kwargs = {"dtype": jnp.float32}
        return original.zeros_like(array, *args, **kwargs)

    module = ModuleType(original.__name__)
    vars(module).update(vars(original) | {"zeros_like": zeros_like})
    return module
