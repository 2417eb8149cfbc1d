# SPDX-License-Identifier: Apache-2.0
"""Attention a block of queries at a time: the same as all at once, at a cost that windows bound."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from small_models import assert_logits_agree, draw_images, draw_tokens, forward, random_model

from tunix_gemma4.losses import next_token_loss
from tunix_gemma4.model import attention
from tunix_gemma4.model.attention import attend, attend_at_once
from tunix_gemma4.model.blockwise import block_pairs
from tunix_gemma4.model.gemma4 import stack_layers
from tunix_gemma4.model.kernels import splash, triton
from tunix_gemma4.model.masks import AttentionMask
from tunix_gemma4.sharding import shard_model
from tunix_gemma4.testing.tiny import tiny_config

B, N, K, H = 2, 4, 2, 8
CONFIG = tiny_config("e2b")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(attention, "CPU_BLOCK", 16)


def draw(
    length, window=None, *, padding=False, segments=False, images=False, kv_heads=K, head_dim=H
):
    """Queries, keys, values and the mask of whole rows; and the weight of each output in a loss."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.array(rng.normal(size=(B, length, n, head_dim)) * (H / head_dim) ** 0.25, jnp.float32)
        for n in (N, kv_heads, kv_heads)
    )
    weights = rng.normal(size=q.shape).astype(np.float32)
    visible = segment_ids = image_ids = None
    if padding:
        real = np.arange(length) >= np.array([[length // 4], [0]])
        visible = jnp.array(np.broadcast_to(real[:, None, :], (B, length, length)))
        # What a padding token gets is nobody's business.
        weights[~real] = 0
    if segments:
        segment_ids = jnp.array(np.sort(rng.integers(1, 4, (B, length)), axis=1))
    if images:
        image_ids = np.zeros((B, length), np.int32)
        image_ids[0, 30:55], image_ids[1, 5:15], image_ids[1, 60:80] = 1, 1, 2
        image_ids = jnp.array(image_ids)
    ahead = images and window is not None
    mask = AttentionMask(visible, segment_ids, image_ids, window, own=0, looks_ahead=ahead)
    return (q, k, v), mask, jnp.array(weights)


def at_once(q, k, v, mask):
    return attend_at_once(q, k, v, mask.block((0, q.shape[1]), (0, k.shape[1])))


@pytest.mark.parametrize("window", [None, 5, 16, 17, 40, 1000])
@pytest.mark.parametrize(
    ("length", "padding", "segments", "images"),
    [(96, False, False, False), (100, True, False, True), (130, False, True, True)],
)
def test_blocks_equal_all_at_once(window, length, padding, segments, images):
    inputs, mask, weights = draw(length, window, padding=padding, segments=segments, images=images)
    assert_equal(lambda *x: attend(CONFIG, *x, mask), lambda *x: at_once(*x, mask), inputs, weights)


def assert_equal(function, expected, inputs, weights):
    """Values and gradients within 1e-5 of the largest, all finite."""

    def value_and_gradients(function):
        def loss(*inputs):
            out = function(*inputs)
            return (out * weights).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
        assert np.isfinite(out).all()
        return np.where(weights != 0, out, 0), *gradients

    for one, other in zip(
        value_and_gradients(function), value_and_gradients(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("preset", ["e2b", "31b"])
def test_a_long_row_gets_the_logits_of_attention_all_at_once(preset, monkeypatch):
    model = random_model(preset)
    rows = ["t" * 30 + "(iiii)" + "t" * 50, "." * 20 + "(iiii)" + "t" * 60]
    tokens, real = draw_tokens(model.config, *rows)
    inputs = {"segment_ids": real, "images": draw_images(model.config, [(2, 2)], [(2, 2)])}
    found, _ = model(tokens, **inputs)
    monkeypatch.setattr(attention, "CPU_BLOCK", 1000)
    expected, _ = model(tokens, **inputs)
    assert_logits_agree(found * real[..., None], expected * real[..., None])


def test_cost_follows_the_window():
    """Pairs of tokens that meet, over all pairs."""

    def share(length, window, both_ways=False):
        mask = AttentionMask(window=window, own=0, looks_ahead=both_ways)
        pairs = block_pairs(mask, 16, length, length)
        return pairs.queries * pairs.keys * len(pairs.starts) / length**2

    assert share(1600, None) == pytest.approx(1 / 2, abs=0.01)
    assert share(1600, 32) == 48 / 1600
    assert share(3200, 32) == 48 / 3200
    assert share(1600, 32, both_ways=True) == 80 / 1600


@pytest.mark.parametrize("window", [None, 32])
def test_nothing_of_all_pairs_is_held(window):
    length = 512
    inputs, mask, _ = draw(length, window, segments=True)
    loss = lambda *inputs: attend(CONFIG, *inputs, mask).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(*inputs))
    assert f"{length},{length}]" not in text
    dense = str(jax.make_jaxpr(lambda *inputs: at_once(*inputs, mask))(*inputs))
    assert f"{length},{length}]" in dense


def test_a_loop_over_layers_makes_each_block_where_it_is_used(monkeypatch):
    """Masks are those of every layer, and so are keys and values that are reused."""
    length, pairs = 160, 55  # Ten blocks, each with itself and those before it.
    model = stack_layers(random_model("e2b", remat_config="decoder"))
    tokens = jnp.ones((1, length), jnp.int32)

    def held():
        loss = lambda model: next_token_loss(model, tokens, tokens, segment_ids=tokens)  # noqa: E731
        graphdef, state = nnx.split(model)
        traced = jax.make_jaxpr(jax.grad(lambda state: loss(nnx.merge(graphdef, state))))(state)
        return set(re.findall(rf"\w+\[{pairs},[\d,]+\]", str(traced)))

    assert not held()
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda arrays: arrays)
    assert any(array.startswith("bool") for array in held())


# ---- Images' patches, which all see each other, and new tokens with a cache before them.


@pytest.mark.parametrize("length", [30, 90])
def test_patches_see_all_valid_ones_a_block_at_a_time(length):
    inputs, _, weights = draw(length, kv_heads=N)
    valid = jnp.arange(length) < jnp.array([[length], [length - 13]])
    weights = weights * valid[:, :, None, None]
    mask = AttentionMask(valid[:, None, :])
    assert_equal(lambda *x: attend(CONFIG, *x, mask), lambda *x: at_once(*x, mask), inputs, weights)
    loss = lambda *inputs: attend(CONFIG, *inputs, mask).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(*inputs))
    assert (f"{length},{length}]" in text) == (length <= 2 * attention.CPU_BLOCK)


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("preset", ["e2b", "31b"])
def test_a_long_prefill_in_one_call_or_two_gives_what_the_row_gives(preset, ring):
    """With windows of 5, images (31b's look both ways) and padding on the left."""
    model = random_model(preset, sliding_window=5, use_sliding_window_kv_cache=ring)
    rows = ["t" * 30 + "(iiii)" + "t" * 60, "." * 20 + "(iiii)" + "t" * 70]
    tokens, real = draw_tokens(model.config, *rows)
    images = draw_images(model.config, [(2, 2)], [(2, 2)])
    mask = model.get_attention_mask(tokens, real)
    inputs = {"images": images, "skip_lm_head": True}
    expected, _ = forward(model, tokens, attention_mask=mask, **inputs)
    expected *= real[..., None]
    half, more = 48, 7
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, more)))
    empty = model.init_cache(2, tokens.shape[1] + more, jnp.float32)
    whole, _ = forward(model, tokens, cache=empty, attention_mask=mask, **inputs)
    assert_logits_agree(whole * real[..., None], expected)
    _, cache = forward(
        model, tokens[:, :half], cache=empty, attention_mask=mask[:, :half], **inputs
    )
    rest, _ = forward(
        model, tokens[:, half:], cache=cache, attention_mask=mask[:, half:], skip_lm_head=True
    )
    assert_logits_agree(rest, expected[:, half:])


@pytest.mark.parametrize("preset", ["e2b", "31b"])
def test_a_prefill_holds_no_scores_of_all_pairs(preset, monkeypatch):
    model = random_model(preset, sliding_window=5)
    length, room = 200, 230
    tokens, _ = draw_tokens(model.config, "t" * length)
    cache = model.init_cache(1, room, jnp.float32)
    mask = jnp.ones((1, length, room), bool)

    def scores() -> set[str]:
        call = lambda cache: model(tokens, cache=cache, attention_mask=mask, skip_lm_head=True)  # noqa: E731
        text = str(jax.make_jaxpr(call)(cache))
        return set(re.findall(rf"f32\[[\d,]*,{length},[\d,]*(?:{room}|{length + 5})\]", text))

    assert not scores()
    monkeypatch.setattr(attention, "CPU_BLOCK", 1000)
    assert scores()


# ---- The kernel for TPU, interpreted.


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(splash, "INTERPRET", True)


def make_mesh(fsdp, tp):
    return Mesh(np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp), ("fsdp", "tp"))


def assert_kernel_equals(name, config, drawn, mesh):
    """The kernel that has `name` in its program runs, and equals attention all at once."""
    inputs, mask, weights = drawn
    kernel = lambda *inputs: attend(config, *inputs, mask)  # noqa: E731
    whole = lambda *inputs: at_once(*inputs, mask)  # noqa: E731
    with jax.set_mesh(make_mesh(*mesh)) if mesh else contextlib.nullcontext():
        text = str(jax.make_jaxpr(kernel)(*inputs))
        assert name in text
        assert ("shard_map" in text) == (mesh is not None)
        assert_equal(kernel, whole, inputs, weights)


@pytest.mark.parametrize(
    ("length", "window", "segments", "kv_heads", "mesh"),
    [
        (128, None, False, 2, None),
        (200, None, True, 2, None),
        (300, 40, True, 1, None),
        (300, 150, False, 4, None),
        (200, None, True, 2, (2, 2)),
        (200, 40, True, 1, (1, 4)),
        (200, 40, True, 1, (4, 1)),
    ],
)
def test_the_kernel_equals_all_at_once(on_tpu, length, window, segments, kv_heads, mesh):
    """Also with heads that tp does not divide, and rows that fsdp does not."""
    config = tiny_config("e2b", attention_implementation="splash", flash_attention_block_size=128)
    drawn = draw(length, window, segments=segments, kv_heads=kv_heads, head_dim=splash.LANES)
    assert_kernel_equals("splash", config, drawn, mesh)


# ---- The kernel for GPU, interpreted.


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    monkeypatch.setattr(attention, "BLOCK", 64)  # The least that its queries divide.
    monkeypatch.setattr(triton, "INTERPRET", True)


@pytest.mark.parametrize(
    ("length", "window", "segments", "images", "kv_heads", "mesh"),
    [
        (192, None, False, False, 2, None),
        (200, None, True, True, 1, None),
        (200, 5, False, False, 2, None),
        (200, 64, True, False, 4, None),
        (200, 70, True, True, 2, None),
        (200, 1000, False, True, 2, None),
        (200, None, True, False, 2, (2, 2)),
        (200, 70, True, True, 1, (1, 4)),
        (200, 40, True, False, 1, (4, 1)),
    ],
)
def test_the_gpu_kernel_equals_all_at_once(
    on_gpu, length, window, segments, images, kv_heads, mesh
):
    """Also with heads that tp does not divide, and rows that fsdp does not."""
    config = tiny_config("e2b", use_flash_attention=True)
    shapes = {"kv_heads": kv_heads, "head_dim": 16}
    drawn = draw(length, window, segments=segments, images=images, **shapes)
    assert_kernel_equals("triton_attention", config, drawn, mesh)


@pytest.mark.parametrize("row_bytes", [32, 512, 1024, 2048])
def test_its_blocks_fit_the_memory_of_a_multiprocessor(on_gpu, row_bytes):
    """Of an A100; and divide every row that `attend` hands on."""
    queries, keys = triton.block_sizes(row_bytes)
    assert (queries + 2 * keys) * row_bytes <= 164 * 1024
    assert 256 % queries == 256 % keys == 0


@pytest.mark.slow
def test_stacked_layers_on_a_mesh_train_as_well_through_the_kernel(on_tpu):
    """A scan over layers, each checkpointed."""
    fields = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    fields |= {"num_kv_shared_layers": 0, "head_dim": 128, "global_head_dim": 256}
    tokens, real = draw_tokens(tiny_config("e2b"), "t" * 60, "." * 20 + "t" * 40)
    segments = jnp.where(jnp.arange(60) < 40, real, 2 * real)

    def step(implementation, mesh=None):
        model = random_model("e2b", attention_implementation=implementation, **fields)
        model.config.remat_config = "decoder"
        for layer in model.language_model.layers:
            # Logits as small as those of small heads: large ones magnify rounding.
            layer.self_attn.q_norm.weight[...] *= H / layer.spec.head_dim
        model = stack_layers(model)
        graphdef, state = nnx.split(model if mesh is None else shard_model(model, mesh))

        def loss(state):
            model = nnx.merge(graphdef, state)
            return next_token_loss(model, tokens, real, segment_ids=segments)

        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            traced = jax.jit(jax.value_and_grad(loss)).trace(state)
            assert ("splash" in str(traced.jaxpr)) == (implementation == "splash")
            loss, gradient = traced.lower().compile()(state)
        return loss, jax.tree.leaves(gradient)

    (loss, gradient), (expected, theirs) = step("splash", make_mesh(2, 2)), step("xla")
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for one, other in zip(gradient, theirs, strict=True):
        assert_logits_agree(one, other)


def test_what_the_kernel_cannot_express_runs_in_blocks(on_tpu, monkeypatch, caplog):
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    length = 40
    inputs, free, _ = draw(length, head_dim=splash.LANES)
    _, masked, _ = draw(length, padding=True)
    ids = jnp.zeros((B, length), jnp.int32)
    with_images = AttentionMask(segments=ids, images=ids, own=0)
    looking = dataclasses.replace(with_images, window=10, looks_ahead=True)
    config = tiny_config("e2b", attention_implementation="splash")

    def path(config, inputs, mask):
        """Which path ran, and what the log says of it."""
        monkeypatch.setattr(logging, "_log_counter_per_token", {})
        caplog.clear()
        call = lambda *inputs: attend(config, *inputs, mask)  # noqa: E731
        text = str(jax.make_jaxpr(call)(*inputs))
        found = [name for name in ("splash", "triton") if name in text]
        return (found or ["xla"])[0], caplog.text

    short = [x[:, :20] for x in inputs]
    narrow, _, _ = draw(length, head_dim=64)
    assert path(config, inputs, free) == ("splash", "")
    assert path(config, inputs, with_images) == ("splash", "")
    for case, why in (
        ((inputs, looking), "tokens of an image look both ways"),
        ((inputs, masked), "the caller gives a mask of all pairs"),
        ((narrow, free), "the head size is 64"),
        ((short, free), "rows of 20 tokens"),
    ):
        taken, said = path(config, *case)
        assert taken == "xla"
        assert why in said
    assert path(tiny_config("e2b", attention_implementation="xla"), inputs, free) == ("xla", "")
    assert path(tiny_config("e2b", use_flash_attention=True), inputs, free) == ("splash", "")
    assert path(tiny_config("e2b"), inputs, free) == ("xla", "")
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    taken, said = path(config, inputs, free)
    assert taken == "xla"
    assert "compiled for gpu" in said
    config = tiny_config("e2b", attention_implementation="triton")
    odd, _, _ = draw(length, head_dim=24)
    assert path(config, inputs, looking) == ("triton", "")
    assert path(config, inputs, masked)[0] == path(config, odd, free)[0] == "xla"
    assert "the head size is 24" in path(config, odd, free)[1]
