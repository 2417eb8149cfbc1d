# SPDX-License-Identifier: Apache-2.0
"""Every composition of shipped recipes says what can run; of reinforcement learning it fits."""

import functools
import itertools
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
from tunix_gemma4.settings.load_config import recipe_names
from tunix_gemma4.settings.sft import load_run_config
from tunix_gemma4.sharding import param_shardings

ROOT = Path(__file__).parents[1] / "configs"
OF = {
    folder: [name.split("/")[1] for name in recipe_names() if name.startswith(f"{folder}/")]
    for folder in ("sft", "grpo", "sizes", "hardware")
}
CHIPS = {"1gpu": 1, "8gpu": 8, "v5e-8": 8, "v5p-8": 4, "v6e-8": 8}
DATA = ["data.path=train.jsonl"]


def is_missing(task, size, hardware):
    """12B takes no images, and 31B would leave no room on chips of 16 GB."""
    return (size == "12b" and "image" in task) or (task, size, hardware) in (
        *(("gsm8k", "31b", "v5e-8"), ("images", "31b", "v5e-8")),
    )


GRPO = list(itertools.product(OF["grpo"], OF["sizes"], OF["hardware"]))


@functools.cache
def adapted(size, text_only):
    """The abstract model of a released size with the adapters of the configs."""
    factory = getattr(ModelConfig, f"gemma4_{size.replace('-', '_')}")
    model = abstract_model(factory(text_only=text_only))
    return model, apply_lora(model, LoraConfig(rank=16, alpha=32, targets="language"))


def header(folder, name):
    return (ROOT / folder / f"{name}.yaml").read_text().splitlines()[0]


def test_every_size_and_machine_is_there():
    assert set(OF["sizes"]) == {"e2b", "e4b", "12b", "26b-a4b", "31b"}
    assert set(OF["hardware"]) == CHIPS.keys()
    assert len(recipe_names()) == 16


@pytest.mark.parametrize("words", GRPO, ids="_".join)
def test_config_fits_its_model_and_its_chips(words):
    task, size, hardware = words
    if is_missing(*words):
        with pytest.raises(ValueError, match=r"12B takes text only|leave no room on eight chips"):
            load_grpo_config(words, DATA)
        return
    config = load_grpo_config(words, DATA)
    assert config.output_dir == f"outputs/{'_'.join(words)}"
    assert config.text_only == (task == "gsm8k")
    assert config.loss_type == ("gspo" if size == "26b-a4b" else "grpo")
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
    memory = [float(found) for found in re.findall(r"(\d+) GB", header("hardware", hardware))]
    large = size in ("26b-a4b", "31b")
    weights = [float(found) for found in re.findall(r"\d+\.\d", header("sizes", size))]
    expected = weights[0 if config.text_only else 1] / mesh.size
    # Adapters, in float32, come on top of what the header says.
    assert expected * 0.97 < share / 1e9 < expected * 1.1 + 0.3
    # The rest is for caches, activations and the adapters' optimizer.
    assert share / 1e9 < 0.5 * memory[-1 if large else 0]


@pytest.mark.parametrize("task", OF["sft"])
def test_supervised_tasks_go_with_every_size_and_machine(task):
    for size, hardware in itertools.product(OF["sizes"], [None, *OF["hardware"]]):
        words = [task, size, *([] if hardware is None else [hardware])]
        if is_missing(task, size, None):
            with pytest.raises(ValueError, match=r"12b\.yaml: with \*image\*: 12B takes text only"):
                load_run_config(words, DATA)
            continue
        config = load_run_config(words, DATA)
        assert config.output_dir == f"outputs/{'_'.join(words)}"
        assert config.text_only == (task == "lora-text")
        assert (config.lora is None) == (task == "full-image")
        if hardware is not None:
            assert config.mesh.fsdp * config.mesh.tp == CHIPS[hardware]
        # Large models and all parameters want smaller steps than an adapter of a small one.
        small = size in ("e2b", "e4b")
        assert config.learning_rate == (1e-5 if config.lora is None else 2e-4 if small else 1e-4)
