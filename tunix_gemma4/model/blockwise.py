# SPDX-License-Identifier: Apache-2.0
"""Blockwise attention: some queries and some keys at a time, no array of all pairs of tokens.

One loop goes over pairs of blocks, so a compiler sees one pair whatever the length. The softmax is
the online one, and the backward pass makes each pair's probabilities again from the logarithm of
their sum.

Source: Dao, FlashAttention-2, 2023, algorithms 1 and 2.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..sharding import constrain
from .kernels.triton import triton_forward
from .masks import MASKED, AttentionMask
from .shared_prompt import SharedPrompt, meeting


class BlockPairs(NamedTuple):
    """The pairs of a block of queries and a block of keys that meet.

    Attributes:
        queries: in a block.
        keys: in a block; blocks of different queries may overlap.
        starts: first query and first key of each pair, those of the same queries in a row.
    """

    queries: int
    keys: int
    starts: tuple[tuple[int, int], ...]


def block_pairs(mask: AttentionMask, block: int, queries: int, keys: int) -> BlockPairs:
    """Pairs of blocks that hold every pair of tokens that `mask` lets meet.

    A sliding layer has one for each block of queries, with the keys of their window; a full layer
    of whole rows one for each two blocks, none behind its queries; what may look anywhere one for
    each block of queries, with all keys; rows with a shared prompt, whose completions never meet,
    those that do. The number of queries is a multiple of `block`, that of keys the same in whole
    rows.
    """
    firsts = range(0, queries, block)
    if mask.shared is not None:
        return _shared_pairs(mask.shared, block, queries, mask.window, mask.looks_ahead)
    if mask.own is None:
        return BlockPairs(block, keys, tuple((first, 0) for first in firsts))
    if mask.window is not None:
        # Whole blocks that reach to a query's first key, window - 1 before it.
        back = block * -(-(mask.window - 1) // block)
        ahead = mask.window if mask.looks_ahead else 0
        # What a ring held is in any order: a query that reaches back to any of it meets it all.
        width = min(mask.own + back + block + ahead, keys)
        if width < keys or ahead or not mask.of_whole_rows:
            ends = (mask.own + first + block + ahead for first in firsts)
            starts = (min(max(end - width, 0), keys - width) for end in ends)
            return BlockPairs(block, width, tuple(zip(firsts, starts, strict=True)))
    return BlockPairs(block, block, tuple((q, k) for q in firsts for k in firsts if k <= q))


@functools.lru_cache
def _shared_pairs(
    layout: SharedPrompt, block: int, queries: int, window: int | None, looks_ahead: bool
) -> BlockPairs:
    blocks = [(first, layout.parts(first, block)) for first in range(0, queries, block)]
    window = queries if window is None else window
    nearest = 1 - window if looks_ahead else 0
    meet = (
        (q, k) for q, of_q in blocks for k, of_k in blocks if meeting(of_q, of_k, nearest, window)
    )
    return BlockPairs(block, block, tuple(meet))


def shared_block_size(mask: AttentionMask, length: int, blocks: tuple[int, ...]) -> int:
    """The largest of `blocks` by which rows with a shared prompt touch few pairs that do not meet.

    Few is a quarter more than by the best of them: larger blocks take fewer steps. Blocks that are
    longer than completions hold several, none of which meets the others.
    """

    def touched(block: int) -> int:
        whole = length + -length % block
        return len(block_pairs(mask, block, whole, whole).starts) * block * block

    least = min(map(touched, blocks))
    return next(block for block in sorted(blocks, reverse=True) if touched(block) <= 1.25 * least)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blockwise_attention(
    pairs: BlockPairs, kernel: bool, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask
) -> jax.Array:
    """`attention.attend` by one of `pairs` at a time, which hold all that `mask` lets meet.

    A query that may see nothing gets the mean of the values in its blocks. Where `kernel` is true,
    `triton_forward` runs forward, whose pairs of tokens `pairs` must hold.
    """
    return _forward(pairs, kernel, q, k, v, mask)[0]


def _slice(x: jax.Array, start: jax.Array, size: int, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _write(x: jax.Array, part: jax.Array, start: jax.Array, axis: int = 1) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis)


# Products of queries' rows [B, queries, K, N / K, H], keys' [B, keys, K, H] and what each pair of
# them has [B, K, queries, N / K, keys], in float32. Spelt out, because XLA for CPU copies what
# pairs have where `einsum` contracts it in another order.
_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _of_pairs(of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    return _dot(of_queries, of_keys, (((4,), (3,)), ((0, 2), (0, 2))))


def _over_keys(of_pairs: jax.Array, of_keys: jax.Array) -> jax.Array:
    """[B, K, queries, N / K, H]."""
    return _dot(of_pairs, of_keys, (((4,), (1,)), ((0, 1), (0, 2))))


def _over_queries(of_queries: jax.Array, of_pairs: jax.Array) -> jax.Array:
    """[B, keys, K, H]."""
    product = _dot(of_queries, of_pairs, (((1, 3), (2, 3)), ((0, 2), (0, 1))))  # [B, K, H, keys]
    return jnp.moveaxis(product, 3, 1)


def _scores(pairs, q, k, mask, starts) -> jax.Array:
    """Of one pair of blocks, masked: float32 [B, K, queries, N / K, keys]."""
    visible = mask.block((starts[0], pairs.queries), (starts[1], pairs.keys))
    return jnp.where(visible[:, None, :, None, :], _of_pairs(q, k), MASKED)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] as [B, T, K, N / K, H]."""
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3])


def _steps(pairs: BlockPairs, after: jax.Array) -> tuple[jax.Array, Any]:
    """`after`, and of each pair the first query, the first key and whether its queries are new.

    They are not known before `after`: JAX would else make what all layers share (masks and, in
    layers that reuse them, keys and values) block by block before its loop over the layers, and
    keep that of all pairs of blocks.
    """
    queries, keys = zip(*pairs.starts, strict=True)
    fresh = [i == 0 or queries[i] != queries[i - 1] for i in range(len(queries))]
    steps = tuple(map(jnp.array, (queries, keys, fresh)))
    return jax.lax.optimization_barrier((after, steps))


def _loop(step, carry, steps):
    return jax.lax.scan(lambda carry, x: (step(carry, x[:2], x[2]), None), carry, steps)[0]


def _forward(pairs, kernel, q, k, v, mask):
    """The output, and what the backward pass wants."""
    if kernel:
        out, log_sums = triton_forward(q, k, v, mask)
        log_sums = jnp.moveaxis(_grouped(log_sums[..., None], k.shape[2])[..., 0], 1, 2)
        return out, (q, k, v, mask, out, log_sums)
    q, steps = _steps(pairs, q)
    batch, length, heads, size = q.shape
    groups = heads // k.shape[2]
    # Where a block of queries has one block of keys, nothing runs on from pair to pair.
    online = len({first for first, _ in pairs.starts}) < len(pairs.starts)

    def step(carry, starts, fresh):
        out, log_sums, running = carry
        q_block = _grouped(_slice(q, starts[0], pairs.queries), k.shape[2])
        k_block, v_block = (_slice(x, starts[1], pairs.keys) for x in (k, v))
        scores = _scores(pairs, q_block, k_block, mask, starts)
        largest = scores.max(axis=-1)
        if online:
            before, total, mixed = (jnp.where(fresh, 0, x) for x in running)
            before = jnp.where(fresh, -jnp.inf, before)
            largest = jnp.maximum(largest, before)
        weights = jnp.exp(scores - largest[..., None])
        sums = weights.sum(axis=-1)
        values = _over_keys(weights.astype(v.dtype), v_block)
        if online:
            # Earlier blocks were weighted by another largest score.
            shrink = jnp.exp(before - largest)
            sums, values = sums + shrink * total, values + shrink[..., None] * mixed
            running = largest, sums, values
        # Written at every pair, and right at the last one of the same queries: a loop that wrote
        # only there would have to branch.
        block = jnp.moveaxis(values / sums[..., None], 1, 2)
        out = _write(out, block.reshape(batch, pairs.queries, heads, size), starts[0])
        log_sums = _write(log_sums, largest + jnp.log(sums), starts[0], axis=2)
        return out, log_sums, running

    small = (batch, k.shape[2], pairs.queries, groups)
    shapes = (small, small, (*small, size)) if online else ()
    running = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    out = constrain(jnp.zeros(q.shape, q.dtype), "batch", None, "heads", None)
    log_sums = jnp.zeros((batch, k.shape[2], length, groups), jnp.float32)
    out, log_sums, _ = _loop(step, (out, log_sums, running), steps)
    return out, (q, k, v, mask, out, log_sums)


def _backward(pairs, kernel, saved, d_out):
    del kernel
    q, k, v, mask, out, log_sums = saved
    log_sums, steps = _steps(pairs, log_sums)
    kv_heads, size = k.shape[2:]
    # What each query's weights have in common: the gradient of a softmax takes its mean away.
    product = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)  # [B, T, N]
    product = jnp.moveaxis(product.reshape(*q.shape[:2], kv_heads, -1), 1, 2)

    def add(total, part, start):
        # Blocks of keys overlap and come back, so their gradients are sums.
        return _write(total, _slice(total, start, pairs.keys) + part, start)

    def step(carry, starts, fresh):
        d_q, d_k, d_v, running = carry
        slices = (_slice(x, starts[0], pairs.queries) for x in (q, d_out))
        q_block, d_out_block = (_grouped(x, kv_heads) for x in slices)
        k_block, v_block = (_slice(x, starts[1], pairs.keys) for x in (k, v))
        log_sum, common = (
            _slice(x, starts[0], pairs.queries, axis=2)[..., None] for x in (log_sums, product)
        )
        weights = jnp.exp(_scores(pairs, q_block, k_block, mask, starts) - log_sum)
        d_v = add(d_v, _over_queries(d_out_block, weights.astype(q.dtype)), starts[1])
        d_weights = _of_pairs(d_out_block, v_block)
        d_scores = (weights * (d_weights - common)).astype(q.dtype)
        d_k = add(d_k, _over_queries(q_block, d_scores), starts[1])
        running = _over_keys(d_scores, k_block) + jnp.where(fresh, 0, running)
        block = jnp.moveaxis(running, 1, 2)
        d_q = _write(d_q, block.reshape(q.shape[0], pairs.queries, *q.shape[2:]), starts[0])
        return d_q, d_k, d_v, running

    d_q = constrain(jnp.zeros(q.shape, q.dtype), "batch", None, "heads", None)
    d_k = constrain(jnp.zeros(k.shape, jnp.float32), "batch", None, "kv_heads", None)
    running = jnp.zeros((q.shape[0], kv_heads, pairs.queries, q.shape[2] // kv_heads, size))
    d_q, d_k, d_v, _ = _loop(step, (d_q, d_k, d_k, running), steps)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


blockwise_attention.defvjp(_forward, _backward)
