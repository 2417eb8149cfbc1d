# SPDX-License-Identifier: Apache-2.0
"""Settings of reinforcement learning: defaults, what belongs together, what cannot be meant."""

import re

import pytest

from tunix_gemma4.recipes.common import make_processor
from tunix_gemma4.settings.grpo import GrpoRunConfig, load_grpo_config
from tunix_gemma4.settings.load_config import sections, to_yaml

MINIMAL = """
model: m
output_dir: out
data: {path: train.jsonl}
reward_functions: [numeric_answer]
"""


@pytest.fixture
def load(tmp_path):
    """`load(*overrides)`: the least a run needs, changed."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return lambda *overrides: load_grpo_config(path, overrides)


def test_sizes_that_are_not_given_follow_from_those_that_are(load):
    config = load("batch_size=8")
    assert (config.mini, config.micro, config.updates_per_batch) == (8, 8, 1)
    config = load("batch_size=8", "mini_batch_size=4", "num_iterations=2", "max_steps=8")
    assert (config.mini, config.micro, config.updates_per_batch) == (4, 4, 4)
    config = load("batch_size=8", "mini_batch_size=4", "train_micro_batch_size=2")
    assert (config.mini, config.micro, config.updates_per_batch) == (4, 2, 2)


def test_settings_survive_being_written_and_read(load, tmp_path):
    config = load(
        "lora.rank=4",
        "rollout_mesh.fsdp=2",
        "reward_functions=[exact_answer,'soft_overlong(max_length=9, buffer=3)']",
        "reward_weights=[1,0.5]",
        "data.system_prompt='End with ####: the number'",
    )
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config))
    assert load_grpo_config(path) == config


def test_template_arguments_reach_the_prompts(load, tiny_checkpoint):
    model = f"model={tiny_checkpoint('31b')}"
    question = [{"role": "user", "content": "What?"}]
    shown = []
    for override in ("data.thinking=true", "data.chat_template_kwargs={enable_thinking: true}"):
        processor = make_processor(load(model, override))
        example = processor.encode(question, add_generation_prompt=True)
        shown.append(processor.decode(example.tokens, skip_special_tokens=False))
    assert shown[0] == shown[1] and "<|think|>" in shown[0]
    with pytest.raises(ValueError, match="the chat template has no argument 'enable_thought'"):
        make_processor(load(model, "data.chat_template_kwargs={enable_thought: true}"))
    with pytest.raises(ValueError, match="enable_thinking is off, and thinking on"):
        make_processor(
            load(model, "data.thinking=true", "data.chat_template_kwargs={enable_thinking: false}")
        )


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("num_generation", "num_generations"),
        ("data.prompt_colum", "data.prompt_column"),
        ("max_prompt_length", "data.max_prompt_length"),
        ("rollout_mesh.tensor", "rollout_mesh.tp"),
        ("reward_funcs", "reward_functions"),
        ("kl_coef", "beta"),
        ("max_new_tokens", "max_completion_length"),
        ("gradient_accumulation_steps", "train_micro_batch_size"),
        ("per_device_train_batch_size", "batch_size"),
        ("lora_r", "lora.rank"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(load, key, nearest):
    with pytest.raises(ValueError, match=rf"unknown key '{key}'; did you mean '{nearest}'\?"):
        load(f"{key}=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("num_generations=1", r"num_generations: expected at least 2, found 1"),
        ("loss_type=ppo", r"loss_type: expected one of grpo, gspo, dr_grpo, dapo, found 'ppo'"),
        ("loss_type=dapo beta=0.1", r'beta: loss_type "dapo" has no KL penalty, found 0\.1'),
        ("kl_estimator=k4", r"kl_estimator: expected one of k1, k2, k3, found 'k4'"),
        ("beta=-1", r"beta: expected at least 0, found -1"),
        ("temperature=0", r"temperature: .*found 0"),
        ("epsilon_high=0.1", r"epsilon_high: expected at least epsilon=0\.2, found 0\.1"),
        ("top_p=1.5", r"top_p: expected above 0 and at most 1"),
        ("top_k=0", r"top_k: expected at least 1"),
        ("lora.quantize=nf4 beta=0.1", r"beta: expected 0 with lora\.quantize"),
        ("reward_functions=[]", r"reward_functions: expected at least one"),
        ("reward_functions=[nothing]", r"no reward function 'nothing'"),
        ("reward_weights=[1,2]", r"reward_weights: expected one for each of 1 .*, found 2"),
        ("mini_batch_size=3", r"mini_batch_size: expected a divisor of batch_size=8, found 3"),
        (
            "mini_batch_size=4 train_micro_batch_size=8",
            r"train_micro_batch_size: expected a divisor of mini_batch_size=4, found 8",
        ),
        ("rollout_micro_batch_size=3", r"rollout_micro_batch_size: expected a divisor"),
        ("compute_logps_micro_batch_size=3", r"compute_logps_micro_batch_size: expected a divis"),
        ("num_iterations=2 max_steps=3", r"max_steps: expected a multiple of 2.*found 3"),
        ("num_iterations=2 save_steps=3", r"save_steps: expected a multiple of 2"),
        ("num_iterations=2 eval_steps=3", r"eval_steps: expected a multiple of 2"),
        (
            "mesh.fsdp=8 train_micro_batch_size=1 num_generations=4",
            r"train_micro_batch_size: .*num_generations to be a multiple of fsdp=8, found 4",
        ),
        (
            "rollout_mesh.fsdp=16 num_generations=3",
            r"rollout_micro_batch_size: .*a multiple of fsdp=16, found 24",
        ),
        ("data.max_prompt_length=0", r"data\.max_prompt_length: expected at least 1"),
        ("merge=true", r"merge: true needs lora"),
        ("max_steps=0", r"max_steps: expected at least 1"),
    ],
)
def test_what_cannot_be_meant_is_named(load, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(*overrides.split())


def test_a_mesh_takes_all_devices_that_are_left(load):
    assert load().on_devices(1) == load()
    config = load("mesh.fsdp=-1", "mesh.tp=2").on_devices(8)
    assert (config.mesh.fsdp, config.mesh.tp) == (4, 2)
    config = load("mesh.fsdp=-1", "rollout_mesh.fsdp=2").on_devices(4)
    assert (config.mesh.fsdp, config.rollout_mesh.fsdp) == (2, 2)
    config = load("mesh.fsdp=2", "rollout_mesh={fsdp: -1, tp: 2}").on_devices(6)
    assert (config.mesh.fsdp, config.rollout_mesh.fsdp) == (2, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "mesh.tp=3",
            r"mesh\.fsdp: -1 takes all devices that are left, .* mesh\.tp=3, and 8 are left",
        ),
        ("rollout_mesh.tp=8", r"mesh\.fsdp: -1 .* mesh\.tp=1, and no device is left"),
        ("rollout_mesh.fsdp=-1", r"mesh\.fsdp, rollout_mesh\.fsdp: expected -1 for one of them"),
        ("train_micro_batch_size=1 num_generations=4", r"a multiple of fsdp=8, found 4"),
        ("mesh.fsdp=-2", r"mesh\.fsdp: expected at least 1, or -1, found -2"),
        ("mesh.tp=-1", r"mesh\.tp: expected at least 1, found -1"),
    ],
)
def test_what_all_devices_cannot_be_split_into_is_named(load, overrides, message):
    with pytest.raises(ValueError, match=message):
        load("mesh.fsdp=-1", *overrides.split()).on_devices(8)


def test_what_must_be_given_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: out\n")
    with pytest.raises(ValueError, match=r"data\.path, model, reward_functions must be given"):
        load_grpo_config(path)


def test_every_setting_is_documented():
    for section in (GrpoRunConfig, *sections(GrpoRunConfig).values()):
        documented = set()
        for kind in section.__mro__[:-1]:
            documented |= set(re.findall(r"\b\w+(?=[,:])", kind.__doc__))
        assert set(section.__dataclass_fields__) <= documented
