# SPDX-License-Identifier: Apache-2.0
"""No recipe compiles a step twice: programs are counted as JAX compiles them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled_programs

from tunix_gemma4.lora import LoraConfig
from tunix_gemma4.recipes import grpo, sft
from tunix_gemma4.settings.common import MeshConfig
from tunix_gemma4.settings.grpo import GrpoRunConfig, PromptConfig
from tunix_gemma4.settings.sft import DataConfig, RunConfig

BUCKETS = (32, 64)
SQUARE = MeshConfig(fsdp=2, tp=2)
REWARDS = """
def length(prompts, completions, **_):
    return [float(len(said[0]["content"])) for said in completions]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """chat.jsonl of short rows and long ones, prompts.jsonl, and rewards.py."""
    folder = tmp_path_factory.mktemp("data")
    lines = {"chat": [], "prompts": []}
    for index in range(16):
        words = "What digit is this? " * (1 if index % 2 else 4)
        question = {"role": "user", "content": words}
        answer = {"role": "assistant", "content": str(index % 10)}
        lines["chat"].append({"messages": [question, answer]})
        lines["prompts"].append({"prompt": f"What is {index}?", "answer": str(index)})
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def common_settings(tiny_checkpoint, output, changes):
    """A short run on the tiny model."""
    defaults = {
        "model": str(tiny_checkpoint("demo")),
        "output_dir": str(output),
        "max_steps": 6,
        "eval_steps": 2,
        "num_train_epochs": None,
        "remat": "none",
        "report_to": "none",
        "text_only": True,
    }
    return defaults | changes


def test_the_count_notices_a_second_compilation():
    double = jax.jit(lambda x: 2 * x)
    with compiled_programs() as programs:
        double(jnp.zeros(3, jnp.int8))
        double(jnp.ones(3, jnp.int8))
        assert programs["jit(<lambda>)"] == 1
        double(np.zeros(4, np.int8))
    assert programs["jit(<lambda>)"] == 2


LORA = LoraConfig(rank=4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": LORA, "gradient_accumulation_steps": 2, "remat": "decoder"},
        {"lora": LoraConfig(rank=4, quantize="nf4"), "mesh": SQUARE},
        {"lora": LORA, "scan_layers": True, "mesh": SQUARE},
        {"mesh": SQUARE, "scan_layers": True},
    ],
    ids=["full", "lora", "qlora-mesh", "lora-stacked-mesh", "full-stacked-mesh"],
)
def test_supervised_steps_compile_once_per_bucket(changes, tiny_checkpoint, data, tmp_path):
    path = str(data / "chat.jsonl")
    source = DataConfig(
        path, eval_path=path, max_length=BUCKETS[1], bucket_lengths=list(BUCKETS), image_buckets=[0]
    )
    settings = common_settings(tiny_checkpoint, tmp_path / "run", changes)
    config = RunConfig(data=source, batch_size=4, **settings)
    with compiled_programs() as programs:
        result = sft.run(config)
    assert result.trainer.train_steps == 6
    assert programs["jit(step)"] == programs["jit(_eval_step)"] == len(BUCKETS)


@pytest.mark.parametrize(
    ("changes", "logps"),
    [
        # Log-probabilities of the policy, for the second iteration, and of the reference.
        ({"lora": LORA, "num_iterations": 2}, 2),
        ({"lora": LORA, "scan_layers": True, "mesh": SQUARE}, 1),
        ({"mesh": SQUARE}, 1),
    ],
    ids=["lora", "lora-stacked-mesh", "full-mesh"],
)
def test_rl_programs_compile_once(changes, logps, tiny_checkpoint, data, tmp_path):
    path = str(data / "prompts.jsonl")
    settings = common_settings(tiny_checkpoint, tmp_path / "run", changes)
    config = GrpoRunConfig(
        data=PromptConfig(path=path, eval_path=path, max_prompt_length=64),
        reward_functions=[f"{data / 'rewards.py'}:length"],
        num_generations=2,
        max_completion_length=4,
        batch_size=4,
        train_micro_batch_size=4,
        beta=0.02,
        **settings,
    )
    with compiled_programs() as programs:
        result = grpo.run(config)
    assert result.steps == 6
    assert programs["jit(step)"] == programs["jit(_eval_step)"] == programs["jit(_generate)"] == 1
    assert programs["jit(chunked_logps)"] == logps
