# SPDX-License-Identifier: Apache-2.0
"""Stops a run whose numbers are no longer finite, without a step that waits for it.

The program of a step says whether loss, gradient and new state are finite. The host looks at that
when the step has long been done, and before anything is written.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from tunix.sft import peft_trainer

from ..checkpoint.check import NonFiniteError, finite_sum, nonfinite, nonfinite_variables, shown
from ..model.gemma4 import Gemma4Model
from .hooks import around
from .optimizer import StepRecord, find, max_skipped, skipped_steps, trained_kind

_ACCUMULATED, _STRICT = "acc_grads", "_strict"


class Flags(NamedTuple):
    """What a step's program says of it; numbers, so that they travel as one array."""

    loss: int  # whether it is not finite, and so for the next two
    gradient: int
    state: int
    skipped: int  # optimizer steps that were skipped, of the whole run
    exceeded: int  # whether these are too many


def flags_of(parameters: Any, optimizer: Any, loss: jax.Array, gradient_norm: Any) -> jax.Array:
    """The `Flags` of a step, int32, in traced code.

    Parameters are the trained ones; they and the optimizer's state are those after the step.
    """
    kept = [
        leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.state(optimizer))[0]
        # A sum that a skipped step leaves behind; it is empty where a checkpoint is written.
        if _ACCUMULATED not in jax.tree_util.keystr(path)
    ]
    state = finite_sum([*jax.tree.leaves(parameters), *kept])
    bad = [~jnp.isfinite(value).all() for value in (loss, gradient_norm, state)]
    most, others = max_skipped(optimizer), (0, 0)
    if most is not None:
        skipped = skipped_steps(optimizer)
        others = (skipped, skipped > most)
    return jnp.stack([jnp.asarray(value, jnp.int32) for value in (*bad, *others)])


def forget_skipped(optimizer: nnx.Optimizer) -> None:
    """Empties the sum of gradients behind a step that was skipped: 0 times NaN is NaN."""
    sums = find(optimizer.opt_state, optax.MultiStepsState)
    if sums is None or max_skipped(optimizer) is None:
        return
    empty = sums.mini_step[...] == 0
    for variable in jax.tree.leaves(sums.acc_grads, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        variable[...] = jnp.where(empty, 0, variable[...])


def strict(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """A loss with a gradient of NaN where it is not finite, so that it is skipped."""
    if getattr(loss_fn, _STRICT, False):
        return loss_fn

    @functools.wraps(loss_fn)
    def loss(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        out = loss_fn(model, *args, **kwargs)
        # What the loss is made of may hide it from the gradient, as `where` does.
        trained = jax.tree.leaves(nnx.state(model, trained_kind(model)))[0].ravel()[0]
        if hasattr(out, "primary_loss"):  # Newer hosts divide by the number of tokens later.
            total = out.primary_loss.unreduced_sum
            total += jnp.where(jnp.isfinite(out.primary_loss.compute()), 0, jnp.nan) * trained
            return out.replace(primary_loss=out.primary_loss.replace(unreduced_sum=total))
        value = out[0] if has_aux else out
        value += jnp.where(jnp.isfinite(value), 0, jnp.nan) * trained
        return (value, *out[1:]) if has_aux else value

    setattr(loss, _STRICT, True)
    return loss


@dataclasses.dataclass
class _Step:
    """A step that has been started."""

    number: int  # of the optimizer step, from 1
    part: str  # which micro-batch of it
    flags: jax.Array
    loss: jax.Array
    gradient_norm: jax.Array
    inputs: Any


class Health:
    """What is known of the steps of a trainer."""

    def __init__(self, trainer: peft_trainer.PeftTrainer):
        self._trainer: peft_trainer.PeftTrainer = weakref.proxy(trainer)
        # The host has waited for the step before these when it starts another.
        self._ahead = max(trainer.config.max_inflight_computations, 0) or 2
        self._pending: collections.deque[_Step] = collections.deque()
        self._finite: _Step | None = None  # the latest
        self._failure: str | None = None
        self._state = True

    def add(self, flags: jax.Array, result: tuple[Any, ...], inputs: Any) -> None:
        """Takes a step that was just started, and looks at those that are done.

        Raises:
            NonFiniteError: for the first step that was not finite.
        """
        trainer = self._trainer
        parts = trainer.config.get_with_default("gradient_accumulation_steps", 1)
        part = f", micro-batch {trainer.iter_steps % parts + 1} of {parts}" if parts > 1 else ""
        # Images would take memory, and are never the cause: they come from bytes.
        if hasattr(inputs, "images") and hasattr(inputs, "replace"):
            inputs = inputs.replace(images=None)
        step = _Step(trainer.train_steps + 1, part, flags, result[0], result[-1], inputs)
        self._pending.append(step)
        self._look(self._ahead)

    def settle(self) -> None:
        """Waits for all steps; raises NonFiniteError as `add` does."""
        if self._failure is not None:
            raise NonFiniteError(self._failure)
        self._look(0)

    def state_is_finite(self) -> bool:
        """Whether trained parameters and optimizer state are, after the latest step. It waits."""
        if self._pending:
            return not Flags(*np.asarray(self._pending[-1].flags)).state
        return self._state

    def _look(self, leave: int) -> None:
        while len(self._pending) > leave:
            step = self._pending.popleft()
            flags = Flags(*np.asarray(step.flags).tolist())
            self._state = not flags.state
            if flags.loss or flags.gradient or flags.state or flags.exceeded:
                self._judge(step, flags)
            else:
                self._finite = step
                step.inputs = None

    def _judge(self, step: _Step, flags: Flags) -> None:
        names = {
            "loss": f"the loss ({float(step.loss)})",
            "gradient": f"the gradient's norm ({float(step.gradient_norm)})",
            "state": "what it has trained or the optimizer's state",
        }
        # Where the loss is not, its gradient is not either, and so on.
        what = next((names[name] for name in names if getattr(flags, name)), "the gradient")
        said = f"step {step.number}{step.part}: {what} is not finite"
        skips = max_skipped(self._trainer.optimizer) is not None
        if skips and not flags.state and not flags.exceeded:
            logging.warning("%s; this step changes nothing (on_nonfinite: skip).", said)
            return
        if flags.exceeded:
            said += f", and {flags.skipped} steps were skipped, more than max_skipped_steps"
        # Steps that were started since may have carried it into the state.
        latest = self._pending[-1] if self._pending else step
        self._state = not Flags(*np.asarray(latest.flags).tolist()).state
        self._pending.clear()
        source = getattr(self._trainer.data_hooks, "name", "the data")
        rows = _rows_text(getattr(step.inputs, "rows", None), source)
        said += f".{rows} {self._cause(step)}"
        self._failure = f"{said}. Nothing of this step is saved"
        raise NonFiniteError(self._failure)

    def _cause(self, step: _Step) -> str:
        """The likely one; the run is over, so this may take its time."""
        model = self._trainer.model
        frozen = nonfinite_variables(model, nnx.Not(trained_kind(model)))
        if frozen:
            return f"The model's own weights hold NaN or infinity: {shown(frozen)}"
        fields = vars(step.inputs) if dataclasses.is_dataclass(step.inputs) else step.inputs
        fields = fields if isinstance(fields, dict) else {}
        kinds = jax.Array | np.ndarray
        inputs = nonfinite({n: x for n, x in fields.items() if isinstance(x, kinds) and x.size})
        said = f"The batch holds NaN or infinity ({shown(inputs)}). " if inputs else ""
        if inputs and not any(name.endswith("logps") for name in inputs):
            return said.removesuffix(". ")
        if self._finite is None and step.number > 1:
            return (
                f"{said}It is the first step since the run was resumed, from a checkpoint whose "
                "numbers are finite but too large, or a batch that makes it so: go on from an "
                "earlier checkpoint with a lower learning_rate"
            )
        if self._finite is None:
            return (
                f"{said}It is the first step that this process took: a weight of the model, or its "
                "input, makes it so whatever is learnt"
            )
        loss, norm = float(self._finite.loss), float(self._finite.gradient_norm)
        record = find(self._trainer.optimizer.opt_state, StepRecord)
        rate = "" if record is None else f" at learning rate {float(record.learning_rate[...]):.3g}"
        return (
            f"{said}The step before was finite, with loss {loss:.4g} and gradient norm {norm:.4g}"
            f"{rate}: a lower learning_rate, a longer warm-up or a smaller max_grad_norm is the "
            "usual remedy"
        )


def _rows_text(rows: Any | None, source: str) -> str:
    """Which rows of the data a batch is made of, where the pipeline tells."""
    if rows is None or not getattr(rows, "is_fully_addressable", True):
        return ""
    listed = shown([str(row) for row in np.asarray(rows).tolist() if row >= 0], most=16)
    return f" Its batch is of rows {listed} of {source}."


def evaluation_text(
    trainer: peft_trainer.PeftTrainer, losses: np.ndarray, rows: list[Any | None]
) -> str:
    """What to say of an evaluation that is not finite, although what was trained is.

    Losses are those of each batch, and so are rows, where the pipeline tells.
    """
    number = int(np.argmin(np.isfinite(losses)))
    said = f"evaluation after step {trainer.train_steps}: the loss ({losses[number]}) is not finite"
    said += f".{_rows_text(rows[number], 'the evaluation data')}"
    frozen = nonfinite_variables(trainer.model)
    if frozen:
        return f"{said} The model's own weights hold NaN or infinity: {shown(frozen)}"
    return f"{said} The model's parameters are finite: its activations are not, with these rows"


# By optimizer, which a trainer has for itself and hands to its checkpoint manager.
_HEALTH: weakref.WeakKeyDictionary[nnx.Optimizer, Health] = weakref.WeakKeyDictionary()


def watch(trainer: peft_trainer.PeftTrainer) -> Health:
    """The `Health` of a trainer, the same whenever its step is compiled anew."""
    return _HEALTH.setdefault(trainer.optimizer, Health(trainer))


def state_is_finite(trainer: peft_trainer.PeftTrainer) -> bool:
    """Whether what the trainer would save is finite. Waits for the steps that were started."""
    health = _HEALTH.get(trainer.optimizer)
    if health is not None:
        return health.state_is_finite()
    return not _unfinished(trainer.model, trainer.optimizer)


def _unfinished(model: nnx.Module, optimizer: nnx.Optimizer | None) -> list[str]:
    found = nonfinite_variables(model)
    return found + ([] if optimizer is None else nonfinite_variables(optimizer))


def require_finite_state(model: nnx.Module, optimizer: nnx.Optimizer | None) -> None:
    """Raises NonFiniteError if a checkpoint of these would not be finite."""
    health = None if optimizer is None else _HEALTH.get(optimizer)
    if health is not None:
        health.settle()
        return
    names = _unfinished(model, optimizer)
    if names:
        raise NonFiniteError(
            f"checkpoint: {len(names)} arrays hold NaN or infinity ({shown(names)}); it is not "
            "written"
        )


@around
def wrap_save(original, self, step: int, model, optimizer=None, *args, **kwargs) -> bool:
    """No checkpoint holds NaN or infinity."""
    # Newer hosts have another name for it.
    manager = vars(self).get("_checkpoint_manager", vars(self).get("_checkpointer"))
    if manager is not None and isinstance(model, Gemma4Model):
        force = kwargs.get("force", args[1] if len(args) > 1 else False)
        if force or manager.should_save(step):
            require_finite_state(model, optimizer)
    return original(self, step, model, optimizer, *args, **kwargs)


def settle(trainer: peft_trainer.PeftTrainer) -> None:
    """Waits for the trainer's steps; raises NonFiniteError for the first that was not finite."""
    health = _HEALTH.get(trainer.optimizer)
    if health is not None:
        health.settle()


@around
def wrap_close(original, self: peft_trainer.PeftTrainer) -> None:
    """A run whose last steps were not finite does not end well."""
    settle(self)
    original(self)
