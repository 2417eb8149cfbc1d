# SPDX-License-Identifier: Apache-2.0
"""Tunix's own command lines, unmodified, on Gemma 4; and `tunix-gemma4 run` and `grpo`."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from small_models import ONE_DEVICE
from tunix.cli import config as tunix_config
from tunix.rl.rl_cluster import RLTrainingConfig
from tunix.sft.peft_trainer import TrainingConfig
from tunix.utils import mesh as tunix_mesh

import tunix_gemma4
from tunix_gemma4.__main__ import main
from tunix_gemma4.plugin.register import run, status

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


def settings(*overrides, program="grpo_main", base="base_config.yaml"):
    return tunix_config.HyperParameters([program, str(base), *map(str, overrides)])


def on(directory, **changes):
    section = {"model_id": directory, **changes}
    return [f"model_config.{name}={value}" for name, value in section.items()]


# ---- Settings.


def keys_that_tunix_reads():
    """Sections that the sources of the two command lines name."""
    patterns = (
        r"self\.config\[[\"'](\w+)[\"']\]",
        r"self\.config\.get\(\s*[\"'](\w+)[\"']",
        r"self\.(?:create_optimizer|obtain_training_config_dict)\(\s*[\"'](\w+)[\"']",
        r"self\._(?:mutable_)?config_(?:mapping|string|bool)\(\s*[\"'](\w+)[\"']",
    )
    found = set()
    for name in ("config", "grpo_main", "peft_main"):
        source = Path(importlib.util.find_spec(f"tunix.cli.{name}").origin).read_text()
        for pattern in patterns:
            found.update(re.findall(pattern, source))
    return found


def test_the_shipped_settings_have_every_key_that_tunix_reads(tiny_dir):
    read = keys_that_tunix_reads()
    assert {"training_mode", "grpo_config", "optimizer_config", "data_module"} <= read
    # Older or other ways to say what the file says elsewhere.
    elsewhere = {"model_download_path", "train_split", "warmup_steps"}
    assert read - elsewhere <= set(settings(*on(tiny_dir)).config)


def test_the_shipped_settings_build_what_tunix_builds_from_them(tiny_dir):
    found = settings(*on(tiny_dir))
    assert found.parse_mesh_config("model_config") == ((1, 1), ("fsdp", "tp"))
    found.create_optimizer("optimizer_config")
    TrainingConfig(**found.obtain_training_config_dict("training_config"))
    optimizer = found.create_optimizer("rl_training_config", "actor_optimizer_config")
    RLTrainingConfig(
        **found.obtain_training_config_dict("rl_training_config"), actor_optimizer=optimizer
    )
    actor, reference = found.config["actor_model_config"], found.config["reference_model_config"]
    assert actor["model_id"] == reference["model_id"] == str(tiny_dir)
    assert (reference["mesh"], reference["same_mesh_as"]) == (None, "actor")


def test_a_file_of_the_users_own_is_read_as_it_is(tiny_dir, tmp_path):
    own = tmp_path / "base_config.yaml"
    text = (ROOT / "tunix_gemma4/plugin/base_config.yaml").read_text()
    own.write_text(text.replace("batch_size: 8", "batch_size: 3"))
    assert settings(*on(tiny_dir), base=own).config["batch_size"] == 3
    with pytest.raises(ValueError, match=r"missing\.yaml not found"):
        settings(base=tmp_path / "missing.yaml")


@pytest.mark.parametrize("name", ["gemma-4-e2b", "Gemma-4-31B-IT", "gemma4_12b_it"])
@pytest.mark.parametrize("source", ["huggingface", "gcs", "internal"])
def test_every_source_of_gemma_4_is_accepted(tiny_dir, name, source):
    place = {"model_path": tiny_dir} if source != "huggingface" else {}
    settings(*on(tiny_dir, model_name=name, model_source=source, **place))


def test_the_host_alone_refuses_and_other_families_are_judged_by_it(tiny_dir):
    qwen = on("Qwen/Qwen3-0.6B", model_name="qwen3-0.6b")
    tokenizer = "tokenizer_config.tokenizer_path=/somewhere"
    settings(*qwen, tokenizer)
    with pytest.raises(ValueError, match="must use source"):
        settings(*on("google/gemma-2-2b", model_name="gemma-2-2b"), tokenizer)
    base = ROOT / "tunix_gemma4/plugin/base_config.yaml"
    tunix_gemma4.unregister()
    settings(*qwen, tokenizer, base=base)
    with pytest.raises(ValueError, match="'gemma-4-e2b-it' must use source"):
        settings(*on(tiny_dir), tokenizer, base=base)
    with pytest.raises(ValueError, match=r"base_config\.yaml not found"):
        settings(*on(tiny_dir))


def test_a_directory_under_the_name_of_another_model_is_refused(tiny_dir):
    with pytest.raises(ValueError, match="'my-model' is no Gemma 4"):
        settings(*on(tiny_dir, model_name="my-model"))


def test_the_tokenizer_is_the_models_own_unless_one_is_named(monkeypatch, tiny_dir):
    monkeypatch.chdir(tiny_dir.parent)
    section = settings(*on(tiny_dir.name)).config["tokenizer_config"]
    assert section["tokenizer_path"] == str(tiny_dir.resolve())
    named = settings(*on(tiny_dir), "tokenizer_config.tokenizer_path=/elsewhere")
    assert named.config["tokenizer_config"]["tokenizer_path"] == "/elsewhere"
    with pytest.raises(ValueError, match="Missing `HF_TOKEN`"):
        settings()
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert settings().config["tokenizer_config"]["tokenizer_path"] == "google/gemma-4-E2B-it"


def test_devices_without_coordinates_are_handed_out_in_order():
    devices = jax.devices()[:4]
    found = tunix_mesh.allocate_named_mesh_device_slices(
        [("actor", 1), ("rollout", 2)], devices=devices, allocation_policy="COMPACT"
    )
    assert found == {"actor": devices[:1], "rollout": devices[1:3]}
    with pytest.raises(ValueError, match=r"5 devices are needed \(actor 1, rollout 4\)"):
        tunix_mesh.allocate_named_mesh_device_slices([("actor", 1), ("rollout", 4)], devices)


def test_devices_with_coordinates_are_the_hosts_affair():
    class Chip:
        platform, device_kind, process_index, slice_index, core_on_chip = "tpu", "TPU", 0, 0, 0

        def __init__(self, number):
            self.id, self.coords = number, (number % 2, number // 2, 0)

    chips = [Chip(number) for number in range(4)]
    requirements = [("actor", 2), ("rollout", 2)]
    found = tunix_mesh.allocate_named_mesh_device_slices(requirements, devices=chips)
    tunix_gemma4.unregister()
    assert found == tunix_mesh.allocate_named_mesh_device_slices(requirements, devices=chips)


# ---- The commands.


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Writes a script and keeps what running one changes."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text):
        path = tmp_path / "program.py"
        path.write_text(text)
        return str(path)

    return write


def test_a_script_finds_its_arguments_its_neighbours_and_tunix_registered(
    capsys, program, tmp_path
):
    tunix_gemma4.unregister()
    (tmp_path / "neighbour.py").write_text("WORD = 'hello'\n")
    script = program("import sys, neighbour\nprint(__name__, sys.argv[1:], neighbour.WORD)\n")
    assert main(["run", script, "--flag", "key=value"]) == 0
    assert capsys.readouterr().out == "__main__ ['--flag', 'key=value'] hello\n"
    assert "get_model_module" in status()


def test_a_programs_exit_code_and_errors_are_its_own(program):
    with pytest.raises(SystemExit) as stopped:
        main(["run", program("import sys; sys.exit(3)")])
    assert stopped.value.code == 3
    with pytest.raises(ValueError, match="mine") as error:
        main(["run", program("def f():\n    raise ValueError('mine')\nf()")])
    assert error.traceback[-1].path.name == "program.py"
    with pytest.raises(ImportError):
        run("no_such_module_anywhere", [])


def test_a_mistake_in_a_grpo_configuration_is_one_message(capsys, tmp_path):
    assert main(["grpo", str(tmp_path / "missing.yaml")]) == 2
    assert capsys.readouterr().err.startswith("tunix-gemma4 grpo: ")


def run_command(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tunix_gemma4", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": ONE_DEVICE,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(cwd / "cache"),
            **environment,
        },
        check=False,
    )


LORA = "lora_config={module_path: '.*q_einsum|.*gate_proj', rank: 4, alpha: 8.0}"
WORDS = ("one", "two", "red", "sky", "cat", "dog", "six", "ten")


def test_peft_main_trains_an_adapter_from_a_local_directory(tiny_dir, tmp_path):
    """The data set is a copy of one that peft_main knows, found by its name where it runs."""
    folder = tmp_path / "Helsinki-NLP/opus-100/en-fr"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [{"translation": {"en": word, "fr": word[::-1]}} for word in WORDS]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = run_command(
        *("run", "tunix.cli.peft_main", "base_config.yaml"),
        *on(tiny_dir, dtype="float32"),
        f"model_config.{LORA}",
        *("dataset_name=Helsinki-NLP/opus-100", "batch_size=4", "max_target_length=64"),
        "num_train_epochs=2",
        "training_config={eval_every_n_steps: 100, max_steps: 3}",
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "on 12 projections (language_model: gate_proj 6, q_proj 6)" in run.stderr
    losses = re.findall(r"Train step (\d) training loss: ([\d.]+)", run.stderr)
    assert [step for step, _ in losses] == ["1", "2", "3"]


# Tunix's own templating turns messages into strings, so a data module with images writes the
# template itself, an image as its placeholder.
DATA = """
import grain
import numpy as np

WORDS = {words}
TEMPLATE = "<bos><|turn>user\\n<|image|>%s<turn|>\\n<|turn>model\\n"


def create_dataset(size):
    rows = []
    for number, word in enumerate(WORDS):
        pixels = np.full((size, size, 3), 30 * number, np.uint8)
        rows.append({{"prompts": TEMPLATE % word, "images": pixels, "answer": word}})
    return grain.MapDataset.source(rows)
"""
REWARD = """
def share_of_low_letters(prompts, completions, answer, **columns):
    print("rewarded", len(completions), *answer[::2])
    return [sum(letter < "m" for letter in said) / max(len(said), 1) for said in completions]
"""


@pytest.mark.slow
def test_grpo_main_trains_on_images_from_local_files(tiny_dir, tmp_path):
    (tmp_path / "my_data.py").write_text(DATA.format(words=WORDS))
    (tmp_path / "my_reward.py").write_text(REWARD)
    run = run_command(
        *("run", "tunix.cli.grpo_main", "base_config.yaml"),
        *on(tiny_dir, dtype="float32", text_only="false"),
        f"actor_model_config.{LORA}",
        *("data_module=my_data", "data_config={size: 16}", "reward_functions=[my_reward]"),
        "apply_chat_template_to_dataset=false",
        *("batch_size=4", "grpo_config.num_generations=2"),
        *("rollout_config.total_generation_steps=4", "rollout_config.max_prompt_length=288"),
        "rl_training_config={eval_every_n_steps: 10, actor_optimizer_config: "
        "{opt_type: sgd, learning_rate: 0.1}}",
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert re.findall(r"rewarded (.*)", run.stdout) == [
        "8 " + " ".join(WORDS[:4]),
        "8 " + " ".join(WORDS[4:]),
    ]
    assert re.findall(r"Train step (\d) training loss", run.stderr) == ["1", "2"]
    assert "<|image|>" in run.stderr  # among the prompts that Tunix logs
