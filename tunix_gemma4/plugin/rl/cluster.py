# SPDX-License-Identifier: Apache-2.0
"""Tunix's GRPO, GSPO, Dr.GRPO and DAPO learners, from settings in TRL's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.rl import function_registry
from tunix.rl.grpo.dapo_learner import DAPOConfig, DAPOLearner
from tunix.rl.grpo.drgrpo_learner import DrGRPOConfig, DrGRPOLearner
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner, TrainExample
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.trainer import Trainer

from ...config.domains import require_fields
from ...data.processor import Processor
from ...rewards import RewardFn
from ...settings.grpo import GrpoRunConfig
from ..checkpoints import resume
from ..optimizer import trained_kind
from ..training_config import CHECKPOINTS, make_training_config
from .learner import set_processor
from .losses import extended
from .rollout import gemma4_rollout

_LEARNERS = {
    "grpo": (GRPOLearner, GRPOConfig, {"loss_algo": "grpo"}),
    "gspo": (GRPOLearner, GRPOConfig, {"loss_algo": "gspo-token"}),
    "dr_grpo": (DrGRPOLearner, DrGRPOConfig, {}),
    # Its own penalty counts characters of 20,480 and knows no other length.
    "dapo": (DAPOLearner, DAPOConfig, {"overlong_buffer": None}),
}
# Schulman's three estimators of a KL divergence, by the host's names. Only the last two have the
# divergence's gradient in a loss; that of k1 does not see the reference, and has mean 0.
_KL_MODES = {"k1": "kl", "k2": "mse_kl", "k3": "low_var_kl"}
ACTOR = "actor"  # the host's name for the policy, also of its checkpoints and metrics


def cluster_config(
    config: GrpoRunConfig,
    *,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rollout_mesh: Mesh | None = None,
    max_steps: int | None = None,
) -> ClusterConfig:
    """What the host's cluster is told; see `make_cluster`."""
    prompt, completion = config.data.max_prompt_length, config.max_completion_length
    return ClusterConfig(
        role_to_mesh={
            Role.ACTOR: mesh,
            Role.REFERENCE: mesh,
            Role.ROLLOUT: mesh if rollout_mesh is None else rollout_mesh,
        },
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=make_training_config(
            config,
            RLTrainingConfig,
            actor_optimizer=optimizer,
            mini_batch_size=config.mini,
            train_micro_batch_size=config.micro,
            rollout_micro_batch_size=config.rollout_micro_batch_size,
            compute_logps_micro_batch_size=config.compute_logps_micro_batch_size,
            max_steps=max_steps or config.max_steps,
            # The host would restore before it has placed the optimizer, and by metadata that the
            # mesh may not fit; see `CheckpointManager`.
            checkpoint_root_directory=None,
        ),
        rollout_config=RolloutConfig(
            max_prompt_length=prompt,
            max_tokens_to_generate=completion,
            kv_cache_size=prompt + completion,
            **{name: getattr(config, name) for name in ("temperature", "top_p", "top_k", "seed")},
        ),
    )


def make_cluster(
    policy: nnx.Module,
    reference: nnx.Module | None,
    processor: Processor,
    config: GrpoRunConfig,
    *,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rollout_mesh: Mesh | None = None,
    max_steps: int | None = None,
) -> RLCluster:
    """A cluster that goes on from the latest checkpoint below `config.output_dir`.

    Args:
        policy: on `mesh`; it is trained.
        reference: on `mesh`, or None for no KL penalty.
        processor: reads conversations and images.
        config: sizes of batches, how completions are sampled, what happens how often.
        optimizer: of the policy.
        mesh: trains, and samples where there is no `rollout_mesh`.
        rollout_mesh: samples, with a copy of the policy.
        max_steps: optimizer steps; None: `config.max_steps`.
    """
    told = cluster_config(
        config, optimizer=optimizer, mesh=mesh, rollout_mesh=rollout_mesh, max_steps=max_steps
    )
    cluster = RLCluster(
        actor=policy, reference=reference, tokenizer=processor.tokenizer, cluster_config=told
    )
    set_processor(cluster, processor)
    rollout = gemma4_rollout(cluster)
    if rollout is not None:
        rollout.completions_per_row = config.completions_per_row
    restore(cluster, config)
    return cluster


def restore(cluster: RLCluster, config: GrpoRunConfig) -> None:
    """Lets it go on from the latest checkpoint below `config.output_dir`, if there is one."""
    trainer, directory = cluster.actor_trainer, checkpoint_directory(config.output_dir).absolute()
    # In between, some of a rollout step's updates are still to come.
    steps = resume(trainer, str(directory), whole=config.updates_per_batch)
    # The host's last checkpoint of a run has no metadata.
    number = {"global_step": steps // config.updates_per_batch} if steps else {}
    trainer._restored_custom_metadata = number | trainer._restored_custom_metadata
    if steps and cluster.r2m[Role.ROLLOUT] != cluster.r2m[Role.ACTOR]:
        kind = trained_kind(trainer.model)
        cluster.rollout.update_params(nnx.state(trainer.model, kind), (kind,))


def checkpoint_directory(output_dir: str | Path) -> Path:
    """Where `make_cluster` keeps checkpoints."""
    return Path(output_dir) / CHECKPOINTS / ACTOR


def make_learner(
    cluster: RLCluster, config: GrpoRunConfig, reward_fns: Sequence[RewardFn]
) -> GRPOLearner:
    """The host's learner of `config.loss_type`, whose rewards are added."""
    learner, algorithm = make_algorithm(config)
    functions: list[Any] = list(reward_fns)
    return learner(rl_cluster=cluster, algo_config=algorithm, reward_fns=functions)


def make_algorithm(config: GrpoRunConfig) -> tuple[type[GRPOLearner], GRPOConfig]:
    """The host's learner class of `config.loss_type`, and its settings."""
    require_fields(config)
    learner, kind, fields = _LEARNERS[config.loss_type]
    fields = fields | {
        "num_generations": config.num_generations,
        "num_iterations": config.num_iterations,
        "epsilon": config.epsilon,
        "kl_loss_mode": _KL_MODES[config.kl_estimator],
    }
    high = config.epsilon_high
    if config.loss_type == "dapo":
        high = max(0.28, config.epsilon) if high is None else high
        algorithm = kind(epsilon_high=high, **fields)
        # Not being 0, the None that it wants would make the host ask for a reference.
        algorithm.beta = 0.0
    else:
        algorithm = kind(beta=config.beta, **fields)
        # The loss reads it, and the dataclass does not have it.
        algorithm.epsilon_high = config.epsilon if high is None else high
    return learner, algorithm


# ---- The training step outside a learner, to compile it on shapes.


def make_trainer(
    policy: nnx.Module,
    optimizer: optax.GradientTransformation,
    config: GrpoRunConfig,
    *,
    pad_id: int,
    eos_id: int,
) -> Trainer:
    """The policy's trainer as the host's learner of `config.loss_type` sets it up."""
    training = RLTrainingConfig(
        actor_optimizer=optimizer,
        eval_every_n_steps=1,
        mini_batch_size=config.mini,
        train_micro_batch_size=config.micro,
    )
    trainer = Trainer(policy, optimizer, training, dict)
    _, algorithm = make_algorithm(config)
    # The loss reads it, and the host's dataclass does not have it.
    vars(algorithm)["temperature"] = config.temperature
    loss = function_registry.get_policy_loss_fn(algorithm.policy_loss_fn)
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=algo_config, pad_id=pad_id, eos_id=eos_id
        ),
        has_aux=True,
    )
    given: dict[str, Any] = {"algo_config": algorithm}
    trainer.with_gen_model_input_fn(lambda x: given | {"train_example": x})
    return trainer


def example_shapes(
    make: Callable[..., jax.ShapeDtypeStruct],
    config: GrpoRunConfig,
    images: jax.ShapeDtypeStruct | None,
    suppressed: tuple[int, ...],
) -> TrainExample:
    """A micro-batch as the learner hands it to the trainer.

    `make(*shape, dtype=int32)` gives a placed shape; `images` are those of every row.
    """
    rows, completion = config.micro * config.num_generations, config.max_completion_length
    prompts, completions = make(rows, config.data.max_prompt_length), make(rows, completion)
    floats = make(rows, completion, dtype=jnp.float32)
    return extended(TrainExample)(
        prompt_ids=prompts,
        prompt_mask=prompts,
        completion_ids=completions,
        completion_mask=completions,
        advantages=make(rows, dtype=jnp.float32),
        ref_per_token_logps=floats if config.beta else None,
        old_per_token_logps=floats if config.updates_per_batch > 1 else None,
        images=images,
        rollout_logps=floats,
        # There the loss is a mean over the tokens of the optimizer step.
        loss_denominator=make(rows, dtype=jnp.float32) if config.loss_type == "dapo" else None,
        image_repeats=1 if images is None else config.num_generations,
        group=config.completions_per_row or config.num_generations,
        temperature=config.temperature,
        suppressed=suppressed,
    )
