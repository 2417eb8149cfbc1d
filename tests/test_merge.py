# SPDX-License-Identifier: Apache-2.0
"""Merging adapters back into plain kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import draw_images, draw_tokens, forward, random_model

from tunix_gemma4.checkpoint import load_checkpoint, save_checkpoint
from tunix_gemma4.lora import LoraConfig, apply_lora, load_adapter, merge_lora, save_adapter
from tunix_gemma4.lora.adapters import adapted
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration
from tunix_gemma4.sharding import shard_model


def model_and_inputs(preset="demo", **fields):
    model = random_model(preset, text_only=False, **fields)
    tokens, _ = draw_tokens(model.config, "t(ii)tt(iiii)ttttt")
    return model, {"tokens": tokens, "images": draw_images(model.config, [(2, 1), (2, 2)])}


def trained(model, *, size=0.1, **fields):
    """`model` with adapters whose B is not zero any more."""
    lora = apply_lora(model, LoraConfig(**({"targets": "all", "rank": 4} | fields)))
    for index, module in enumerate(adapted(lora).values()):
        b = module.kernel_lora_b
        b[...] = size * jax.random.normal(jax.random.key(index), b.shape)
    return lora


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_a_merged_model_computes_what_the_adapted_one_does(quantize):
    model, inputs = model_and_inputs()
    lora = trained(model, quantize=quantize)
    adapted_logits = np.asarray(forward(lora, **inputs)[0])
    merged_logits = np.asarray(forward(merge_lora(lora), **inputs)[0])
    largest = np.abs(adapted_logits).max()
    assert np.abs(merged_logits - adapted_logits).max() <= 1e-5 * largest
    assert np.abs(merged_logits - forward(model, **inputs)[0]).max() > 1e-2 * largest


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_merged_model_is_built_as_the_base_is(quantize):
    model, _ = model_and_inputs(param_dtype=jnp.bfloat16)
    merged = merge_lora(trained(model, quantize=quantize))
    assert type(merged) is Gemma4ForConditionalGeneration
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    for found, expected in zip(*map(variables, (merged, model)), strict=True):
        assert type(found) is nnx.Param
        assert found.dtype == expected.dtype
        assert found.get_metadata() == expected.get_metadata()
    again = apply_lora(merged, LoraConfig(quantize=quantize))
    assert adapted(again)


def variables(model):
    return [variable for _, variable in nnx.to_flat_state(nnx.state(model))]


def test_the_update_is_rounded_once():
    linear = nnx.Linear(32, 16, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self):
            self.layer = linear

    lora = trained(Model(), targets="layer", alpha=6)
    a, b = (np.float64(leaf) for leaf in jax.tree.leaves(nnx.state(lora, nnx.LoRAParam)))
    expected = np.float64(linear.kernel[...]) + 6 / 4 * a @ b
    merged = merge_lora(lora).layer.kernel[...]
    assert merged.dtype == jnp.bfloat16
    spacing = 2.0 ** (np.floor(np.log2(np.abs(expected))) - 7)
    assert (np.abs(np.float64(merged) - expected) <= 0.5001 * spacing).all()


def test_the_adapted_model_is_left_as_it_is():
    model, inputs = model_and_inputs()
    lora = trained(model)
    before = forward(lora, **inputs)[0]
    merge_lora(lora)
    np.testing.assert_array_equal(forward(lora, **inputs)[0], before)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merged_kernels_stay_on_their_mesh(quantize):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model, _ = model_and_inputs()
    expected = merge_lora(trained(model, quantize=quantize))
    sharded = shard_model(nnx.clone(model), mesh)
    merged = merge_lora(trained(sharded, quantize=quantize))
    for found, placed, alone in zip(*map(variables, (merged, sharded, expected)), strict=True):
        assert found.get_raw_value().sharding == placed.get_raw_value().sharding
        np.testing.assert_allclose(found[...], alone[...], rtol=0, atol=1e-6)


def test_a_model_without_adapters_is_refused():
    model, _ = model_and_inputs()
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(model)


def test_a_merged_model_survives_a_checkpoint(tiny_checkpoint, tmp_path):
    model = load_checkpoint(tiny_checkpoint("e2b"), text_only=False)
    tokens, _ = draw_tokens(model.config, "t(ii)ttttt")
    inputs = {"tokens": tokens, "images": draw_images(model.config, [(2, 1)])}
    lora = trained(model)
    merged = merge_lora(lora)
    save_checkpoint(merged, tmp_path / "merged")
    loaded = load_checkpoint(tmp_path / "merged", text_only=False)
    found, kept, expected = (np.asarray(forward(m, **inputs)[0]) for m in (loaded, merged, lora))
    np.testing.assert_array_equal(found, kept)
    # A whole model, images included: sums in another order move it by some 1e-5.
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_an_adapted_model_is_no_checkpoint_until_it_is_merged(tiny_checkpoint, tmp_path):
    lora = trained(load_checkpoint(tiny_checkpoint("e2b")), targets="language")
    with pytest.raises(ValueError, match="merge_lora"):
        save_checkpoint(lora, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_saving_loading_and_merging_adapters_are_the_same_update(tmp_path):
    model, inputs = model_and_inputs()
    lora = trained(model, alpha=3, use_rslora=True)
    save_adapter(lora, tmp_path / "adapter")
    loaded = load_adapter(model, tmp_path / "adapter")
    np.testing.assert_array_equal(forward(loaded, **inputs)[0], forward(lora, **inputs)[0])
    assert next(iter(adapted(loaded).values())).lora.use_rslora
