# SPDX-License-Identifier: Apache-2.0
"""AdamW with a schedule, and a record of each step's gradient norm and learning rate."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.sft import utils

from ..config.domains import require
from ..model.scan import stacked_axes
from ..settings.common import ON_NONFINITE, SCHEDULES


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("count", "gradient_norm", "learning_rate"),
    meta_fields=("max_skipped",),
)
@dataclasses.dataclass
class StepRecord:
    """What `record_step` keeps in the optimizer's state.

    Attributes:
        count: optimizer steps taken, without those that were skipped.
        gradient_norm: of the last step's whole gradient, before clipping.
        learning_rate: of the last step.
        max_skipped: steps that may be skipped; None: none is. It is no part of a checkpoint, so
            that a run may go on with another.
    """

    count: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array
    max_skipped: int | None = None


def record_step(
    schedule: optax.Schedule, max_skipped: int | None = None
) -> optax.GradientTransformation:
    """Changes nothing and remembers the norm of what passes and the schedule's value.

    As the first of a chain it sees the mean over all micro-batches of a step, whose norm is not
    the mean of their norms, which Tunix logs.
    """

    def init(params: Any) -> Any:
        del params
        return StepRecord(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()), max_skipped)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates).astype(jnp.float32)
        rate = jnp.asarray(schedule(state.count), jnp.float32)
        return updates, StepRecord(state.count + 1, norm, rate, max_skipped)

    return optax.GradientTransformation(init, update)


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, with its state, but a gradient whose norm is not finite changes nothing."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        finite = jnp.isfinite(optax.tree.norm(updates))
        changed, new = inner.update(updates, state, params)
        changed = jax.tree.map(lambda leaf: jnp.where(finite, leaf, 0), changed)
        return changed, jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)

    return optax.GradientTransformation(inner.init, update)


def trained_kind(model: nnx.Module) -> type[nnx.Param]:
    """The variables that the host trains: adapters, or all parameters of a model without any."""
    return nnx.LoRAParam if utils.is_lora_enabled(model) else nnx.Param


def find(opt_state: Any, kind: type) -> Any:
    """The first node of a kind within an optimizer's state, such as its `StepRecord`, or None."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return next((node for node in nodes if isinstance(node, kind)), None)


def max_skipped(optimizer: nnx.Optimizer) -> int | None:
    """How many steps may be skipped because they are not finite; None: none is."""
    record = find(optimizer.opt_state, StepRecord)
    return None if record is None else record.max_skipped


def skipped_steps(optimizer: nnx.Optimizer) -> jax.Array:
    """Optimizer steps of the whole run that changed nothing, int32, in traced code too."""
    # All steps are counted outside of what a skipped one leaves as it was.
    sums = find(optimizer.opt_state, optax.MultiStepsState)
    steps = optimizer.step if sums is None else sums.gradient_step
    taken = find(optimizer.opt_state, StepRecord).count
    return steps[...].astype(jnp.int32) - taken[...]


def make_schedule(
    kind: str, *, learning_rate: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear warm-up, whose first step is not zero, then constant or down to zero.

    Arguments are the settings of that name (`recipes.TrainSettings`); `kind` is the
    `lr_scheduler_type`, and after `total_steps` "linear" and "cosine" have reached zero.
    """
    require(learning_rate=learning_rate, warmup_steps=warmup_steps, total_steps=total_steps)
    decay_steps = max(total_steps - warmup_steps, 1)
    if kind == "constant":
        after = optax.constant_schedule(learning_rate)
    elif kind == "linear":
        after = optax.linear_schedule(learning_rate, 0.0, decay_steps)
    elif kind == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, decay_steps)
    else:
        raise ValueError(f"lr_scheduler_type: expected one of {SCHEDULES}, found {kind!r}")
    if not warmup_steps:
        return after
    first = learning_rate / (warmup_steps + 1)
    warmup = optax.linear_schedule(first, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 1.0,
    on_nonfinite: str = "stop",
    max_skipped_steps: int = 10,
) -> optax.GradientTransformation:
    """AdamW behind gradient clipping and `record_step`; only matrices are decayed.

    The schedule gives the learning rate by optimizer step. `max_grad_norm` and what follows it are
    the settings of that name (`recipes.TrainSettings`); the others are AdamW's.
    """
    require(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    require(max_grad_norm=max_grad_norm, max_skipped_steps=max_skipped_steps)
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite: expected one of {ON_NONFINITE}, found {on_nonfinite!r}")
    # The state is one tree whatever is chosen, so that a run may go on with another choice.
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim - stacked_axes(path) > 1, params
        )

    skips = on_nonfinite == "skip"
    record = record_step(schedule, max_skipped_steps if skips else None)
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices)
    chain = optax.chain(record, clip, adamw)
    return skip_nonfinite(chain) if skips else chain
