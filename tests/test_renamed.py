# SPDX-License-Identifier: Apache-2.0
"""Names that modules had in version 0.1 are importable for one version more."""

import importlib
import sys

import pytest

# What README, docs and examples named then.
NAMES = {
    "host": "grpo",
    "host.grpo": "RLCluster Sizes make_algorithm make_cluster make_learner make_rollout_config",
    "host.learner": "set_processor",
    "host.optimizer": "make_optimizer make_schedule",
    "host.register": "status",
    "host.rewards": "RewardError checked",
    "host.settings": "make_training_config training_fields",
    "host.trainer": "Gemma4Trainer TrainingConfig",
    "processor": "Batch Example Processor",
    "recipes.digits": "DIGIT write_scans write_task",
    "recipes.preferences": "PreferenceBatches read_preference",
    "recipes.prompts": "Batches PromptRows",
    "recipes.rewards": "completion_text load_reward numeric_answer read_number soft_overlong",
    "recipes.rl_config": "GrpoRunConfig PromptConfig load_grpo_config",
    "recipes.run_config": "DataConfig LoraSettings MeshConfig RunConfig load_run_config to_yaml",
    "recipes.settings": "LoraSettings MeshConfig",
    "tiny": "build_tiny_checkpoint",
}


@pytest.mark.parametrize("module", NAMES)
def test_a_former_module_has_its_names_and_says_its_new_one(module):
    name = f"tunix_gemma4.{module}"
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} is called tunix_gemma4"):
        exec(f"from {name} import {', '.join(NAMES[module].split())}", {})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("tunix_gemma4", "params_safetensors"),
        ("tunix_gemma4", "params"),
        ("tunix_gemma4.lora", "reference_model"),
        ("tunix_gemma4.model", "Gemma4ForTokenScores"),
        ("tunix_gemma4.recipes", "grpo"),
        ("tunix_gemma4.recipes.common", "device_mesh"),
        ("tunix_gemma4.recipes.compile_cache", "compilation_cache"),
    ],
)
def test_what_kept_its_name_says_nothing(module, name):
    sys.modules.pop(f"{module}.{name}", None)
    exec(f"from {module} import {name}", {})


def test_the_line_that_imports_is_named(tmp_path, monkeypatch):
    (tmp_path / "one_script.py").write_text("import tunix_gemma4.tiny\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("tunix_gemma4.tiny", None)
    with pytest.warns(DeprecationWarning) as said:
        importlib.import_module("one_script")
    assert said[0].filename.endswith("one_script.py")
