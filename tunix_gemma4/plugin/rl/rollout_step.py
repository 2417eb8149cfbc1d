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
import inspect
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tunix.rl.queue.data_queue import SimpleDataQueue
from tunix.rl.rl_cluster import Mode

from .context import Bound, bound
from .micro_batches import needs_whole_step, share_step
from .rollout import gemma4_rollout


@dataclasses.dataclass
class RolloutStep:
    """What a learner keeps of the rollout step it is in.

    Attributes:
        prompts: of an optimizer step.
        mini_batches: optimizer steps between one rollout and the next, each counted once.
        updates: the same, each counted `num_iterations` times.
        waiting: micro-batches that are sampled and not yet trained on.
        evaluated_at: optimizer steps that had been taken at the last evaluation.
    """

    prompts: int = 1
    mini_batches: int = 1
    updates: int = 1
    waiting: collections.deque = dataclasses.field(default_factory=collections.deque)
    evaluated_at: int | None = None


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


def packs(learner: Any) -> bool:
    """Whether the host packs examples, which then lose what they have of ours."""
    return learner._training_config.max_seq_token_per_tpu is not None


# ---- The old policy.


def wrap_get_old_per_token_logps(original: Callable) -> Callable:
    """The one place that says what the old policy's log-probabilities are.

    Those with which the sampler drew the tokens, where the batch in work is trained on off-policy;
    otherwise the host's, from a forward pass of the policy that samples. A packed loss gives
    suppressed ids a share, which the sampler did not: there the host's, too.
    """

    @functools.wraps(original)
    def get_old_per_token_logps(
        self, prompt_tokens: jax.Array, completion_tokens: jax.Array, *args: Any, **kwargs: Any
    ) -> jax.Array:
        batch = bound()
        if batch is None or not batch.off_policy or not batch.suppressed:
            return original(self, prompt_tokens, completion_tokens, *args, **kwargs)
        return jnp.asarray(padded_logps(batch, completion_tokens.shape))

    return get_old_per_token_logps


def padded_logps(batch: Bound, shape: tuple[int, ...]) -> np.ndarray:
    """The sampler's log-probabilities, float32, padded with 0 like completions."""
    logps = np.zeros(shape, np.float32)
    for row, sampled in enumerate(batch.rollout_logps):
        logps[row, : len(sampled)] = sampled
    return logps


def with_old_logps(learner: Any, example: Any, batch: Bound) -> Any:
    """`example`, which has the old policy's log-probabilities wherever they are needed."""
    if not batch.off_policy and hasattr(learner.algo_config, "use_rollout_logps"):
        # Newer hosts take the sampler's even so, and its rounding with them.
        return dataclasses.replace(example, old_per_token_logps=None)
    if not batch.off_policy or example.old_per_token_logps is not None:
        return example
    old = learner.rl_cluster.get_old_per_token_logps(
        prompt_tokens=example.prompt_ids,
        completion_tokens=example.completion_ids,
        micro_batch_size=learner._compute_logps_micro_batch_size * learner._num_generations(),
    )
    return dataclasses.replace(example, old_per_token_logps=old)


# ---- Sampling for a whole step.


def wrap_prepare_data(original: Callable) -> Callable:
    """Samples for all optimizer steps of a rollout step at once, from one policy."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def prepare_data(self, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
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

    return prepare_data


def _train(learner: Any, run: Callable, call: dict[str, Any]) -> None:
    """Hands out the micro-batches of the next optimizer step, as often as there are iterations."""
    step, queue, count = rollout_step(learner), call["data_queue"], call["proceed_num_steps"]
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


def wrap_update(original: Callable) -> Callable:
    """A trainer evaluates once, before the step; the host's does in each micro-batch, and behind
    the step once more."""

    @functools.wraps(original)
    def update(self, train_ds: Any, eval_ds: Any, skip_jit: bool = False) -> None:
        if isinstance(eval_ds, Evaluation):
            if original.__name__ not in eval_ds.seen_by:
                eval_ds.seen_by.add(original.__name__)
                original(self, [], eval_ds, skip_jit)
            eval_ds = None
        if train_ds:
            original(self, train_ds, eval_ds, skip_jit)

    return update


def _evaluate(learner: Any, run: Callable, call: dict[str, Any]) -> None:
    """All examples in one list: the host takes the first from the queue, and no other."""
    vars(learner).setdefault("_drawn", {}).pop(Mode.EVAL, None)
    rollout_step(learner).evaluated_at = learner.rl_cluster.actor_trainer.train_steps
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


def wrap_close(original: Callable) -> Callable:
    """Does first what a learner has left to do while metrics can still be logged."""

    @functools.wraps(original)
    def close(self) -> None:
        vars(self).pop("before_close", lambda: None)()
        original(self)

    return close


def _examples(run: Callable, call: dict[str, Any]) -> list[Any]:
    collected = SimpleDataQueue(maxsize=0)
    run(**call | {"data_queue": collected})
    return [example for item in iter(lambda: collected.get(block=True), None) for example in item]
