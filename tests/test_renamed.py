# SPDX-License-Identifier: Apache-2.0
"""Names that modules had in version 0.1 are importable for one version more."""

import importlib
import inspect
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


_TRAINING = (
    "eval_steps=100, save_steps=100, save_total_limit=3, keep_steps=(), report_to='tensorboard'"
)
# Of functions that read settings today.
SIGNATURES = {
    "settings.make_training_config": "(output_dir, *, max_steps, gradient_accumulation_steps=1, "
    f"{_TRAINING})",
    "settings.training_fields": f"(output_dir, *, max_steps, {_TRAINING})",
    "grpo.make_rollout_config": "(*, max_prompt_length, max_completion_length, temperature=1.0, "
    "top_p=None, top_k=None, seed=0)",
    "grpo.make_cluster": "(policy, reference, processor, *, optimizer, mesh, rollout_mesh, sizes, "
    f"rollout, output_dir, max_steps, {_TRAINING})",
    "grpo.make_algorithm": "(loss_type, *, num_generations, num_iterations=1, beta=0.0, "
    "kl_estimator='k3', epsilon=0.2, epsilon_high=None)",
}


@pytest.mark.filterwarnings("ignore:tunix_gemma4:DeprecationWarning")
def test_a_former_function_takes_the_words_it_took():
    def function(name):
        module, _, name = name.partition(".")
        return getattr(importlib.import_module(f"tunix_gemma4.host.{module}"), name)

    assert {name: str(inspect.signature(function(name))) for name in SIGNATURES} == SIGNATURES
    with pytest.raises(TypeError, match="make_algorithm.* 'temperature'"):
        function("grpo.make_learner")(None, "grpo", [], num_generations=2, temperature=1.0)
    make = function("settings.make_training_config")
    assert make("out", max_steps=3).gradient_accumulation_steps is None
    assert make("out", max_steps=3, gradient_accumulation_steps=2).gradient_accumulation_steps == 2
    shared = function("settings.training_fields")("out", max_steps=None, eval_steps=7)
    assert (shared["max_steps"], shared["eval_every_n_steps"]) == (None, 7)
    rollout = function("grpo.make_rollout_config")(max_prompt_length=3, max_completion_length=4)
    assert (rollout.kv_cache_size, rollout.temperature, rollout.top_p) == (7, 1.0, None)
    _, algorithm = function("grpo.make_algorithm")("gspo", num_generations=4, epsilon_high=0.3)
    assert (algorithm.num_generations, algorithm.epsilon_high) == (4, 0.3)


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
