# SPDX-License-Identifier: Apache-2.0
"""The compiled training step, which gives back what is trained and nothing else.

The host compiles its step with the whole model as an argument and a result, so that a frozen base
lies in memory twice while a step runs. Here frozen parameters are arguments only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from tunix.sft import peft_trainer

from ..model.gemma4 import Gemma4Model
from ..sharding import is_variable
from .health import Health, flags_of, forget_skipped, strict, watch
from .hooks import around
from .optimizer import max_skipped, trained_kind


def gradient_sums(trainer: peft_trainer.PeftTrainer) -> nnx.Module | None:
    """Where newer hosts sum the gradients of micro-batches; 0.1.7 does so in the optimizer."""
    return getattr(trainer, "grad_accumulator", None)


class TrainStep:
    """`function(model, optimizer, inputs)`, compiled; called with `inputs` alone.

    With `sums` it is `function(model, optimizer, sums, inputs, **more)`, called with the last two.

    The function gives the loss first and the gradient's norm last, as the host's does.

    Attributes:
        jitted_fn: from trained parameters, frozen ones, optimizer state (donated) and inputs to the
            new trained parameters, the new optimizer state, the function's result and whether all
            of these are finite (`health.Flags`).
    """

    def __init__(
        self,
        function: Callable,
        model: nnx.Module,
        optimizer: nnx.Optimizer,
        health: Health | None = None,
        sums: nnx.Module | None = None,
    ):
        self._health = health
        trained = trained_kind(model)
        # These hold the model's and the optimizer's own variables, whose values are always the
        # latest; to search both for them at every step takes longer than to start it.
        model_graph, self._parameters, self._frozen = nnx.split(model, trained, ...)
        held = optimizer if sums is None else (optimizer, sums)
        optimizer_graph, self._optimizer_state = nnx.split(held)
        shardings = _shardings((self._parameters, self._optimizer_state))

        @functools.partial(jax.jit, donate_argnums=2)
        def step(parameters, frozen, optimizer_state, inputs, **more):
            model = nnx.merge(model_graph, parameters, frozen)
            held: Any = nnx.merge(optimizer_graph, optimizer_state)
            optimizer, *others = (held,) if sums is None else held
            result = function(model, optimizer, *others, inputs, **more)
            forget_skipped(optimizer)
            flags = flags_of(nnx.state(model, trained), optimizer, result[0], result[-1])
            new = _constrained((nnx.state(model, trained), nnx.state(held)), shardings)
            return *new, result, flags

        self.jitted_fn = step

    @property
    def func(self) -> TrainStep:
        """Itself: where the host looks for `jitted_fn`, to see how often it was compiled."""
        return self

    def arguments(self) -> tuple[nnx.State, nnx.State, nnx.State]:
        """What the compiled step takes before `inputs`."""
        return self._parameters, self._frozen, self._optimizer_state

    def __call__(self, inputs: Any, **more: Any) -> Any:
        *new, result, flags = self.jitted_fn(*self.arguments(), inputs, **more)
        for old, values in zip((self._parameters, self._optimizer_state), new, strict=True):
            jax.tree.map(nnx.Variable.update_from_state, old, values, is_leaf=is_variable)
        if self._health is not None:
            self._health.add(flags, result, inputs)
        return result


def _shardings(tree: Any) -> list[NamedSharding | None]:
    """Of each leaf, its place on a mesh."""
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    return [where if isinstance(where, NamedSharding) else None for where in shardings]


def _constrained(tree: Any, shardings: list[NamedSharding | None]) -> Any:
    """`tree` on the shards it came from.

    Left free, XLA moves some of them (the norms, say): the second step compiles anew, and a later
    rollout may fail to read the weights.
    """
    leaves, structure = jax.tree.flatten(tree)
    pairs = zip(leaves, shardings, strict=True)
    return structure.unflatten(
        leaf if where is None else jax.lax.with_sharding_constraint(leaf, where)
        for leaf, where in pairs
    )


@around
def wrap_jit_train_and_eval_step(
    original, self: peft_trainer.PeftTrainer, skip_jit: bool = False, *args, **kwargs
) -> tuple[Callable, Callable]:
    """A training step holds frozen parameters once.

    Trainers of Gemma 4 get a `TrainStep` in the place of the host's compiled step.
    """
    train_step, eval_step = original(self, skip_jit, *args, **kwargs)
    if skip_jit or not isinstance(self.model, Gemma4Model):
        return train_step, eval_step
    if not isinstance(train_step, TrainStep):
        if max_skipped(self.optimizer) is not None:
            self.loss_fn = strict(self.loss_fn, self._has_aux)
        function = self.create_train_step_fn()
        sums = gradient_sums(self)
        train_step = TrainStep(function, self.model, self.optimizer, watch(self), sums)
        self._jitted_train_step_fn = train_step  # pyright: ignore[reportAttributeAccessIssue]
    return train_step, eval_step
