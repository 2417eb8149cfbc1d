# SPDX-License-Identifier: Apache-2.0
"""Attention of the text decoder."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from ..config import LayerSpec, ModelConfig
from ..sharding import constrain, platform
from .cache import LayerCache, store
from .layers import RMSNorm, linear
from .masks import Visibility
from .rope import rotate
from .splash import LANES, splash_attend

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


def attend_rows(
    config: ModelConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    window: int | None,
) -> jax.Array:
    """`attend` over whole rows of T tokens, by whatever fits the device, the config and the case.

    Args:
        config: whose `attention` says what is wanted.
        q: [B, T, N, H].
        k: [B, T, K, H] with N a multiple of K.
        v: like k.
        visibility: who may look at whom.
        window: of a sliding layer; None in a full one.
    """
    if config.attention != "splash":
        # "auto" as well: the kernel saves log-probabilities on TPU no memory and meets no fewer
        # pairs in sliding layers.
        return attend_blocks(q, k, v, visibility, window)
    obstacle = _obstacle(q, visibility, window)
    if obstacle is None:
        segments, block = visibility.segments, config.flash_attention_block_size
        return splash_attend(q, k, v, segments, window, largest_block=block)
    logging.log_first_n(
        logging.WARNING,
        "attention_implementation='splash': %s, so XLA's attention runs there.",
        3,
        obstacle,
    )
    return attend_blocks(q, k, v, visibility, window)


def _obstacle(q: jax.Array, visibility: Visibility, window: int | None) -> str | None:
    """Why the splash kernel cannot run, or None."""
    length, head_dim = q.shape[1], q.shape[3]
    if platform() != "tpu":
        return f"the kernel is for TPU, and this is compiled for {platform()}"
    if length <= DENSE_LENGTH:
        return f"rows of {length} tokens are no longer than {DENSE_LENGTH}"
    if head_dim % LANES:
        return f"the head size is {head_dim}, which is no multiple of {LANES}"
    if visibility.visible is not None:
        return "the caller gives a mask of all pairs of tokens"
    if window is not None and visibility.blocks is not None:
        return "tokens of an image look both ways in sliding layers"
    return None


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
        q, k, v = (_pad(x, padding) for x in (q, k, v))
        visibility = visibility.padded(padding)
    ahead = window if window is not None and visibility.blocks is not None else 0

    def group(first: int, end: int, keys: int) -> jax.Array:
        def block(q: jax.Array, start: jax.Array) -> jax.Array:
            first_key = jnp.clip(start + BLOCK + ahead - keys, 0, k.shape[1] - keys)
            near = (jax.lax.dynamic_slice_in_dim(x, first_key, keys, axis=1) for x in (k, v))
            mask = visibility.tile(window, (start, BLOCK), (first_key, keys))
            return attend(q, *near, mask)

        return _map_blocks(block, q[:, first:end], first)

    groups = block_groups(q.shape[1], window, ahead)
    return jnp.concatenate([group(*g) for g in groups], axis=1)[:, :length]


def attend_all_ways(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
    """`attend` of every token to every valid one, a block of queries at a time in long rows.

    q, k and v are [B, T, N, H] and valid is bool [B, T]. Nothing [N, T, T] exists.
    """
    length = q.shape[1]
    mask = valid[:, None, :]
    if length <= DENSE_LENGTH:
        return attend(q, k, v, mask)
    q = _pad(q, -length % BLOCK)
    return _map_blocks(lambda q, _: attend(q, k, v, mask), q, 0)[:, :length]


def _pad(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0)))


def _map_blocks(
    function: Callable[[jax.Array, jax.Array], jax.Array], q: jax.Array, first: int
) -> jax.Array:
    """`function(block of BLOCK queries, slot of its first)` of every block, one after the other.

    The backward pass makes each block's result again. q is [B, T, N, H] with T a multiple of
    BLOCK; its first slot is `first`.
    """
    function = jax.checkpoint(function)
    blocks = q.reshape(q.shape[0], -1, BLOCK, *q.shape[2:])
    starts = first + BLOCK * jnp.arange(blocks.shape[1])
    out = jax.lax.map(lambda xs: function(*xs), (jnp.moveaxis(blocks, 1, 0), starts))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


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
            out = attend_rows(self.config, q, k, v, mask, self.spec.window)
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
