# SPDX-License-Identifier: Apache-2.0
"""The former name of `tunix_gemma4.plugin.rl.cluster`, which took words and no settings."""

import dataclasses
from typing import Any

from tunix_gemma4._renamed import warn
from tunix_gemma4.config.domains import require
from tunix_gemma4.plugin.rl import cluster as _now

# What follows takes the place of some of these.
from tunix_gemma4.plugin.rl.cluster import *  # noqa: F403  # pyright: ignore[reportAssignmentType]
from tunix_gemma4.settings.grpo import GrpoRunConfig as _GrpoRunConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Prompts that go through each part of a step at once; None: as many as through training."""

    mini: int
    train_micro: int
    rollout_micro: int | None = None
    logps_micro: int | None = None
    updates_per_batch: int = 1


def make_rollout_config(
    *, max_prompt_length, max_completion_length, temperature=1.0, top_p=None, top_k=None, seed=0
):
    """How completions are sampled; lengths in tokens."""
    require(max_prompt_length=max_prompt_length, max_completion_length=max_completion_length)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    require(**sampling)
    sampling["seed"] = seed
    return _now.RolloutConfig(
        max_prompt_length=max_prompt_length,
        max_tokens_to_generate=max_completion_length,
        kv_cache_size=max_prompt_length + max_completion_length,
        **sampling,
    )


def make_cluster(
    policy,
    reference,
    processor,
    *,
    optimizer,
    mesh,
    rollout_mesh,
    sizes,
    rollout,
    output_dir,
    max_steps,
    eval_steps=100,
    save_steps=100,
    save_total_limit=3,
    keep_steps=(),
    report_to="tensorboard",
):
    """A cluster that goes on from the latest checkpoint below `output_dir`."""
    config = _GrpoRunConfig(
        output_dir=str(output_dir),
        max_steps=max_steps,
        eval_steps=eval_steps,
        save_steps=save_steps,
        save_total_limit=save_total_limit,
        keep_steps=list(keep_steps),
        report_to=report_to,
        batch_size=sizes.mini * sizes.updates_per_batch,
        mini_batch_size=sizes.mini,
        train_micro_batch_size=sizes.train_micro,
        rollout_micro_batch_size=sizes.rollout_micro,
        compute_logps_micro_batch_size=sizes.logps_micro,
    )
    meshes = {"mesh": mesh, "rollout_mesh": rollout_mesh}
    told = _now.cluster_config(config, optimizer=optimizer, **meshes)
    cluster = _now.RLCluster(
        actor=policy,
        reference=reference,
        tokenizer=processor.tokenizer,
        cluster_config=dataclasses.replace(told, rollout_config=rollout),
    )
    _now.set_processor(cluster, processor)
    _now.restore(cluster, config)
    return cluster


def make_algorithm(
    loss_type,
    *,
    num_generations,
    num_iterations=1,
    beta=0.0,
    kl_estimator="k3",
    epsilon=0.2,
    epsilon_high=None,
):
    """The host's learner class of a loss, and its settings."""
    return _now.make_algorithm(_GrpoRunConfig(**locals()))


def make_learner(cluster, loss_type, reward_fns, **algorithm):
    """The host's learner of a loss, whose rewards are added; see `make_algorithm`."""
    learner, config = make_algorithm(loss_type, **algorithm)
    return learner(rl_cluster=cluster, algo_config=config, reward_fns=list(reward_fns))


warn(
    *(__name__, "tunix_gemma4.plugin.rl.cluster"),
    "its functions take a GrpoRunConfig, for Sizes and make_rollout_config too; see CHANGELOG",
)
