# SPDX-License-Identifier: Apache-2.0
"""Tiny models with nothing left at its default, and batches drawn as text, for the tests."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tunix_gemma4.config import ModelConfig
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration
from tunix_gemma4.model.layers import HasBuffers
from tunix_gemma4.testing.tiny import random_tensor, tiny_config

# Flags of a process of its own with one device, as quick to compile as the tests'.
ONE_DEVICE = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
TEXT_PRESETS = ("e2b", "e4b", "12b", "26b_a4b", "31b")
IMAGE_PRESETS = ("e2b", "e4b", "26b_a4b", "31b")
BUDGET = 12  # Soft tokens that an image of these tests may have.


def random_model(preset: str, *, seed: int = 0, **fields) -> Gemma4ForConditionalGeneration:
    """The tiny `preset` with random norms, scalars, clip bounds and standardisation."""
    model = Gemma4ForConditionalGeneration(tiny_config(preset, **fields), rngs=nnx.Rngs(0))

    def value(path, shape):
        return random_tensor(".".join(map(str, path)), shape, seed=seed, plain=False)

    state = nnx.state(model, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        swap = path[-1] == "kernel" or "experts" in path
        shape = variable.shape
        array = value(path, (*shape[:-2], shape[-1], shape[-2]) if swap else shape)
        if path == ("language_model", "norm", "weight"):
            # With positive signs alone the tied head answers each token with itself.
            array = array * np.sign(np.random.default_rng(seed).standard_normal(shape))
        variable[...] = jnp.asarray(np.swapaxes(array, -1, -2) if swap else array, variable.dtype)
    nnx.update(model, state)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, HasBuffers):
            for name, shape in module.buffer_shapes().items():
                values = value((*path, name), shape).ravel().tolist()
                setattr(module, name, values[0] if shape in ((), (1,)) else tuple(values))
    return model


_OPTIONS = ("decode_only_last_token", "skip_lm_head")


def _call(model, tokens, **inputs):
    return model(tokens, **inputs)


# `forward(model, tokens, **inputs)` is the model's call, compiled once per shape.
forward = nnx.jit(_call, static_argnames=_OPTIONS)


def draw_tokens(config: ModelConfig, *rows: str, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Tokens and padding mask, int32 [B, T], of rows drawn with one letter per token.

    `t` is a random word, `i` a soft token of an image, `(` and `)` begin and end an image, and
    `.` is padding. Random words do not depend on where the padding stands.
    """
    special = {
        "i": config.image_token_id,
        "(": config.boi_token_id,
        ")": config.eoi_token_id,
        ".": config.pad_token_id,
    }
    tokens = []
    for number, row in enumerate(rows):
        words = iter(np.random.default_rng([seed, number]).integers(20, 250, len(row)))
        tokens.append([special[letter] if letter in special else next(words) for letter in row])
    real = [[letter != "." for letter in row] for row in rows]
    return jnp.array(tokens, jnp.int32), jnp.array(real, jnp.int32)


def draw_image(config: ModelConfig, columns: int, rows: int, *, seed: int = 0) -> np.ndarray:
    """Random pixels of `columns` x `rows` soft tokens: float32 [M, 3 p p + 2], padded."""
    vision = config.tower_config
    kernel = vision.pooling_kernel_size
    image = np.zeros((BUDGET * kernel**2, vision.patch_dim + 2), np.float32)
    image[:, -2:] = -1
    y, x = np.mgrid[: rows * kernel, : columns * kernel]
    image[: x.size, -2], image[: x.size, -1] = x.ravel(), y.ravel()
    image[: x.size, :-2] = np.random.default_rng(seed).random((x.size, vision.patch_dim))
    return image


def draw_images(
    config: ModelConfig, *rows: Sequence[tuple[int, int]], seed: int = 0, count: int | None = None
) -> jax.Array:
    """Images [B, I, M, C]; each row lists its images as (columns, rows) in soft tokens."""
    count = max(map(len, rows)) if count is None else count
    empty = draw_image(config, 0, 0)
    batch = np.stack([np.stack([empty] * count) for _ in rows])
    for number, row in enumerate(rows):
        for index, (columns, lines) in enumerate(row):
            batch[number, index] = draw_image(
                config, columns, lines, seed=100 * seed + 10 * number + index
            )
    return jnp.asarray(batch)


def assert_logits_agree(found, expected) -> None:
    """Within 1e-4 of the largest expected logit."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    assert difference <= 1e-4 * largest, f"differ by {difference:.2e}; the largest is {largest:.3g}"
