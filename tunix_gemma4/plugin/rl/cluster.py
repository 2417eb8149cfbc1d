# SPDX-License-Identifier: Apache-2.0
"""Tunix's GRPO, GSPO, Dr.GRPO and DAPO learners, from settings in TRL's words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.rl.grpo.dapo_learner import DAPOConfig, DAPOLearner
from tunix.rl.grpo.drgrpo_learner import DrGRPOConfig, DrGRPOLearner
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.sft import utils as sft_utils

from ...config.domains import require, require_fields
from ...data.processor import Processor
from ..checkpoints import CheckpointManager
from ..training_config import CHECKPOINTS, training_fields
from .learner import set_processor

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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Prompts that go through each part of a step at once; None: as many as through training.

    Attributes:
        mini: of one optimizer step.
        train_micro, rollout_micro, logps_micro: of one forward pass of training, of sampling and
            of reference or old policy.
        updates_per_batch: optimizer steps between one rollout step and the next.
    """

    mini: int
    train_micro: int
    rollout_micro: int | None = None
    logps_micro: int | None = None
    updates_per_batch: int = 1

    def __post_init__(self):
        require_fields(self)


def make_rollout_config(
    *,
    max_prompt_length: int,
    max_completion_length: int,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> RolloutConfig:
    """How completions are sampled; lengths in tokens."""
    require(max_prompt_length=max_prompt_length, max_completion_length=max_completion_length)
    require(temperature=temperature, top_p=top_p, top_k=top_k)
    return RolloutConfig(
        max_prompt_length=max_prompt_length,
        max_tokens_to_generate=max_completion_length,
        kv_cache_size=max_prompt_length + max_completion_length,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )


def make_cluster(
    policy: nnx.Module,
    reference: nnx.Module | None,
    processor: Processor,
    *,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rollout_mesh: Mesh | None,
    sizes: Sizes,
    rollout: RolloutConfig,
    output_dir: str | Path,
    max_steps: int,
    **training: Any,
) -> RLCluster:
    """A cluster that goes on from the latest checkpoint below `output_dir`.

    Args:
        policy: on `mesh`; it is trained.
        reference: on `mesh`, or None for no KL penalty.
        processor: reads conversations and images.
        optimizer: of the policy.
        mesh: trains, and samples where there is no `rollout_mesh`.
        rollout_mesh: samples, with a copy of the policy.
        sizes: of batches.
        rollout: from `make_rollout_config`.
        output_dir, max_steps, **training: see `training_config.training_fields`.
    """
    # The host would restore before it has placed the optimizer, and by metadata that the mesh may
    # not fit; see `CheckpointManager`.
    fields = training_fields(output_dir, max_steps=max_steps, **training)
    directory = fields.pop("checkpoint_root_directory")
    config = ClusterConfig(
        role_to_mesh={
            Role.ACTOR: mesh,
            Role.REFERENCE: mesh,
            Role.ROLLOUT: mesh if rollout_mesh is None else rollout_mesh,
        },
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=RLTrainingConfig(
            actor_optimizer=optimizer,
            mini_batch_size=sizes.mini,
            train_micro_batch_size=sizes.train_micro,
            rollout_micro_batch_size=sizes.rollout_micro,
            compute_logps_micro_batch_size=sizes.logps_micro,
            **fields,
        ),
        rollout_config=rollout,
    )
    cluster = RLCluster(
        actor=policy, reference=reference, tokenizer=processor.tokenizer, cluster_config=config
    )
    set_processor(cluster, processor)
    _restore(cluster, f"{directory}/{ACTOR}", sizes.updates_per_batch)
    return cluster


def _restore(cluster: RLCluster, directory: str, updates_per_batch: int) -> None:
    """Gives the trainer its checkpoints, and goes on from the latest."""
    trainer = cluster.actor_trainer
    trainer.checkpoint_manager = CheckpointManager(
        root_directory=directory, options=trainer.config.checkpointing_options
    )
    # In between, some of a rollout step's updates are still to come.
    trainer.checkpoint_manager.whole = updates_per_batch
    adapted = sft_utils.is_lora_enabled(trainer.model)
    steps, metadata = trainer.checkpoint_manager.maybe_restore(
        trainer.model, trainer.optimizer, restore_only_lora_params=adapted
    )
    if not steps:
        return
    # The host's last checkpoint of a run has no metadata.
    trainer._restored_custom_metadata = {"global_step": steps // updates_per_batch} | metadata
    trainer._train_steps = steps
    trainer._iter_steps = steps * trainer.config.get_with_default("gradient_accumulation_steps", 1)
    if cluster.r2m[Role.ROLLOUT] != cluster.r2m[Role.ACTOR]:
        kind = nnx.LoRAParam if adapted else nnx.Param
        cluster.rollout.update_params(nnx.state(trainer.model, kind), (kind,))


def checkpoint_directory(output_dir: str | Path) -> Path:
    """Where `make_cluster` keeps checkpoints."""
    return Path(output_dir) / CHECKPOINTS / ACTOR


def make_learner(
    cluster: RLCluster,
    loss_type: str,
    reward_fns: Sequence[Callable[..., list[float]]],
    **algorithm: Any,
) -> GRPOLearner:
    """The host's learner of a loss, whose rewards are added; see `make_algorithm`."""
    learner, config = make_algorithm(loss_type, **algorithm)
    return learner(rl_cluster=cluster, algo_config=config, reward_fns=list(reward_fns))


def make_algorithm(
    loss_type: str,
    *,
    num_generations: int,
    num_iterations: int = 1,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[type[GRPOLearner], GRPOConfig]:
    """The host's learner class of a loss, and its settings.

    Args:
        loss_type: one of `LOSS_TYPES`.
        num_generations: completions of a prompt.
        num_iterations: optimizer steps on the same completions.
        beta: weight of the KL penalty.
        kl_estimator: one of `KL_ESTIMATORS`; the host's own default is k1.
        epsilon, epsilon_high: bounds of the probability ratio below and above 1; None is the
            host's, which is `epsilon`, or 0.28 with "dapo".
    """
    require(num_generations=num_generations, num_iterations=num_iterations)
    require(beta=beta, epsilon=epsilon, epsilon_high=epsilon_high)
    learner, config, fields = _LEARNERS[loss_type]
    shared = {
        "num_generations": num_generations,
        "num_iterations": num_iterations,
        "epsilon": epsilon,
        "kl_loss_mode": _KL_MODES[kl_estimator],
    }
    if loss_type == "dapo":
        if epsilon_high is None:
            epsilon_high = max(0.28, epsilon)
        algorithm = config(epsilon_high=epsilon_high, **shared, **fields)
        # Not being 0, the None that it wants would make the host ask for a reference.
        algorithm.beta = 0.0
    else:
        algorithm = config(beta=beta, **shared, **fields)
        # The loss reads it, and the dataclass does not have it.
        algorithm.epsilon_high = epsilon if epsilon_high is None else epsilon_high
    return learner, algorithm
