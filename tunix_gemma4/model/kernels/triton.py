# SPDX-License-Identifier: Apache-2.0
"""Attention of whole rows forward by one kernel for GPUs, through Pallas and Triton.

Experimental: it compiles for GPUs and is exact where it is interpreted, and nobody has measured its
speed on one. Weights of pairs stay on the chip's own memory. The backward pass is that of
`blockwise`, which wants no more than the output and the logarithms of the sums.

Source: Dao, FlashAttention-2, 2023, algorithm 1.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as gpu

from ...sharding import head_repeats, map_shards
from ..masks import MASKED, AttentionMask, Tokens, visible_pairs

# Bytes of a block of keys, and of values. With one of queries they fit an A100's 164 KiB too.
_KEY_BYTES = 2**15
# Tests interpret the kernel on CPU.
INTERPRET = False


def block_sizes(row_bytes: int) -> tuple[int, int]:
    """Queries and keys that meet at once, of `row_bytes` a head: powers of two from 16 to 64."""
    return (64 if row_bytes <= 1024 else 32), min(64, max(16, _KEY_BYTES // row_bytes))


def triton_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, jax.Array]:
    """Attention with scale 1, softmax in float32.

    Each chip of the active mesh runs the kernel on its own rows and heads. Key/value heads that
    the mesh does not divide are repeated, so that every chip has those of its queries.

    Args:
        q: [B, T, N, H], T a multiple of 64 and H a power of two.
        k: [B, T, K, H] with N a multiple of K.
        v: like k.
        mask: of whole rows, without a caller's.

    Returns:
        [B, T, N, H] in the dtype of q, and float32 [B, T, N]: logarithms of the sums of
        exponentials of scores.
    """
    repeats = head_repeats(q.shape[2], k.shape[2])
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v)) if repeats > 1 else (k, v)
    marks = {"segments": mask.segments, "images": mask.images}
    marks = {name: x.astype(jnp.int32) for name, x in marks.items() if x is not None}
    axes = ("batch", None, "heads", None), *2 * [("batch", None, "kv_heads", None)]
    of_chip = functools.partial(_on_chip, mask.window, tuple(marks))
    arrays = [q, k, v, *marks.values()]
    out, log_sums = map_shards(of_chip, arrays, [*axes, *[("batch", None)] * len(marks)])
    return out, log_sums[..., 0]


def _on_chip(window, names, q, k, v, *marks):
    batch, length, heads, size = q.shape
    queries, keys = block_sizes(size * q.dtype.itemsize)
    groups = heads // k.shape[2]
    of_queries = pl.BlockSpec((None, queries, None, size), lambda b, n, i: (b, i, n, 0))
    of_keys = pl.BlockSpec((None, length, None, size), lambda b, n, i: (b, 0, n // groups, 0))
    of_row = pl.BlockSpec((None, length), lambda b, n, i: (b, 0))
    reach = length if window is None else window
    flops = 4 * math.prod(q.shape) * min(reach, length // 2)
    return pl.pallas_call(
        functools.partial(_kernel, window, names, keys),
        grid=(batch, heads, length // queries),
        in_specs=[of_queries, of_keys, of_keys, *[of_row] * len(marks)],
        out_specs=[
            of_queries,
            pl.BlockSpec((None, queries, None, None), lambda b, n, i: (b, i, n, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32),
        ],
        compiler_params=gpu.CompilerParams(num_warps=8 if size > 128 else 4, num_stages=1),
        # Loops of the kernel end where its queries say, which a count of operations cannot see.
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=flops // (4 * size), bytes_accessed=0
        ),
        interpret=INTERPRET,
        name="triton_attention",
    )(q, k, v, *marks)


def _kernel(window, names, keys, q_ref, k_ref, v_ref, *refs):
    """One block of queries of one head: what it sees, a block of keys at a time."""
    *mark_refs, out_ref, log_sums_ref = refs
    marks = dict(zip(names, mark_refs, strict=True))
    queries, size = q_ref.shape
    first = pl.program_id(2) * queries
    q = q_ref[...]
    tokens = Tokens(
        first + jnp.arange(queries), **{n: ref[pl.ds(first, queries)] for n, ref in marks.items()}
    )
    # Triton would else round float32 to 10 bits.
    dot = functools.partial(gpu.dot, precision=jax.lax.Precision.HIGHEST)

    def step(index, carry):
        mixed, total, before = carry
        here = pl.ds(index * keys, keys)
        scores = dot(q, k_ref[here, :], trans_b=True)
        slots = index * keys + jnp.arange(keys)
        others = Tokens(slots, **{name: ref[here] for name, ref in marks.items()})
        scores = jnp.where(visible_pairs(tokens, others, window), scores, MASKED)
        largest = jnp.maximum(before, scores.max(axis=1))
        weights, shrink = jnp.exp(scores - largest[:, None]), jnp.exp(before - largest)
        values = dot(weights.astype(v_ref.dtype), v_ref[here, :])
        return mixed * shrink[:, None] + values, total * shrink + weights.sum(axis=1), largest

    back, ahead = (first, 0) if window is None else (window - 1, window if "images" in marks else 0)
    start = jnp.maximum(first - back, 0) // keys
    end = pl.cdiv(jnp.minimum(first + queries + ahead, k_ref.shape[0]), keys)
    nothing = jnp.zeros((queries, size), jnp.float32), jnp.zeros(queries, jnp.float32)
    least = jnp.full(queries, MASKED, jnp.float32)
    mixed, total, largest = jax.lax.fori_loop(start, end, step, (*nothing, least))
    out_ref[...] = (mixed / total[:, None]).astype(out_ref.dtype)
    log_sums_ref[...] = largest + jnp.log(total)
