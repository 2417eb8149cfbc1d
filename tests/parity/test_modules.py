# SPDX-License-Identifier: Apache-2.0
"""Every module against its twin in transformers, float32, within 1e-5.

When a whole model disagrees, the module at fault is the one that fails here.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4 import modeling_gemma4 as hf_code

from tunix_gemma4.model import layers
from tunix_gemma4.model.masks import AttentionMask, attention_masks
from tunix_gemma4.model.vision import pool

from . import oracle

pytestmark = pytest.mark.parity
B, T = 2, 14


@pytest.fixture(scope="module")
def pair():
    """`pair(size) -> config, transformers model, our model`, with a tower where there is one."""
    built = {}

    def build(size):
        if size not in built:
            config = oracle.our_config(size, images=size in oracle.IMAGE_SIZES)
            hf = oracle.hf_model(config)
            hf.requires_grad_(False)
            built[size] = config, hf, oracle.our_model(config, hf)
        return built[size]

    return build


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_close(ours, theirs, *, tolerance=1e-5):
    """Within `tolerance` of the largest value, or of 1 where all are smaller."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs).max()
    assert difference <= tolerance * max(1.0, np.abs(theirs).max()), difference


def half(cos_sin):
    """Transformers' cosines and sines hold each angle twice; ours once."""
    return tuple(jnp.asarray(part.numpy()[..., : part.shape[-1] // 2]) for part in cos_sin)


# ---- Norms, projections, MLPs.


def test_rms_norm_equals_transformers(pair):
    _, hf, ours = pair("e2b")
    x = random(B, T, 48) * 30
    text, our_text = hf.model.language_model, ours.language_model
    assert_close(our_text.norm(jnp.asarray(x)), text.norm(torch.from_numpy(x)))


def test_rms_norm_without_scale_equals_transformers(pair):
    _, hf, ours = pair("e2b")
    x = random(B, T, 2, 16) * 30
    norm = ours.language_model.layers[0].self_attn.v_norm
    theirs = hf.model.language_model.layers[0].self_attn.v_norm(torch.from_numpy(x))
    assert_close(norm(jnp.asarray(x)), theirs)


@pytest.mark.parametrize("layer", [0, 4], ids=["plain", "double_wide"])
def test_mlp_equals_transformers(pair, layer):
    _, hf, ours = pair("e2b")
    assert ours.language_model.layers[layer].mlp.up_proj.kernel.shape == (48, 160 if layer else 80)
    x = random(B, T, 48)
    theirs = hf.model.language_model.layers[layer].mlp(torch.from_numpy(x))
    assert_close(ours.language_model.layers[layer].mlp(jnp.asarray(x)), theirs)


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_clippable_linear_equals_transformers(pair, part):
    _, hf, ours = pair("e2b")
    block, name = part.split(".")
    theirs = getattr(getattr(hf.model.vision_tower.encoder.layers[1], block), name)
    mine = getattr(getattr(ours.vision_tower.encoder.layers[1], block), name)
    x = random(B, T, theirs.linear.in_features)
    assert_close(mine(jnp.asarray(x)), theirs(torch.from_numpy(x)))


# ---- Rotary embeddings.


@pytest.mark.parametrize("kind", [oracle.SLIDING, oracle.FULL])
def test_released_rope_frequencies_equal_transformers(kind):
    # The released sizes; two units in the last place, since the two libraries' powers differ.
    theirs = hf_code.Gemma4TextRotaryEmbedding(Gemma4TextConfig())
    theirs = theirs.get_buffer(f"{kind}_inv_freq").numpy()
    size, theta, fraction = {
        oracle.SLIDING: (256, 10_000.0, 1.0),
        oracle.FULL: (512, 1_000_000.0, 0.25),
    }[kind]
    ours = layers.frequencies(size, theta, fraction=fraction)
    assert ours.shape == theirs.shape == (size // 2,)
    assert np.count_nonzero(ours) == {256: 128, 512: 64}[size]
    np.testing.assert_allclose(ours, theirs, rtol=2.4e-7, atol=0)


@pytest.mark.parametrize("layer", [0, 1], ids=["sliding", "full"])
def test_text_rope_equals_transformers(pair, layer):
    config, hf, _ = pair("e2b")
    spec = config.layers[layer]
    positions = np.stack([np.arange(T), np.arange(T) + 83])
    x = random(B, T, 4, spec.head_dim)
    kind = config.layer_types[layer]
    cos, sin = hf.model.language_model.rotary_emb(
        torch.from_numpy(x), torch.from_numpy(positions), kind
    )
    theirs = hf_code.apply_rotary_pos_emb(torch.from_numpy(x), cos, sin, unsqueeze_dim=2)
    frequency = layers.frequencies(spec.head_dim, spec.rope_theta, fraction=spec.rope_fraction)
    ours = layers.rotate(jnp.asarray(x), layers.angles(jnp.asarray(positions), frequency))
    assert_close(ours, theirs)


@pytest.mark.parametrize("size", ["e2b", "31b"], ids=["head_8", "head_12"])
def test_vision_rope_equals_transformers(pair, size):
    config, hf, _ = pair(size)
    tower = config.vision_config
    places = oracle.random_image(6, 9, seed=0)[None, :54, -2:].astype(np.int64)
    x = random(1, 54, tower.num_attention_heads, tower.head_dim)
    rotary = hf.model.vision_tower.encoder.rotary_emb
    cos, sin = rotary(torch.from_numpy(x), torch.from_numpy(places))
    theirs = hf_code.apply_multidimensional_rope(
        torch.from_numpy(x), cos, sin, torch.from_numpy(places)
    )
    frequency = layers.frequencies(tower.head_dim // 2, tower.rope_theta)
    by_axis = [layers.angles(jnp.asarray(places[..., axis]), frequency) for axis in (0, 1)]
    assert_close(layers.rotate_2d(jnp.asarray(x), *by_axis), theirs)


# ---- Masks, attention, layers.


@pytest.mark.parametrize("size", oracle.IMAGE_SIZES)
def test_masks_equal_the_prepared_ones(pair, size):
    config, _, ours = pair(size)
    inputs = oracle.image_inputs()
    tokens = jnp.asarray(inputs.tokens)
    visible = ours.get_attention_mask(tokens, inputs_mask=jnp.asarray(inputs.mask))
    masks = attention_masks(config, tokens, visible)
    whole = (0, tokens.shape[1])
    expected = oracle.prepared_masks(config, inputs)
    for name, kind in ((oracle.SLIDING, "sliding"), (oracle.FULL, "full")):
        found = np.asarray(masks[kind].block(whole, whole))
        theirs = (expected[name] == 0).numpy()[:, 0]
        np.testing.assert_array_equal(found[inputs.real], theirs[inputs.real], err_msg=name)


def attention_inputs(config, hf, layer):
    """x, transformers' angles and additive mask, and the same for ours."""
    x = random(B, T, config.hidden_size)
    positions = torch.arange(T)[None].expand(B, T)
    kind = config.layer_types[layer]
    cos_sin = hf.model.language_model.rotary_emb(torch.from_numpy(x), positions, kind)
    apart = np.arange(T)[:, None] - np.arange(T)[None, :]
    window = config.sliding_window if kind == oracle.SLIDING else T
    visible = np.broadcast_to((apart >= 0) & (apart < window), (B, T, T))
    added = torch.where(torch.from_numpy(visible.copy())[:, None], 0.0, torch.finfo().min)
    return x, cos_sin, added, half(cos_sin), AttentionMask(jnp.asarray(visible))


@pytest.mark.parametrize(
    ("size", "layer"),
    [("e2b", 0), ("e2b", 1), ("31b", 0), ("31b", 2), ("26b_a4b", 4)],
    ids=["one_kv_head", "full", "sliding", "k_eq_v", "k_eq_v_one_kv_head"],
)
def test_attention_equals_transformers(pair, size, layer):
    config, hf, ours = pair(size)
    x, cos_sin, added, our_cos_sin, visible = attention_inputs(config, hf, layer)
    attention = hf.model.language_model.layers[layer].self_attn
    theirs, _ = attention(torch.from_numpy(x), cos_sin, added, {})
    mine = ours.language_model.layers[layer].self_attn
    result, _, cache = mine(jnp.asarray(x), our_cos_sin, visible, None, None)
    assert cache is None
    assert_close(result, theirs)


@pytest.mark.parametrize("layer", [4, 5], ids=["sliding", "full"])
def test_attention_of_a_sharing_layer_equals_transformers(pair, layer):
    config, hf, ours = pair("e2b")
    spec = config.layers[layer]
    assert spec.shares_kv
    x, cos_sin, added, our_cos_sin, visible = attention_inputs(config, hf, layer)
    k, v = (random(B, T, spec.num_kv_heads, spec.head_dim, seed=seed) for seed in (1, 2))
    shared = tuple(torch.from_numpy(array).transpose(1, 2) for array in (k, v))
    theirs, _ = hf.model.language_model.layers[layer].self_attn(
        torch.from_numpy(x), cos_sin, added, {config.layer_types[layer]: shared}
    )
    mine = ours.language_model.layers[layer].self_attn
    result, _, _ = mine(
        jnp.asarray(x), our_cos_sin, visible, None, (jnp.asarray(k), jnp.asarray(v))
    )
    assert_close(result, theirs)


@pytest.mark.parametrize("size", ["e2b", "26b_a4b"], ids=["per_layer_input", "experts"])
def test_decoder_layer_equals_transformers(pair, size):
    config, hf, ours = pair(size)
    x, cos_sin, added, our_cos_sin, visible = attention_inputs(config, hf, 0)
    extra = random(B, T, 8, seed=5) if size == "e2b" else None
    theirs = hf.model.language_model.layers[0](
        torch.from_numpy(x),
        None if extra is None else torch.from_numpy(extra),
        shared_kv_states={},
        position_embeddings=cos_sin,
        attention_mask=added,
    )
    result, _, _ = ours.language_model.layers[0](
        jnp.asarray(x),
        None if extra is None else jnp.asarray(extra),
        our_cos_sin,
        visible,
        None,
        None,
    )
    assert_close(result, theirs)


def test_router_and_experts_equal_transformers(pair):
    config, hf, ours = pair("26b_a4b")
    layer, our_layer = hf.model.language_model.layers[1], ours.language_model.layers[1]
    x = random(40, config.hidden_size) * 3
    _, weights, indices = layer.router(torch.from_numpy(x))
    our_weights, our_indices = our_layer.router(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(our_indices), indices.numpy())
    assert len(np.unique(indices)) > config.top_k_experts
    assert_close(our_weights, weights)

    mixed = random(40, config.hidden_size, seed=1)
    theirs = layer.experts(torch.from_numpy(mixed), indices, weights)
    rows = (x[None] for x in (jnp.asarray(mixed), our_weights, our_indices))
    assert_close(our_layer.experts(*rows)[0], theirs)


def test_per_layer_inputs_equal_transformers(pair):
    _, hf, ours = pair("e2b")
    tokens = oracle.text_inputs().tokens
    x = random(*tokens.shape, 48)
    text = hf.model.language_model
    of_tokens = text.get_per_layer_inputs(torch.from_numpy(tokens).long(), None)
    theirs = text.project_per_layer_inputs(torch.from_numpy(x), of_tokens)
    assert_close(ours.language_model.per_layer_inputs(jnp.asarray(tokens), jnp.asarray(x)), theirs)


# ---- The vision tower.


def batch_of_images():
    """Three images of different sizes, the last one filling every patch."""
    grids = [(6, 9), (3, 12), (9, 9)]
    return np.stack([oracle.random_image(*grid, seed=index) for index, grid in enumerate(grids)])


def split_images(images):
    """Pixels, positions and padding as transformers takes them."""
    pixels, places = torch.from_numpy(images[..., :-2]), torch.from_numpy(images[..., -2:]).long()
    return pixels, places, (places == -1).all(dim=-1)


def test_patch_embedder_equals_transformers(pair):
    _, hf, ours = pair("e2b")
    images = batch_of_images()
    pixels, places, padding = split_images(images)
    theirs = hf.model.vision_tower.patch_embedder(pixels, places, padding)
    result = ours.vision_tower.patch_embedder(
        jnp.asarray(images[..., :-2]), jnp.asarray(places.numpy()), jnp.asarray(~padding.numpy())
    )
    assert_close(result, theirs)


def test_pooler_equals_transformers(pair):
    _, hf, _ = pair("e2b")
    images = batch_of_images()
    _, places, padding = split_images(images)
    x = random(3, oracle.PATCHES, 32)
    theirs, filled = hf.model.vision_tower.pooler(
        torch.from_numpy(x), places, padding, oracle.PATCHES // 9
    )
    result, our_filled = pool(
        jnp.asarray(x), jnp.asarray(places.numpy()), jnp.asarray(~padding.numpy()), kernel=3
    )
    np.testing.assert_array_equal(np.asarray(our_filled), filled.numpy())
    assert_close(result * 32**0.5, theirs)


@pytest.mark.parametrize("size", oracle.IMAGE_SIZES)
def test_vision_tower_and_projector_equal_transformers(pair, size):
    _, hf, ours = pair(size)
    images = batch_of_images()
    pixels, places, _ = split_images(images)
    features, projected = oracle.image_features(hf, pixels, places)
    soft, valid = ours.vision_tower(jnp.asarray(images))
    valid = np.asarray(valid)
    assert valid.sum(axis=1).tolist() == [6, 4, 9]
    assert_close(np.asarray(soft)[valid], features)
    assert_close(np.asarray(ours.embed_vision(soft))[valid], projected)
