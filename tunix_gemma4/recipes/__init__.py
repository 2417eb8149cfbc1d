# SPDX-License-Identifier: Apache-2.0
"""Whole runs, each readable from top to bottom, and what scripts of one's own share with them."""

from pathlib import Path

from ..plugin.rl.cluster import make_cluster, make_learner
from ..plugin.rl.rewards import RewardError, checked
from ..plugin.training_config import make_training_config
from ..settings.common import MeshConfig, TrainSettings
from ..settings.grpo import GrpoRunConfig, PromptConfig, load_grpo_config
from ..settings.sft import DataConfig, RunConfig, load_run_config
from . import grpo, sft
from .common import device_mesh
from .compile_cache import compilation_cache

__path__.append(str(Path(__file__).parents[1] / "_renamed" / "recipes"))

__all__ = [
    "DataConfig",
    "GrpoRunConfig",
    "MeshConfig",
    "PromptConfig",
    "RewardError",
    "RunConfig",
    "TrainSettings",
    "checked",
    "compilation_cache",
    "device_mesh",
    "grpo",
    "load_grpo_config",
    "load_run_config",
    "make_cluster",
    "make_learner",
    "make_training_config",
    "sft",
]
