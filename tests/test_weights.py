# SPDX-License-Identifier: Apache-2.0
"""The rule between our variables and the tensors of a checkpoint."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import random_model

from tunix_gemma4.checkpoint import names as weights
from tunix_gemma4.model.gemma4 import abstract_model
from tunix_gemma4.testing.tiny import tensor_shapes, tiny_config, tiny_hf_config

PRESETS = ("e2b", "e4b", "12b", "26b_a4b", "31b", "demo")
LAYER = ("language_model", "layers", 3)


@pytest.mark.parametrize(
    ("path", "name", "swapped"),
    [
        ((*LAYER, "self_attn", "q_proj", "kernel"), "layers.3.self_attn.q_proj.weight", True),
        ((*LAYER, "mlp", "down_proj", "kernel"), "layers.3.mlp.down_proj.weight", True),
        ((*LAYER, "experts", "down_proj"), "layers.3.experts.down_proj", True),
        ((*LAYER, "router", "scale"), "layers.3.router.scale", False),
        ((*LAYER, "input_layernorm", "weight"), "layers.3.input_layernorm.weight", False),
        (("language_model", "embed_tokens", "embedding"), "embed_tokens.weight", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_name_and_layout_of_a_variable_follow_from_its_path(path, name, swapped):
    assert weights.hf_name(path) == f"model.language_model.{name}"
    assert weights.is_swapped(path) is swapped
    assert weights.hf_shape(path, (4, 2, 3)) == ((4, 3, 2) if swapped else (4, 2, 3))


def test_module_name_is_the_tensor_name_without_its_leaf():
    path = (*LAYER, "self_attn", "q_proj", "kernel")
    assert weights.module_name(path) == "model.language_model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_are_those_that_transformers_saves(preset):
    model = abstract_model(tiny_config(preset))
    found = {
        name: weights.hf_shape(path, variable.get_raw_value().shape)
        for name, (path, variable) in weights.named_parameters(model).items()
    }
    buffers = {name: buffer.shape for name, buffer in weights.named_buffers(model).items()}
    assert not found.keys() & buffers.keys()
    assert found | buffers == tensor_shapes(tiny_hf_config(preset))


def test_every_variable_has_a_name_of_its_own():
    model = abstract_model(tiny_config("26b_a4b"))
    assert len(weights.named_parameters(model)) == len(nnx.to_flat_state(nnx.state(model)))


def test_layout_to_the_checkpoint_and_back_is_the_identity_without_a_copy():
    array = np.arange(24).reshape(2, 3, 4)
    for path in ((*LAYER, "experts", "gate_up_proj"), (*LAYER, "mlp", "up_proj", "kernel")):
        there = weights.to_hf(path, array)
        assert there.shape == (2, 4, 3)
        assert np.shares_memory(there, array)
        np.testing.assert_array_equal(weights.from_hf(path, there), array)


def test_buffers_become_plain_numbers_and_keep_their_values():
    model = random_model("26b_a4b")
    for buffer in weights.named_buffers(model).values():
        before = weights.buffer_array(buffer)
        assert before.shape == buffer.shape
        weights.set_buffer(buffer, before.astype(np.float32) * 2)
        np.testing.assert_allclose(weights.buffer_array(buffer), before * 2, rtol=1e-6)
        value = getattr(buffer.module, buffer.attribute)
        assert type(value) is (float if before.size == 1 else tuple)
        assert all(type(number) is float for number in np.atleast_1d(value).tolist())


def test_buffers_are_not_variables():
    model = random_model("e2b")
    assert weights.named_buffers(model)
    assert not weights.named_buffers(model).keys() & weights.named_parameters(model).keys()


def test_unmerged_names_adapters_and_kernels_that_are_not_floats():
    model = random_model("demo")
    assert weights.unmerged(model) == []
    attention = model.language_model.layers[0].self_attn
    attention.q_proj.kernel_lora_a = nnx.LoRAParam(jnp.ones((2, 2)))
    attention.k_proj.kernel = nnx.Param(jnp.ones((2, 2), jnp.int8))
    prefix = "language_model.layers.0.self_attn."
    assert sorted(weights.unmerged(model)) == [
        f"{prefix}k_proj.kernel",
        f"{prefix}q_proj.kernel_lora_a",
    ]
