# SPDX-License-Identifier: Apache-2.0
"""The training step of reinforcement learning outside a learner, to compile it on shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.rl import function_registry
from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample
from tunix.rl.rl_cluster import RLTrainingConfig
from tunix.rl.trainer import Trainer

from .learner import extended


def make_trainer(
    policy: nnx.Module,
    optimizer: optax.GradientTransformation,
    algorithm: GRPOConfig,
    *,
    mini: int,
    micro: int,
    pad_id: int,
    eos_id: int,
) -> Trainer:
    """The policy's trainer as the host's learner of `algorithm` sets it up.

    Args:
        policy: with adapters or without.
        optimizer: of the policy.
        algorithm: from `grpo.make_algorithm`.
        mini, micro: prompts of an optimizer step, and of a forward pass.
        pad_id, eos_id: of the tokenizer.
    """
    training = RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=1,
        mini_batch_size=mini,
        train_micro_batch_size=micro,
    )
    trainer = Trainer(policy, optimizer, training, dict)
    loss = function_registry.get_policy_loss_fn(algorithm.policy_loss_fn)
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=algo_config, pad_id=pad_id, eos_id=eos_id
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": algorithm})
    return trainer


def example_shapes(
    make: Callable[..., jax.ShapeDtypeStruct],
    shape: tuple[int, int, int],
    *,
    images: Any,
    repeats: int,
    reference: bool,
    old: bool,
    token_mean: bool,
    temperature: float,
    suppressed: tuple[int, ...],
) -> TrainExample:
    """A micro-batch as the learner hands it to the trainer.

    Args:
        make: `make(*shape, dtype=int32)` gives a placed shape.
        shape: completions, and tokens of a prompt and of a completion.
        images: shapes of the images of every row, or None.
        repeats: completions of a prompt.
        reference, old: whether log-probabilities of the reference and the old policy are there.
        token_mean: whether the loss is a mean over the tokens of the optimizer step.
        temperature: of sampling.
        suppressed: ids that are never drawn.
    """
    rows, prompt, completion = shape
    prompts, completions = make(rows, prompt), make(rows, completion)
    floats = make(rows, completion, dtype=jnp.float32)
    return extended(TrainExample)(
        prompt_ids=prompts,
        prompt_mask=prompts,
        completion_ids=completions,
        completion_mask=completions,
        advantages=make(rows, dtype=jnp.float32),
        ref_per_token_logps=floats if reference else None,
        old_per_token_logps=floats if old else None,
        images=images,
        rollout_logps=floats,
        loss_denominator=make(rows, dtype=jnp.float32) if token_mean else None,
        image_repeats=repeats if images is not None else 1,
        temperature=temperature,
        suppressed=suppressed,
    )
