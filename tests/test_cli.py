# SPDX-License-Identifier: Apache-2.0
"""The command line: its commands, and how it answers a user's mistakes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_models import ONE_DEVICE

from tunix_gemma4.__main__ import main
from tunix_gemma4.recipes import GrpoRunConfig, RunConfig
from tunix_gemma4.testing import digits

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def conversation(tmp_path):
    """One conversation about an image, as a JSONL file."""
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(tmp_path / "scan.png")
    question = [{"type": "image", "image": "scan.png"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "1"}]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    return path


def run_module(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tunix_gemma4", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ONE_DEVICE},
        check=False,
    )


def test_module_lists_its_commands():
    run = run_module("--help")
    assert run.returncode == 0
    for command in ("demo", "demo-rl", "sft", "parity", "generate"):
        assert re.search(rf"^ +{command} ", run.stdout, re.MULTILINE)


def test_mistake_is_one_message_without_a_traceback_and_exit_code_2():
    run = run_module("sft", "configs/sft/lora-text.yaml", "e2b", "lora.rnk=8")
    assert run.returncode == 2
    assert run.stderr == (
        "tunix-gemma4 sft: the command line: unknown key 'lora.rnk'; did you mean 'lora.rank'?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft", "none.yaml"], "none.yaml: there is no such file"),
        (["sft", "configs/sft/lora-text.yaml", "model=m"], "lora-text: data.path must be given"),
        (["sft", "lora-text", "e2b", "lr"], "lr: there is no such file"),
        (["recipes", "lora-text", "seed=1"], "seed=1: expected names of recipes"),
        (["demo", "seed"], "'seed': expected key=value"),
        (["demo-rl", "data.path=x"], "data.path=x: a demo makes its model and its data"),
        (["generate", "no_such_directory", "Hello"], "no_such_directory"),
    ],
)
def test_what_is_missing_is_named(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_answer_from_a_weight_that_is_not_finite_names_it(tiny_checkpoint, tmp_path, capsys):
    model = shutil.copytree(tiny_checkpoint("demo"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "language_model.layers.1.self_attn.q_proj" in name)
    tensors[name] = np.full_like(tensors[name], np.inf)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["generate", str(model), "Hello", "--max-new-tokens", "1"]) == 1
    said = capsys.readouterr()
    assert f"{model}: 1 of its tensors hold NaN or infinity (language_model.layers.1" in said.err
    assert not said.out


def test_option_that_is_given_twice_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "base", "hi", "--adapter", "q1", "--adapter=q2"])
    assert stopped.value.code == 2
    assert "--adapter: expected once, found q1 and then q2" in capsys.readouterr().err
    # What may be given again still may be.
    assert main(["generate", "no_such_directory", "hi", "--image", "a", "--image", "b"]) == 2
    assert "no_such_directory" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "kind"), [("sft", RunConfig), ("grpo", GrpoRunConfig)])
def test_help_explains_every_setting(command, kind, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    names = [*(f.name for f in dataclasses.fields(kind)), "data.path", "lora.rank=16", "mesh.tp=1"]
    assert not [name for name in names if not re.search(rf"^  {name}(=.*)?\n {{6}}\S", said, re.M)]


def test_command_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err


def test_sft_with_a_shipped_config_trains_an_adapter_that_generate_uses(
    conversation, tiny_checkpoint, tmp_path, capsys
):
    model, output = tiny_checkpoint("demo"), tmp_path / "run"
    overrides = [
        *(f"model={model}", f"data.path={conversation}", f"output_dir={output}", "max_steps=1"),
        *("data.max_soft_tokens=70", "gradient_accumulation_steps=1"),
    ]
    path = str(ROOT / "configs/sft/lora-image.yaml")
    assert main(["sft", path, "e2b", *overrides]) == 0
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    curves = capsys.readouterr().out.splitlines()[-2]
    assert re.fullmatch(rf"Curves: .*tensorboard --logdir {output / 'tensorboard'}", curves)
    assert list((output / "tensorboard").iterdir())

    arguments = ["--adapter", str(output / "adapter"), "--image", str(tmp_path / "scan.png")]
    settings = ["--max-soft-tokens", "70", "--max-new-tokens", "3"]
    assert main(["generate", str(model), "What is this?", *arguments, *settings]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_demo_goes_through_both_stages_and_fails_when_a_target_is_missed(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(digits, "NUM_HELD_OUT", 40)
    output = tmp_path / "demo"
    output.mkdir()
    short = ["max_steps=1", "batch_size=4", "report_to=none"]
    assert main(["demo", "--output-dir", str(output), *short]) == 1
    printed = capsys.readouterr().out
    assert printed.count("MISSED") == 2
    assert "loaded again it gives the same answers: yes" in printed
    made = tmp_path / "demo-2"
    assert {path.name for path in made.iterdir()} >= {"base", "data", "digit", "nine_minus"}
    assert Image.open(made / "demo.png").size == (1200, 900)
    assert not list(output.iterdir())
