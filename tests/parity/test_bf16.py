# SPDX-License-Identifier: Apache-2.0
"""bfloat16: which convention holds where, and how far from transformers' bfloat16 it leads."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tunix_gemma4.model import layers

from . import oracle

pytestmark = pytest.mark.parity


def bf16_pair(size, *, images=False):
    """Config, transformers in bfloat16, and ours with its weights and activations in bfloat16."""
    config = oracle.our_config(size, images=images, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    hf = oracle.hf_model(config).to(torch.bfloat16).requires_grad_(False)
    return config, hf, oracle.our_model(config, hf)


def as_torch(x):
    return torch.from_numpy(np.asarray(x, np.float32)).to(torch.bfloat16)


def random(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.bfloat16)


def assert_identical(ours, theirs):
    assert ours.dtype == jnp.bfloat16 and theirs.dtype == torch.bfloat16
    np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.float().numpy())


def test_embeddings_are_scaled_by_the_root_rounded_to_bf16_as_in_transformers():
    _, hf, ours = bf16_pair("e2b")
    tokens = oracle.text_inputs().tokens
    assert float(jnp.asarray(48**0.5, jnp.bfloat16)) != np.float32(48**0.5)
    theirs = hf.model.language_model.embed_tokens(torch.from_numpy(tokens).long())
    assert_identical(ours.language_model.embed(jnp.asarray(tokens)), theirs)


def test_norms_run_in_float32_and_round_once_as_in_transformers():
    _, hf, ours = bf16_pair("e2b")
    x = random(4, 48) * 100
    theirs = hf.model.language_model.norm(as_torch(x))
    result = ours.language_model.norm(x)
    # The two mean squares are summed in different orders, so a tie may round either way.
    unequal = np.asarray(result, np.float32) != theirs.float().numpy()
    assert result.dtype == jnp.bfloat16
    assert unequal.mean() < 0.01


def test_router_runs_in_float32_where_transformers_uses_bf16():
    _, hf, ours = bf16_pair("26b_a4b")
    x = random(64, 48)
    weights, _ = ours.language_model.layers[0].router(x)
    exact = hf.model.language_model.layers[0].router.float()(as_torch(x).float())[1]
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(weights), exact.numpy(), atol=1e-5)


def test_heads_are_rotated_in_float32_and_rounded_once():
    x = random(1, 9, 2, 16)
    positions = jnp.arange(1000, 1009)[None]
    turning = layers.angles(positions, layers.frequencies(16, 10_000.0))
    exact = layers.rotate(x.astype(jnp.float32), turning)
    np.testing.assert_array_equal(
        np.asarray(layers.rotate(x, turning), np.float32),
        np.asarray(exact.astype(jnp.bfloat16), np.float32),
    )


def test_logits_leave_the_head_in_float32_and_are_capped_there():
    config, hf, ours = bf16_pair("e2b")
    hidden = random(32, 48)
    logits = np.asarray(ours.compute_final_logits(hidden))
    assert logits.dtype == np.float32
    weight = hf.lm_head.weight.float()
    exact = as_torch(hidden).float() @ weight.T
    cap = config.final_logit_softcapping
    np.testing.assert_allclose(logits, (torch.tanh(exact / cap) * cap).numpy(), atol=1e-5)


@pytest.mark.parametrize(("size", "images"), [("e2b", True), ("26b_a4b", False), ("31b", True)])
def test_bf16_logits_are_as_near_to_float32_as_transformers_are(size, images):
    config, hf, ours = bf16_pair(size, images=images)
    inputs = oracle.image_inputs() if images else oracle.text_inputs()
    theirs = oracle.hf_logits(hf, config, inputs)
    exact = oracle.hf_logits(hf.float(), config, inputs)
    result = oracle.our_logits(ours, inputs)

    our_error, their_error = np.abs(result - exact), np.abs(theirs - exact)
    oracle.log(
        f"{size} bf16: median |difference| ours to float32 {np.median(our_error):.4f}, "
        f"theirs to float32 {np.median(their_error):.4f}, "
        f"ours to theirs {np.median(np.abs(result - theirs)):.4f}; largest "
        f"{our_error.max():.3f}, {their_error.max():.3f}, {np.abs(result - theirs).max():.3f}"
    )
    # The median, because an expert chosen differently moves single tokens far, on either side.
    assert np.median(our_error) <= 1.1 * np.median(their_error)
