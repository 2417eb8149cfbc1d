# SPDX-License-Identifier: Apache-2.0
"""Putting the soft tokens of images where the placeholders stand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ..config import ModelConfig


def check_images(
    config: ModelConfig, tokens: jax.Array, images: jax.Array | None, image_repeats: int = 1
) -> None:
    """Raises ValueError for images whose form does not fit the model or the tokens."""
    if images is None:
        return
    if not config.has_vision:
        raise ValueError(
            "images: this model was built without its vision tower; build or load it with "
            "text_only=False"
        )
    width, pooled = config.tower.patch_dim + 2, config.tower.pooling_kernel_size**2
    rows, rest = divmod(tokens.shape[0], image_repeats)
    if images.ndim != 4 or (images.shape[0], images.shape[3]) != (rows, width) or rest:
        raise ValueError(
            f"images: expected shape [{rows}, I, M, {width}] (patches of 3 * patch_size**2 values, "
            f"then x, y), found {images.shape}; Processor makes them"
        )
    if images.shape[2] % pooled:
        raise ValueError(
            f"images: expected a number of patches M divisible by pooling_kernel_size**2 = "
            f"{pooled}, found {images.shape[2]}"
        )
    if images.dtype != jnp.float32:
        raise ValueError(
            f"images: expected float32, which holds patch positions exactly, found {images.dtype}"
        )


def merge_soft_tokens(
    x: jax.Array, placeholders: jax.Array, soft_tokens: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Replaces embeddings x [B, T, D] at placeholders [B, T] by soft tokens, in order, row by row.

    Those are values [B, S, D] and which are valid, bool [B, S]; None: no images. A row with more or
    fewer placeholders than valid soft tokens raises ValueError when the counts are concrete, and is
    all NaN where they are traced: a shifted or missing image must not train in silence.
    """
    expected = placeholders.sum(axis=1)
    found = jnp.zeros_like(expected) if soft_tokens is None else soft_tokens[1].sum(axis=1)
    agree = expected == found
    if not isinstance(agree, Tracer) and not agree.all():
        row = int(jnp.argmin(agree))
        raise ValueError(
            f"images: row {row} has {int(expected[row])} image placeholders in its tokens but "
            f"{int(found[row])} soft tokens from its images"
        )
    if soft_tokens is not None:
        values, valid = soft_tokens
        order = jnp.argsort(~valid, axis=1, stable=True)  # valid ones first, in order
        rank = jnp.clip(jnp.cumsum(placeholders, axis=1) - 1, 0, order.shape[1] - 1)
        source = jnp.take_along_axis(order, rank, axis=1)
        gathered = jnp.take_along_axis(values, source[..., None], axis=1).astype(x.dtype)
        x = jnp.where(placeholders[..., None], gathered, x)
    return jnp.where(agree[:, None, None], x, jnp.nan)
