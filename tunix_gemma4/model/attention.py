# SPDX-License-Identifier: Apache-2.0
"""Attention of the text decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import LayerSpec, ModelConfig
from ..sharding import constrain
from .cache import LayerCache, store
from .layers import RMSNorm, linear
from .masks import Visibility
from .rope import rotate

KeysValues = tuple[jax.Array, jax.Array]

# Queries whose attention exists at once in rows longer than DENSE_LENGTH.
BLOCK = 256
DENSE_LENGTH = 512
# Blocks of a group meet as many keys as its last: 1/2 + 1 / (2 * FULL_GROUPS) of all pairs.
FULL_GROUPS = 4


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with scale 1, softmax in float32.

    q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K, mask bool [B, 1 or T, S].
    A query that may see nothing gets the mean of all values, which is finite.
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0)


def attend_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, window: int | None
) -> jax.Array:
    """`attend` over whole rows of T tokens, a block of queries at a time.

    A sliding layer's block meets the keys of its window alone, so that cost grows with T x window;
    a full layer's meets the keys before the end of its group, `FULL_GROUPS` of which cover the
    row. The backward pass makes each block's attention again. Nothing [N, T, T] exists.
    """
    length = q.shape[1]
    if length <= DENSE_LENGTH:
        return attend(q, k, v, visibility.tile(window, (0, length), (0, length)))
    padding = -length % BLOCK
    if padding:
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        visibility = visibility.padded(padding)
    ahead = window if window is not None and visibility.blocks is not None else 0

    def group(first: int, end: int, keys: int) -> jax.Array:
        @jax.checkpoint
        def block(q: jax.Array, start: jax.Array) -> jax.Array:
            first_key = jnp.clip(start + BLOCK + ahead - keys, 0, k.shape[1] - keys)
            near = (jax.lax.dynamic_slice_in_dim(x, first_key, keys, axis=1) for x in (k, v))
            mask = visibility.tile(window, (start, BLOCK), (first_key, keys))
            return attend(q, *near, mask)

        blocks = q[:, first:end].reshape(q.shape[0], -1, BLOCK, *q.shape[2:])
        starts = jnp.arange(first, end, BLOCK)
        out = jax.lax.map(lambda xs: block(*xs), (jnp.moveaxis(blocks, 1, 0), starts))
        return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])

    groups = block_groups(q.shape[1], window, ahead)
    return jnp.concatenate([group(*g) for g in groups], axis=1)[:, :length]


def block_groups(length: int, window: int | None, ahead: int = 0) -> list[tuple[int, int, int]]:
    """First slot, end, and number of keys per block, of each group of blocks of queries.

    `length` is a multiple of `BLOCK`; `ahead` is how far a query may look forward.
    """
    blocks = length // BLOCK
    if window is not None:
        # A query's first key lies window - 1 before it.
        keys = BLOCK * (1 + -(-(window - 1) // BLOCK)) + ahead
        if keys < length:
            return [(0, length, keys)]
    ends = sorted({BLOCK * -(-blocks * (i + 1) // FULL_GROUPS) for i in range(FULL_GROUPS)})
    return [
        (first, end, min(end + ahead, length)) for first, end in zip([0, *ends], ends, strict=False)
    ]


class Attention(nnx.Module):
    """Grouped-query attention with normed queries, keys and values.

    A layer that shares keys and values owns `q_proj`, `q_norm` and `o_proj` alone and is given
    what its source layer attended to. Where `k_eq_v`, values are the raw key projection.

    Source: transformers 5.12 `Gemma4TextAttention`.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        self.config, self.spec = config, spec
        size, heads, kv_heads = config.hidden_size, config.num_attention_heads, spec.num_kv_heads
        q_size, kv_size = heads * spec.head_dim, kv_heads * spec.head_dim
        make = {"config": config, "rngs": rngs}
        split = {"axes": ("embed", "kv_heads"), "heads": kv_heads} | make
        self.q_proj = linear(size, q_size, axes=("embed", "heads"), heads=heads, **make)
        self.q_norm = RMSNorm(spec.head_dim, config=config)
        if not spec.shares_kv:
            self.k_proj = linear(size, kv_size, **split)
            self.k_norm = RMSNorm(spec.head_dim, config=config)
            if not spec.k_eq_v:
                self.v_proj = linear(size, kv_size, **split)
            self.v_norm = RMSNorm(None, config=config)
        self.o_proj = linear(q_size, size, axes=("heads", "embed"), heads=heads, **make)

    def __call__(
        self,
        x: jax.Array,
        cos_sin: tuple[jax.Array, jax.Array],
        mask: jax.Array | Visibility,
        cache: LayerCache | None,
        shared: KeysValues | None,
    ) -> tuple[jax.Array, KeysValues, LayerCache | None]:
        """Returns the output [B, T, D], the keys and values attended to, and the new cache."""
        q = self._heads(self.q_proj(x))
        q = rotate(self.q_norm(q), cos_sin)  # [B, T, N, H]
        if self.spec.shares_kv:
            k, v = shared
        else:
            k, v, cache = self._keys_values(x, cos_sin, cache)
        if isinstance(mask, Visibility):
            out = attend_blocks(q, k, v, mask, self.spec.window)
        else:
            out = attend(q, k, v, mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), (k, v), cache

    def _heads(self, x: jax.Array) -> jax.Array:
        return constrain(
            x.reshape(*x.shape[:2], -1, self.spec.head_dim), "batch", None, "heads", None
        )

    def _keys_values(self, x, cos_sin, cache):
        raw = self._heads(self.k_proj(x))  # [B, T, K, H]
        v = self.v_norm(raw if self.spec.k_eq_v else self._heads(self.v_proj(x)))
        k = rotate(self.k_norm(raw), cos_sin)
        if cache is None:
            return k, v, None
        return store(self.config, self.spec, cache, k, v)
