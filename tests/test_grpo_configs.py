# SPDX-License-Identifier: Apache-2.0
"""Every shipped YAML of reinforcement learning fits the model, the mesh and the chips it names."""

import functools
import math
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

from tunix_gemma4 import LoraConfig, ModelConfig, apply_lora
from tunix_gemma4.model.gemma4 import abstract_model
from tunix_gemma4.recipes.common import device_mesh
from tunix_gemma4.settings.grpo import load_grpo_config
from tunix_gemma4.sharding import param_shardings

CONFIGS = sorted((Path(__file__).parents[1] / "configs" / "grpo").glob("*.yaml"))
NAME = re.compile(r"(e2b|e4b|12b|26b_a4b|31b)_(gsm8k|images)_(1gpu|8gpu|v5e8|v5p8|v6e8)")
CHIPS = {"1gpu": 1, "8gpu": 8, "v5e8": 8, "v5p8": 4, "v6e8": 8}
# 12B takes no images, and 31B would leave no room on chips of 16 GB.
MISSING = {
    *(("12b", "images", hardware) for hardware in CHIPS),
    *(("31b", task, "v5e8") for task in ("gsm8k", "images")),
}


def parts(path):
    return NAME.fullmatch(path.stem).groups()


@functools.cache
def adapted(size, text_only):
    """The abstract model of a released size with the adapters of the configs."""
    factory = {
        "e2b": ModelConfig.gemma4_e2b,
        "e4b": ModelConfig.gemma4_e4b,
        "12b": ModelConfig.gemma4_12b,
        "26b_a4b": ModelConfig.gemma4_26b_a4b,
        "31b": ModelConfig.gemma4_31b,
    }[size]
    model = abstract_model(factory(text_only=text_only))
    return model, apply_lora(model, LoraConfig(rank=16, alpha=32, targets="language"))


def read(path):
    """The settings, as the command in the file's second line gives them."""
    command = path.read_text().splitlines()[1]
    assert command.startswith(f"#   tunix-gemma4 grpo configs/grpo/{path.name} model=")
    return load_grpo_config(path, [word for word in command.split() if "=" in word])


def test_there_is_one_for_every_size_task_and_hardware_that_fit():
    sizes, tasks = ("e2b", "e4b", "12b", "26b_a4b", "31b"), ("gsm8k", "images")
    wanted = {(size, task, chips) for size in sizes for task in tasks for chips in CHIPS}
    found = [parts(path) for path in CONFIGS]
    assert set(found) == wanted - MISSING
    assert len(found) == 43


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_fits_its_model_and_its_chips(path):
    size, task, hardware = parts(path)
    config = read(path)
    assert config.output_dir == f"outputs/{path.stem}"
    assert config.text_only == (task == "gsm8k")
    assert config.lora == LoraConfig(rank=16, alpha=32, targets="language")
    mesh = device_mesh(config.mesh)
    assert mesh.size == CHIPS[hardware]
    base, policy = adapted(size, config.text_only)
    heads = [base.config.num_attention_heads]
    if not config.text_only:
        heads.append(base.config.vision_config.num_attention_heads)
    assert not [count for count in heads if count % config.mesh.tp]

    state = nnx.state(policy)
    shardings = jax.tree.leaves(param_shardings(state, mesh))
    share = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(state), shardings, strict=True)
    )
    memory, weights = map(
        float, re.search(r"of (\d+) GB: ([\d.]+) GB of weights", path.read_text()).groups()
    )
    # Adapters, in float32, come on top of what the header says.
    assert weights * 0.97 < share / 1e9 < weights * 1.1 + 0.3
    # The rest is for caches, activations and the adapters' optimizer.
    assert share / 1e9 < 0.5 * memory
