# SPDX-License-Identifier: Apache-2.0
"""The former name of `tunix_gemma4.plugin.rl.cluster`, which took words and no settings."""

import dataclasses

from tunix.rl.rollout.base_rollout import RolloutConfig

from tunix_gemma4._renamed import warn
from tunix_gemma4.config.domains import require
from tunix_gemma4.plugin.rl import cluster as _now

# What follows takes the place of some of these.
from tunix_gemma4.plugin.rl.cluster import *  # noqa: F403  # pyright: ignore[reportAssignmentType]
from tunix_gemma4.settings.grpo import (
    GrpoRunConfig as _GrpoRunConfig,
    PromptConfig as _PromptConfig,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Prompts that go through each part of a step at once; None: as many as through training."""

    mini: int
    train_micro: int
    rollout_micro: int | None = None
    logps_micro: int | None = None
    updates_per_batch: int = 1


def make_rollout_config(*, max_prompt_length, max_completion_length, **words):
    """How completions are sampled; lengths in tokens."""
    require(max_prompt_length=max_prompt_length, max_completion_length=max_completion_length)
    require(**words)
    return RolloutConfig(
        max_prompt_length=max_prompt_length,
        max_tokens_to_generate=max_completion_length,
        kv_cache_size=max_prompt_length + max_completion_length,
        **{"temperature": 1.0, "top_p": None, "top_k": None, "seed": 0} | words,
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
    keep_steps=(),
    **words,
):
    """A cluster that goes on from the latest checkpoint below `output_dir`."""
    config = _GrpoRunConfig(
        output_dir=str(output_dir),
        keep_steps=list(keep_steps),
        data=_PromptConfig(max_prompt_length=rollout.max_prompt_length),
        max_completion_length=rollout.max_tokens_to_generate,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=rollout.seed,
        batch_size=sizes.mini * sizes.updates_per_batch,
        mini_batch_size=sizes.mini,
        train_micro_batch_size=sizes.train_micro,
        rollout_micro_batch_size=sizes.rollout_micro,
        compute_logps_micro_batch_size=sizes.logps_micro,
        **words,
    )
    meshes = {"optimizer": optimizer, "mesh": mesh, "rollout_mesh": rollout_mesh}
    if _now.cluster_config(config, **meshes).rollout_config != rollout:
        raise ValueError("rollout: expected what make_rollout_config gives, with nothing added")
    return _now.make_cluster(policy, reference, processor, config, **meshes)


def make_algorithm(loss_type, **words):
    """The host's learner class of a loss, and its settings."""
    return _now.make_algorithm(_GrpoRunConfig(loss_type=loss_type, **words))


def make_learner(cluster, loss_type, reward_fns, **words):
    """The host's learner of a loss, whose rewards are added."""
    config = _GrpoRunConfig(loss_type=loss_type, **words)
    return _now.make_learner(cluster, config, reward_fns)


warn(__name__, "tunix_gemma4.plugin.rl.cluster")
