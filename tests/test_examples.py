# SPDX-License-Identifier: Apache-2.0
"""Examples are short and run; `test_sampling` runs the one that generates."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import ONE_DEVICE

from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.lora import load_adapter

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# As they were in version 0.1, where modules had other names; until the next version.
FORMER = Path(__file__).parent / "former_examples"


@pytest.fixture(params=[EXAMPLES, pytest.param(FORMER, marks=pytest.mark.slow)], ids=["", "former"])
def examples(request):
    return request.param


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_under_a_hundred_lines(path):
    assert len(path.read_text().splitlines()) < 100


def test_sft_images_trains_an_adapter_and_goes_on_from_its_checkpoint(
    examples, tiny_checkpoint, tmp_path
):
    rows = []
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        content = [
            {"type": "image", "image": f"{index}.png"},
            {"type": "text", "text": "What digit is this?"},
        ]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": str(index)},
        ]
        rows.append(json.dumps({"messages": messages}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    model, output = tiny_checkpoint("demo"), tmp_path / "out"

    def run(steps):
        return subprocess.run(
            [
                *(sys.executable, examples / "sft_images.py", f"--model={model}"),
                *(f"--data={tmp_path / 'train.jsonl'}", f"--output={output}", "--rank=4"),
                *(f"--steps={steps}", "--micro_batches=2", "--max_length=96"),
                "--max_soft_tokens=70",
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ONE_DEVICE},
            check=True,
        ).stdout

    printed = run(1)
    assert "SUPERVISED" in printed
    assert "step 1/1" in printed
    assert printed.endswith(f"adapter: {output / 'adapter'}\n")
    assert "step 2/2" in run(2)
    load_adapter(load_checkpoint(model, text_only=False), output / "adapter")


def test_dpo_images_prefers_the_right_digit(examples, tiny_checkpoint, tmp_path):
    pytest.importorskip("sklearn")
    model, output = tiny_checkpoint("demo"), tmp_path / "out"
    printed = subprocess.run(
        [
            *(sys.executable, examples / "dpo_images.py", f"--model={model}"),
            *(f"--output={output}", "--steps=2", "--batch_size=2", "--rank=4"),
            *("--max_prompt_length=96", "--max_response_length=8", "--max_soft_tokens=70"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ONE_DEVICE},
        check=True,
    ).stdout
    assert printed.endswith(f"adapter: {output / 'adapter'}\n")
    rows = [json.loads(line) for line in (output / "digits.jsonl").read_text().splitlines()]
    assert len(rows) == 1797
    answers = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert all(chosen != rejected for chosen, rejected in answers)
    assert {word for pair in answers for word in pair} == set("0123456789")
    adapted = load_adapter(load_checkpoint(model, text_only=False), output / "adapter")
    projection = adapted.language_model.layers[0].self_attn.q_proj
    assert np.any(projection.kernel_lora_b[...])


@pytest.mark.parametrize("name", ["grpo_text", "grpo_images", "gspo_images"])
def test_rewards_move_the_adapter_of_a_tiny_model(name, examples, tmp_path):
    """As shipped, with fewer steps; Adam's first step moves whatever has a gradient."""
    if name == "grpo_images":
        pytest.importorskip("sklearn")
    printed = subprocess.run(
        [
            *(sys.executable, examples / f"{name}.py", f"--output={tmp_path}", "--steps=2"),
            *("--prompts=2", "--max_completion_length=3"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    ).stdout
    rewards = re.search(r"^reward: \[(.*)\]$", printed, re.MULTILINE)[1].replace(",", " ").split()
    assert len(rewards) == 2
    assert all(-1 <= float(reward) <= 2 for reward in rewards)
    adapted = load_adapter(
        load_checkpoint(tmp_path / "tiny", text_only=False), tmp_path / "adapter"
    )
    projection = adapted.language_model.layers[0].self_attn.q_proj
    assert np.any(projection.kernel_lora_b[...])
