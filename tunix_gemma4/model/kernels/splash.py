# SPDX-License-Identifier: Apache-2.0
"""Attention over whole rows by JAX's splash kernel for TPU, which skips what no query may see.

Experimental: it compiles for TPUs and is exact where it is interpreted, and nobody has measured its
speed on one. The kernel knows causal masks, windows and segments. It masks by numbers of segments,
so padding is a segment of its own. No mask of all pairs can be given to it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
    splash_attention_mask as kernel_masks,
)

from ...sharding import head_repeats, map_shards

# The kernel's blocks are multiples of this; of its multiples those that compile at head size 512.
LANES = 128
BLOCKS = (512, 256, 128)
# Tests interpret the kernel on CPU.
INTERPRET = False


def splash_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    window: int | None,
    largest_block: int = BLOCKS[0],
) -> jax.Array:
    """Causal attention of whole rows with scale 1, softmax in float32.

    Each chip of the active mesh runs the kernel on its own rows and heads. Key/value heads that
    the mesh does not divide are repeated, so that every chip has those of its queries.

    Args:
        q: [B, T, N, H].
        k: [B, T, K, H] with N a multiple of K.
        v: like k.
        segments: int [B, T] or None; tokens see their own segment alone.
        window: tokens a query sees, itself included; None in a full layer.
        largest_block: queries, and keys, that the kernel handles at once at most; from 128.

    Returns:
        [B, T, N, H] in the dtype of q.
    """
    length = q.shape[1]
    padding = -length % LANES
    repeats = head_repeats(q.shape[2], k.shape[2])
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v)) if repeats > 1 else (k, v)
    arrays = [jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v)]
    if segments is not None:
        arrays.append(jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, padding))))
    axes = ("batch", None, "heads", None), *2 * [("batch", None, "kv_heads", None)], ("batch",)

    def of_chip(q, k, v, *segments):
        kernel: Any = make_kernel(q.shape[1], q.shape[2], window, largest_block)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        out = jax.vmap(kernel)(q, k, v, *(kernels.SegmentIds(x, x) for x in segments))
        return jnp.swapaxes(out, 1, 2)

    return map_shards(of_chip, arrays, axes[: len(arrays)])[:, :length]


def make_kernel(length: int, heads: int, window: int | None, largest_block: int):
    """The kernel for one row of `length` tokens, a multiple of `LANES`."""
    shape = (length, length)
    if window is None:
        mask = kernel_masks.CausalMask(shape)
    else:
        mask = kernel_masks.LocalMask(shape, (window - 1, 0), offset=0)
    block = next(size for size in BLOCKS if size <= largest_block and length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return kernels.make_splash_mha(
        kernel_masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        interpret=INTERPRET,
    )
