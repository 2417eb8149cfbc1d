# SPDX-License-Identifier: Apache-2.0
"""Attention a tile of queries and keys at a time: no array of all pairs, forward or backward.

One loop goes over the tiles, so a compiler sees one tile whatever the length. The softmax is the
online one, and the backward pass makes each tile's probabilities again from the logarithm of their
sum.

Source: Dao, FlashAttention-2, 2023, algorithms 1 and 2.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..sharding import constrain
from .kernels.triton import triton_forward
from .masks import MASKED


class Masks(Protocol):
    """Says who may look at whom; a pytree of arrays."""

    def tile(
        self, window: int | None, rows: tuple[Any, int], columns: tuple[Any, int]
    ) -> jax.Array:
        """Bool [B or 1, queries, keys] of the given first slots and numbers."""


class Tiles(NamedTuple):
    """The pairs of a block of queries and a block of keys that meet.

    Attributes:
        queries: in a block.
        keys: in a block; blocks of different queries may overlap.
        starts: first query and first key of each pair, those of the same queries in a row.
    """

    queries: int
    keys: int
    starts: tuple[tuple[int, int], ...]


def causal_tiles(length: int, block: int) -> Tiles:
    """Those of a full layer over `length` tokens, a multiple of `block`."""
    firsts = range(0, length, block)
    return Tiles(block, block, tuple((q, k) for q in firsts for k in firsts if k <= q))


def sliding_tiles(
    length: int, block: int, keys: int, *, back: int, ahead: int = 0, cached: int = 0
) -> Tiles:
    """One for each block of queries, whose keys reach `back` before it and `ahead` behind it.

    Args:
        length: of the queries, a multiple of `block`.
        block: queries in a tile.
        keys: how many there are.
        back: how far before its first query a tile's keys reach.
        ahead: how far behind its last one.
        cached: keys before the first query's own, in any order: a query that reaches back to any
            of them meets them all.
    """
    width = min(cached + back + block + ahead, keys)
    firsts = range(0, length, block)
    ends = (cached + first + block + ahead for first in firsts)
    starts = (min(max(end - width, 0), keys - width) for end in ends)
    return Tiles(block, width, tuple(zip(firsts, starts, strict=True)))


def whole_tiles(length: int, block: int, keys: int) -> Tiles:
    """One for each block of queries, with all keys; `length` is a multiple of `block`."""
    return Tiles(block, keys, tuple((first, 0) for first in range(0, length, block)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend_tiles(
    tiles: Tiles,
    window: int | None,
    kernel: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: Masks,
) -> jax.Array:
    """Softmax attention with scale 1 over `tiles`, softmax in float32.

    Args:
        tiles: together they hold every pair that `masks` lets meet.
        window: of a sliding layer; None in a full one.
        kernel: forward by `triton_forward`, whose pairs `tiles` must hold.
        q: [B, T, N, H].
        k: [B, S, K, H] with N a multiple of K.
        v: like k.
        masks: of queries and keys.

    Returns:
        [B, T, N, H] in the dtype of q. A query that may see nothing gets the mean of the values in
        its tiles.
    """
    return _forward(tiles, window, kernel, q, k, v, masks)[0]


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


def _scores(tiles, window, q, k, masks, starts) -> jax.Array:
    """Of one tile, masked: float32 [B, K, queries, N / K, keys]."""
    scores = _of_pairs(q, k)
    mask = masks.tile(window, (starts[0], tiles.queries), (starts[1], tiles.keys))
    return jnp.where(mask[:, None, :, None, :], scores, MASKED)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] as [B, T, K, N / K, H]."""
    return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3])


def _steps(tiles: Tiles, after: jax.Array) -> tuple[jax.Array, Any]:
    """`after`, and of each tile the first query and key and whether it is the first of its queries.

    They are not known before `after`: JAX would else make what all layers share (masks and, in
    layers that reuse them, keys and values) tile by tile before its loop over the layers, and keep
    that of all pairs of blocks.
    """
    queries, keys = zip(*tiles.starts, strict=True)
    fresh = [i == 0 or queries[i] != queries[i - 1] for i in range(len(queries))]
    return jax.lax.optimization_barrier(
        (after, (jnp.array(queries), jnp.array(keys), jnp.array(fresh)))
    )


def _loop(step, carry, steps):
    return jax.lax.scan(lambda carry, x: (step(carry, x[:2], x[2]), None), carry, steps)[0]


def _forward(tiles, window, kernel, q, k, v, masks):
    """The output, and what the backward pass wants."""
    if kernel:
        out, log_sums = triton_forward(window, q, k, v, masks)
        log_sums = jnp.moveaxis(_grouped(log_sums[..., None], k.shape[2])[..., 0], 1, 2)
        return out, (q, k, v, masks, out, log_sums)
    q, steps = _steps(tiles, q)
    batch, length, heads, size = q.shape
    groups = heads // k.shape[2]
    online = len({first for first, _ in tiles.starts}) < len(tiles.starts)

    def step(carry, starts, fresh):
        out, log_sums, running = carry
        q_tile = _grouped(_slice(q, starts[0], tiles.queries), k.shape[2])
        k_tile, v_tile = (_slice(x, starts[1], tiles.keys) for x in (k, v))
        scores = _scores(tiles, window, q_tile, k_tile, masks, starts)
        largest = scores.max(axis=-1)
        if online:
            before, total, mixed = (jnp.where(fresh, 0, x) for x in running)
            before = jnp.where(fresh, -jnp.inf, before)
            largest = jnp.maximum(largest, before)
        weights = jnp.exp(scores - largest[..., None])
        sums = weights.sum(axis=-1)
        values = _over_keys(weights.astype(v.dtype), v_tile)
        if online:
            shrink = jnp.exp(before - largest)
            sums, values = sums + shrink * total, values + shrink[..., None] * mixed
            running = largest, sums, values
        tile = jnp.moveaxis(values / sums[..., None], 1, 2)
        out = _write(out, tile.reshape(batch, tiles.queries, heads, size), starts[0])
        log_sums = _write(log_sums, largest + jnp.log(sums), starts[0], axis=2)
        return out, log_sums, running

    small = (batch, k.shape[2], tiles.queries, groups)
    zeros = lambda shape: jnp.zeros(shape, jnp.float32)  # noqa: E731
    running = (zeros(small), zeros(small), zeros((*small, size))) if online else ()
    out = constrain(jnp.zeros(q.shape, q.dtype), "batch", None, "heads", None)
    log_sums = zeros((batch, k.shape[2], length, groups))
    out, log_sums, _ = _loop(step, (out, log_sums, running), steps)
    return out, (q, k, v, masks, out, log_sums)


def _backward(tiles, window, kernel, saved, d_out):
    del kernel
    q, k, v, masks, out, log_sums = saved
    log_sums, steps = _steps(tiles, log_sums)
    kv_heads, size = k.shape[2:]
    product = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)  # [B, T, N]
    product = jnp.moveaxis(product.reshape(*q.shape[:2], kv_heads, -1), 1, 2)

    def add(total, part, start):
        return _write(total, _slice(total, start, tiles.keys) + part, start)

    def step(carry, starts, fresh):
        d_q, d_k, d_v, running = carry
        q_tile, d_out_tile = (
            _grouped(_slice(x, starts[0], tiles.queries), kv_heads) for x in (q, d_out)
        )
        k_tile, v_tile = (_slice(x, starts[1], tiles.keys) for x in (k, v))
        of_queries = lambda x: _slice(x, starts[0], tiles.queries, axis=2)[..., None]  # noqa: E731
        scores = _scores(tiles, window, q_tile, k_tile, masks, starts)
        weights = jnp.exp(scores - of_queries(log_sums))
        d_v = add(d_v, _over_queries(d_out_tile, weights.astype(q.dtype)), starts[1])
        d_weights = _of_pairs(d_out_tile, v_tile)
        d_scores = (weights * (d_weights - of_queries(product))).astype(q.dtype)
        d_k = add(d_k, _over_queries(q_tile, d_scores), starts[1])
        running = _over_keys(d_scores, k_tile) + jnp.where(fresh, 0, running)
        tile = jnp.moveaxis(running, 1, 2)
        d_q = _write(d_q, tile.reshape(q.shape[0], tiles.queries, *q.shape[2:]), starts[0])
        return d_q, d_k, d_v, running

    d_q = constrain(jnp.zeros(q.shape, q.dtype), "batch", None, "heads", None)
    d_k = constrain(jnp.zeros(k.shape, jnp.float32), "batch", None, "kv_heads", None)
    running = jnp.zeros((q.shape[0], kv_heads, tiles.queries, q.shape[2] // kv_heads, size))
    d_q, d_k, d_v, _ = _loop(step, (d_q, d_k, d_k, running), steps)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


attend_tiles.defvjp(_forward, _backward)
