# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: one-dimensional for text, two-dimensional for image patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(
    head_dim: int, theta: float, *, fraction: float = 1.0, factor: float = 1.0
) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [head_dim / 2].

    Only the first `fraction` of the pairs turn; the others have frequency 0. The exponent's
    denominator stays the whole head ("proportional"), so the low frequencies are dropped, not
    squeezed.

    Source: transformers 5.12 `_compute_proportional_rope_parameters`.
    """
    turning = int(fraction * head_dim // 2)
    exponents = np.arange(0, 2 * turning, 2, dtype=np.float32) / np.float32(head_dim)
    result = np.zeros(head_dim // 2, np.float32)
    result[:turning] = 1.0 / np.float32(theta) ** exponents
    return result / np.float32(factor)


def angles(positions: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for positions [..., T], float32 [..., T, head_dim / 2]."""
    turned = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(turned), jnp.sin(turned)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (j, j + H/2) of each head of x [B, T, N, H], in float32.

    The result has the dtype of x.
    """
    cos, sin = (part[..., None, :] for part in cos_sin)  # [B, T, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rotate_2d(
    x: jax.Array, x_angles: tuple[jax.Array, jax.Array], y_angles: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Turns the first half of each head of x [B, M, N, H] by column, the second by row."""
    by_column, by_row = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([rotate(by_column, x_angles), rotate(by_row, y_angles)], axis=-1)
