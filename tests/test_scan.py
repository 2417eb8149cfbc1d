# SPDX-License-Identifier: Apache-2.0
"""Stacked layers compute what single ones do, and lead back to them unchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from small_models import draw_images, draw_tokens, random_model

import tunix_gemma4
from tunix_gemma4 import LoraConfig, ModelConfig, apply_lora
from tunix_gemma4.losses import next_token_loss
from tunix_gemma4.model.gemma4 import stack_layers, unstack_layers
from tunix_gemma4.model.scan import block_patterns
from tunix_gemma4.sharding import shard_model

# Kinds of layers as the presets have them, repeated so that there is something to stack.
_LAYERS = {
    "e2b": {"layer_types": ["sliding_attention", "full_attention"] * 4, "num_kv_shared_layers": 4},
    "26b_a4b": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "31b": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
}


def deep_model(preset, **fields):
    layers = {"num_hidden_layers": len(_LAYERS[preset]["layer_types"])} | _LAYERS[preset]
    return random_model(preset, **layers, **fields)


def batch(config):
    tokens, padding = draw_tokens(config, "tttttttttttt..", "t(iiii)ttttttt", "tttttttttttttt")
    images = draw_images(config, [], [(2, 2)], [], count=1)
    mask = np.asarray(padding)
    return {"input_tokens": tokens, "input_mask": mask, "segment_ids": padding, "images": images}


@functools.cache
def step_of(kind):
    return nnx.jit(nnx.value_and_grad(next_token_loss, argnums=nnx.DiffState(0, kind)))


def loss_and_gradients(model, inputs, kind=nnx.Param):
    """The loss, and gradients by the name that the parameter has on a model of single layers."""
    loss, gradients = step_of(kind)(model, **inputs)
    model = nnx.clone(model)
    nnx.update(model, gradients)
    state = nnx.to_flat_state(nnx.state(unstack_layers(model), kind))
    return float(loss), {path: np.asarray(leaf[...]) for path, leaf in state}


def rounded(model):
    """The model with each weight rounded another way, which moves gradients by their noise."""
    draw = np.random.default_rng(0)

    def moved(leaf):
        ways = draw.choice(np.float32([-1, 1]), leaf.shape)
        return leaf * (1 + ways * jnp.finfo(jnp.float32).eps)

    model = nnx.clone(model)
    nnx.update(model, jax.tree.map(moved, nnx.state(model, nnx.Param)))
    return model


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("e2b", [(0, (4, 1), 3), (15, (4, 1), 4)]),
        ("e4b", [(0, (5, 1), 4), (24, (5, 1), 3)]),
        ("12b", [(0, (5, 1), 8)]),
        ("26b_a4b", [(0, (5, 1), 5)]),
        ("31b", [(0, (5, 1), 10)]),
    ],
)
def test_released_sizes_are_runs_of_blocks(size, expected):
    config = getattr(ModelConfig, f"gemma4_{size}")()
    assert [tuple(pattern) for pattern in block_patterns(config.layers)] == expected


def test_layers_that_never_repeat_are_one_block():
    types = ["sliding_attention"] * 2 + ["full_attention"] * 3
    config = random_model("31b", num_hidden_layers=5, layer_types=types).config
    assert [tuple(pattern) for pattern in block_patterns(config.layers)] == [(0, (2, 3), 1)]


@pytest.mark.parametrize(
    ("preset", "remat"), [("e2b", "decoder"), ("26b_a4b", "none"), ("31b", "decoder")]
)
def test_values_and_gradients_are_those_of_single_layers(preset, remat):
    single, stacked = (deep_model(preset, remat_config=remat) for _ in range(2))
    inputs = batch(single.config)
    expected_loss, expected = loss_and_gradients(single, inputs)
    moved = loss_and_gradients(rounded(single), inputs)[1]
    assert stack_layers(stacked) is stacked
    assert len(stacked.language_model.stacks) == len(block_patterns(single.config.layers))
    loss, found = loss_and_gradients(stacked, inputs)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    noise = max(np.abs(moved[path] - value).max() for path, value in expected.items())
    for path, value in expected.items():
        np.testing.assert_allclose(
            *(found[path], value), atol=max(2e-5 * largest, 3 * noise), err_msg=str(path)
        )


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_are_stacked_with_their_layers(quantize):
    def adapted():
        model = deep_model("e2b", remat_config="decoder")
        lora = LoraConfig(rank=4, targets="all", quantize=quantize)
        model = apply_lora(model, lora, rngs=nnx.Rngs(0))
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
            noise = np.random.default_rng(len(str(path))).normal(size=leaf.shape)
            leaf[...] = leaf[...] + jnp.asarray(0.02 * noise, leaf.dtype)
        return model

    single = adapted()
    inputs = batch(single.config)
    expected_loss, expected = loss_and_gradients(single, inputs, nnx.LoRAParam)
    loss, found = loss_and_gradients(stack_layers(adapted()), inputs, nnx.LoRAParam)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    largest = max(np.abs(value).max() for value in expected.values())
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=2e-5 * largest, err_msg=str(path))


def test_unstacking_gives_the_model_back():
    model, original = deep_model("e2b"), deep_model("e2b")
    unstack_layers(stack_layers(model))
    graphdef, state = nnx.split(model)
    expected_graphdef, expected = nnx.split(original)
    assert graphdef == expected_graphdef
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_a_cache_and_hidden_states_see_the_same_layers():
    single, stacked = deep_model("e2b"), stack_layers(deep_model("e2b"))
    tokens, _ = draw_tokens(single.config, "tttttttt")
    for keep in (False, True):
        cache = single.init_cache(1, 8, jnp.float32) if not keep else None
        expected, _ = single(tokens, cache=cache, output_hidden_states=keep)
        found, _ = stacked(tokens, cache=cache, output_hidden_states=keep)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    kept = [nnx.pop(model, nnx.Intermediate)["all_hidden_states"] for model in (single, stacked)]
    assert [len(hidden.get_raw_value()) for hidden in kept] == [8, 8]


def test_stacks_are_sharded_as_their_layers_are():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tp"))
    single = shard_model(deep_model("e2b"), mesh)
    inputs = batch(single.config)
    inputs = {name: np.repeat(value, 4, axis=0)[:8] for name, value in inputs.items()}
    stacked = stack_layers(shard_model(deep_model("e2b"), mesh))
    kernel = stacked.language_model.stacks[0].layers[0].mlp.up_proj.kernel
    assert kernel[...].sharding.spec == PartitionSpec(None, None, "fsdp", "tp")
    with mesh:
        expected, found = (loss_and_gradients(model, inputs) for model in (single, stacked))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def test_layers_with_different_adapters_are_refused():
    model = deep_model("31b")
    model = apply_lora(model, LoraConfig(targets=r".*layers\.0\.mlp\.up_proj"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layers 0 and 1"):
        stack_layers(model)


@pytest.mark.parametrize("ask", ["apply_lora", "save_checkpoint", "save_adapter", "merge_lora"])
def test_what_names_single_layers_refuses_stacks(ask, tmp_path):
    model = stack_layers(deep_model("31b"))
    arguments = [tmp_path / "out"] if ask.startswith("save") else []
    with pytest.raises(ValueError, match=r"unstack_layers\(model\) first"):
        getattr(tunix_gemma4, ask)(model, *arguments)
    assert not list(tmp_path.iterdir())
