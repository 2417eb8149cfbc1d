# SPDX-License-Identifier: Apache-2.0
"""Whole runs, each readable from top to bottom, and what scripts of one's own share with them."""

from pathlib import Path

from ..lazy import attach

__path__.append(str(Path(__file__).parents[1] / "_renamed" / "recipes"))

_HOME = {
    "DataConfig": "..settings.sft",
    "GrpoRunConfig": "..settings.grpo",
    "MeshConfig": "..settings.common",
    "PromptConfig": "..settings.grpo",
    "RewardError": "..plugin.rl.rewards",
    "RunConfig": "..settings.sft",
    "TrainSettings": "..settings.common",
    "checked": "..plugin.rl.rewards",
    "compilation_cache": ".compile_cache",
    "device_mesh": ".common",
    "load_grpo_config": "..settings.grpo",
    "load_run_config": "..settings.sft",
    "make_cluster": "..plugin.rl.cluster",
    "make_learner": "..plugin.rl.cluster",
    "make_training_config": "..plugin.training_config",
}
_MODULES = ("grpo", "sft")

__all__ = [*_HOME, *_MODULES]
__getattr__, __dir__ = attach(__name__, _HOME, _MODULES)
