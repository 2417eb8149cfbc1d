# SPDX-License-Identifier: Apache-2.0
"""Attention a block of queries at a time: the same as all at once, at a cost that windows bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_logits_agree, draw_images, draw_tokens, random_model

from tunix_gemma4.model import attention
from tunix_gemma4.model.attention import attend, attend_blocks, block_groups
from tunix_gemma4.model.masks import Visibility

B, N, K, H = 2, 4, 2, 8


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(attention, "DENSE_LENGTH", 32)


def draw(length, *, padding, segments, images, seed=0):
    """Queries, keys, values and a `Visibility`; and the weight of each output in a loss."""
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.array(rng.normal(size=(B, length, n, H)), jnp.float32) for n in (N, K, K))
    weights = rng.normal(size=(B, length, N, H)).astype(np.float32)
    visible = segment_ids = blocks = None
    if padding:
        real = np.arange(length) >= np.array([[length // 4], [0]])
        visible = jnp.array(np.broadcast_to(real[:, None, :], (B, length, length)))
        # What a padding token gets is nobody's business.
        weights[~real] = 0
    if segments:
        segment_ids = jnp.array(np.sort(rng.integers(1, 4, (B, length)), axis=1))
    if images:
        blocks = np.zeros((B, length), np.int32)
        blocks[0, 30:55], blocks[1, 5:15], blocks[1, 60:80] = 1, 1, 2
        blocks = jnp.array(blocks)
    return (q, k, v), Visibility(visible, segment_ids, blocks), jnp.array(weights)


@pytest.mark.parametrize("window", [None, 5, 16, 17, 40, 1000])
@pytest.mark.parametrize(
    ("length", "padding", "segments", "images"),
    [(96, False, False, False), (100, True, False, True), (130, False, True, True)],
)
def test_blocks_equal_all_at_once(window, length, padding, segments, images):
    inputs, visibility, weights = draw(length, padding=padding, segments=segments, images=images)

    def whole(q, k, v):
        return attend(q, k, v, visibility.tile(window, (0, length), (0, length)))

    def value_and_gradients(function):
        def loss(*inputs):
            out = function(*inputs)
            return (out * weights).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
        return np.where(weights != 0, out, 0), *gradients

    found = value_and_gradients(lambda q, k, v: attend_blocks(q, k, v, visibility, window))
    for one, other in zip(found, value_and_gradients(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("preset", ["e2b", "31b"])
def test_a_long_row_gets_the_logits_of_attention_all_at_once(preset, monkeypatch):
    model = random_model(preset)
    rows = ["t" * 30 + "(iiii)" + "t" * 50, "." * 20 + "(iiii)" + "t" * 60]
    tokens, real = draw_tokens(model.config, *rows)
    inputs = {"segment_ids": real, "images": draw_images(model.config, [(2, 2)], [(2, 2)])}
    found, _ = model(tokens, **inputs)
    monkeypatch.setattr(attention, "DENSE_LENGTH", 1000)
    expected, _ = model(tokens, **inputs)
    assert_logits_agree(found * real[..., None], expected * real[..., None])


def test_cost_follows_the_window():
    """Pairs of tokens that meet, over all pairs."""

    def share(length, window, ahead=0):
        groups = block_groups(length, window, ahead)
        assert groups[0][0] == 0
        assert groups[-1][1] == length
        return sum((end - first) * keys for first, end, keys in groups) / length**2

    assert share(1600, None) == pytest.approx(1 / 2 + 1 / 8, abs=0.02)
    assert share(1600, 32) == 48 / 1600
    assert share(3200, 32) == 48 / 3200
    assert share(1600, 32, ahead=32) == 80 / 1600


@pytest.mark.parametrize("window", [None, 32])
def test_nothing_of_all_pairs_is_held(window):
    length = 512
    inputs, visibility, _ = draw(length, padding=False, segments=True, images=False)
    loss = lambda *inputs: attend_blocks(*inputs, visibility, window).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(*inputs))
    assert f"{length},{length}]" not in text
    dense = str(jax.make_jaxpr(lambda q, k, v: attend(q, k, v, jnp.ones((1, 1, 1), bool)))(*inputs))
    assert f"{length},{length}]" in dense
