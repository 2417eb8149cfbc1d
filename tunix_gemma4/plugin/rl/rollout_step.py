# SPDX-License-Identifier: Apache-2.0
"""A rollout step: `batch_size` prompts sampled from one policy, then its optimizer steps.

On one mesh the host samples for each optimizer step anew, from a policy that the last one has
moved; with a mesh of its own for sampling it does not, and takes every ratio for 1. Here both are
the same algorithm.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tunix.rl.queue.data_queue import SimpleDataQueue
from tunix.rl.rl_cluster import Mode

from ..hooks import around, call_of
from .context import Record, RolloutContext, current
from .losses import needs_whole_step, share_step
from .rollout import gemma4_rollout

# Rollouts of evaluation draw from streams that no training step has.
_EVAL_STREAM = 1 << 32


@dataclasses.dataclass
class RolloutStep:
    """What a learner keeps of the rollout step it is in."""

    prompts: int = 1  # of an optimizer step
    mini_batches: int = 1  # optimizer steps between one rollout and the next, each counted once
    updates: int = 1  # the same, each counted `num_iterations` times
    # Micro-batches that are sampled and not yet trained on.
    waiting: collections.deque = dataclasses.field(default_factory=collections.deque)
    evaluated_at: int | None = None  # optimizer steps that had been taken at the last evaluation
    # Of each mode the step that it last sampled in, and completions sampled in that.
    drawn: dict[Mode, tuple[int, int]] = dataclasses.field(default_factory=dict)


def rollout_step(learner: Any) -> RolloutStep:
    """The learner's; that of one update on each rollout until `begin`."""
    return vars(learner).setdefault("_rollout_step", RolloutStep())


def begin(learner: Any, prompts: int, mini_batch: int) -> RolloutStep:
    """Tells a learner how a rollout step of so many prompts is cut.

    The trainers learn it too, because rollout agreement is that of the first update alone.
    """
    step = rollout_step(learner)
    step.prompts, step.mini_batches = mini_batch, max(1, prompts // mini_batch)
    step.updates = step.mini_batches * learner._num_iterations()
    learner.rl_cluster.actor_trainer.updates_per_rollout = step.updates
    return step


def draws(learner: Any, mode: Mode, count: int) -> tuple[int, int]:
    """`RolloutContext.draws` of the next `count` completions; each evaluation has the same."""
    step = learner.rl_cluster.global_steps if mode == Mode.TRAIN else _EVAL_STREAM
    drawn = rollout_step(learner).drawn
    latest, place = drawn.get(mode, (step, 0))
    place = place if latest == step else 0
    drawn[mode] = (step, place + count)
    return step, place


def packs(learner: Any) -> bool:
    """Whether the host packs examples, which then lose what they have of ours."""
    return learner._training_config.max_seq_token_per_tpu is not None


# ---- The old policy.


@around
def wrap_old_logps(original, self, prompt_tokens, completion_tokens, *args, **kwargs) -> jax.Array:
    """Off-policy updates hold the policy against that which sampled, by the sampler's numbers.

    This is the one place that says what the old policy's log-probabilities are: those with which
    the sampler drew the tokens, where the batch in work is trained on off-policy; otherwise the
    host's, from a forward pass of the policy that samples. A packed loss gives suppressed ids a
    share, which the sampler did not: there the host's, too.
    """
    context = current()
    if context is None or not context.off_policy or not context.suppressed:
        return original(self, prompt_tokens, completion_tokens, *args, **kwargs)
    return jnp.asarray(padded_logps(context.record, completion_tokens.shape))


def padded_logps(record: Record, shape: tuple[int, ...]) -> np.ndarray:
    """The sampler's log-probabilities, float32, padded with 0 like completions."""
    logps = np.zeros(shape, np.float32)
    for row, sampled in enumerate(record.rollout_logps):
        logps[row, : len(sampled)] = sampled
    return logps


def with_old_logps(learner: Any, example: Any, context: RolloutContext) -> Any:
    """`example`, which has the old policy's log-probabilities wherever they are needed."""
    if not context.off_policy and hasattr(learner.algo_config, "use_rollout_logps"):
        # Newer hosts take the sampler's even so, and its rounding with them.
        return dataclasses.replace(example, old_per_token_logps=None)
    if not context.off_policy or example.old_per_token_logps is not None:
        return example
    old = learner.rl_cluster.get_old_per_token_logps(
        prompt_tokens=example.prompt_ids,
        completion_tokens=example.completion_ids,
        micro_batch_size=learner._compute_logps_micro_batch_size * learner._num_generations(),
    )
    return dataclasses.replace(example, old_per_token_logps=old)


# ---- Sampling for a whole step.


@around
def wrap_prepare_data(original, self, *args: Any, **kwargs: Any) -> None:
    """A rollout step is sampled from one policy, and its micro-batches add up to it.

    That is for all of its optimizer steps at once.
    """
    given = call_of(original, self, *args, **kwargs)
    given.apply_defaults()
    call = {name: value for name, value in given.arguments.items() if name != "self"}
    run = functools.partial(original, self)
    if gemma4_rollout(self.rl_cluster) is None:
        return run(**call)
    if call["mode"] == Mode.EVAL:
        return _evaluate(self, run, call)
    if call["proceed_num_steps"] < 1:
        return run(**call)  # Without steps, until the data end.
    if call["async_loading"] and not needs_whole_step(self):
        # Trains on the first micro-batches while the others are sampled. All pieces of a step
        # are of one size, so that means over pieces are means over the step.
        micro = max(1, rollout_step(self).prompts // call["proceed_num_steps"])
        target = math.lcm(call["service_target_batch_size"], micro)
        return run(**call | {"service_target_batch_size": target})
    return _train(self, run, call)


def _train(learner: Any, run: Callable, call: dict[str, Any]) -> None:
    """Hands out the micro-batches of the next optimizer step, as often as there are iterations."""
    step, queue, count = rollout_step(learner), call["data_queue"], call["proceed_num_steps"]
    # The host asks once for each optimizer step, and takes examples from the queue until None. The
    # first time there is nothing waiting, and all of the rollout step is sampled at once.
    try:
        if not step.waiting:
            step.waiting.extend(_sampled(learner, run, call, step.mini_batches))
        examples = share_step(learner, [step.waiting.popleft() for _ in range(count)])
        for example in examples * call["batch_repeat"]:
            queue.put([example])
    finally:
        queue.put(None)


def _sampled(learner: Any, run: Callable, call: dict[str, Any], mini_batches: int) -> list[Any]:
    """The micro-batches of so many optimizer steps, fewer where the data end.

    Raises:
        StopIteration: where they end before the first.
    """
    iterator, count = call["iterator"], call["proceed_num_steps"]
    while learner._iter_steps < learner._last_iter_step:  # A run that goes on skips what it had.
        next(iterator)
        learner._iter_steps += 1
    taken = list(itertools.islice(iterator, mini_batches * count))
    # An optimizer step takes `count` of them: what makes no whole one is left out.
    taken = taken[: len(taken) // count * count]
    if not taken:
        raise StopIteration
    return _examples(
        run,
        call
        | {
            "iterator": iter(taken),
            "proceed_num_steps": len(taken),
            "batch_repeat": 1,
            # In one piece, so that no metric depends on how it is cut.
            "service_target_batch_size": sum(len(batch["prompts"]) for batch in taken),
            "async_loading": False,
        },
    )


class Evaluation(list):
    """Examples of held-out prompts.

    Attributes:
        seen_by: names of the cluster's methods that have passed them on.
    """

    def __init__(self, examples: Iterable[Any]):
        super().__init__(examples)
        self.seen_by: set[str] = set()


@around
def wrap_update(original, self, train_ds: Any, eval_ds: Any, skip_jit: bool = False) -> None:
    """The loss of held-out prompts is computed once, over all of them.

    A trainer evaluates before the step; the host's does in each micro-batch, and behind the step
    once more.
    """
    if isinstance(eval_ds, Evaluation):
        if original.__name__ not in eval_ds.seen_by:
            eval_ds.seen_by.add(original.__name__)
            original(self, [], eval_ds, skip_jit)
        eval_ds = None
    if train_ds:
        original(self, train_ds, eval_ds, skip_jit)


def _evaluate(learner: Any, run: Callable, call: dict[str, Any]) -> None:
    """All examples in one list: the host takes the first from the queue, and no other."""
    step = rollout_step(learner)
    step.drawn.pop(Mode.EVAL, None)  # From the stream's beginning, so that all have the same.
    step.evaluated_at = learner.rl_cluster.actor_trainer.train_steps
    queue = call["data_queue"]
    try:
        queue.put(Evaluation(_examples(run, call)))
    finally:
        queue.put(None)


def evaluate_last(learner: Any, eval_ds: Iterable | None, skip_jit: bool) -> None:
    """Evaluates the policy that training leaves; the host evaluates before a step, and never after.

    Nothing where there is nothing to evaluate on, or where the policy is that of the last time.
    """
    trainer = learner.rl_cluster.actor_trainer
    if eval_ds is None or trainer.train_steps == rollout_step(learner).evaluated_at:
        return
    queue = SimpleDataQueue(maxsize=0)
    learner._eval_iter_steps = 0
    learner._prepare_data(
        iterator=iter(eval_ds),
        proceed_num_steps=-1,
        sample_repeat=learner._num_generations(),
        batch_repeat=1,
        service_target_batch_size=math.lcm(
            learner._rollout_micro_batch_size, learner._compute_logps_micro_batch_size
        ),
        data_queue=queue,
        mode=Mode.EVAL,
    )
    examples = queue.get(block=True)
    learner.rl_cluster.update_actor([], examples, skip_jit)
    if hasattr(learner.rl_cluster, "critic_trainer"):
        learner.rl_cluster.update_critic([], examples, skip_jit)


@around
def wrap_close(original, self) -> None:
    """The policy that training leaves is evaluated.

    What a learner has left to do is done while metrics can still be logged.
    """
    vars(self).pop("before_close", lambda: None)()
    original(self)


def _examples(run: Callable, call: dict[str, Any]) -> list[Any]:
    collected = SimpleDataQueue(maxsize=0)
    run(**call | {"data_queue": collected})
    return [example for item in iter(lambda: collected.get(block=True), None) for example in item]
