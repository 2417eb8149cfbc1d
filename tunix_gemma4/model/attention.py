# SPDX-License-Identifier: Apache-2.0
"""Attention of the text decoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from ..config import LayerSpec, ModelConfig
from ..sharding import constrain, platform
from .blockwise import Tiles, attend_tiles, causal_tiles, sliding_tiles, whole_tiles
from .cache import LayerCache, is_ring, store
from .kernels.splash import LANES, splash_attend
from .layers import RMSNorm, linear, rotate
from .lora import project
from .masks import Given, Visibility

KeysValues = tuple[jax.Array, jax.Array]

# Queries, and in full layers keys, that meet at once; rows of at most two blocks meet all at once.
BLOCK, CPU_BLOCK = 256, 128
# From here on a full layer's blocks are twice as long.
LONG = 2048
# Kernels, by what they are for.
_PLATFORMS = {"splash": "tpu", "triton": "gpu"}


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
    if not config.wants_kernel:
        # "auto" as well: no kernel's speed was measured, and splash saves no memory.
        return attend_blocks(q, k, v, visibility, window)
    wanted = config.attention
    if wanted == "flash":
        wanted = "triton" if platform() == "gpu" else "splash"
    obstacle = _obstacle(wanted, q, visibility, window)
    if obstacle is not None:
        logging.log_first_n(
            logging.WARNING,
            "attention_implementation=%r: %s, so XLA's attention runs there.",
            3,
            *(wanted, obstacle),
        )
        return attend_blocks(q, k, v, visibility, window)
    if wanted == "triton":
        return attend_blocks(q, k, v, visibility, window, kernel=True)
    segments, block = visibility.segments, config.flash_attention_block_size
    return splash_attend(q, k, v, segments, window, largest_block=block)


def _obstacle(kernel: str, q: jax.Array, visibility: Visibility, window: int | None) -> str | None:
    """Why a kernel cannot run, or None."""
    length, head_dim = q.shape[1], q.shape[3]
    wanted, found = _PLATFORMS[kernel], platform()
    if found != wanted:
        return f"the kernel is for {wanted.upper()}, and this is compiled for {found}"
    if length <= 2 * BLOCK:
        return f"rows of {length} tokens are no longer than {2 * BLOCK}"
    if visibility.visible is not None:
        return "the caller gives a mask of all pairs of tokens"
    if kernel == "triton":
        power = head_dim & (head_dim - 1) == 0 and head_dim >= 16
        return None if power else f"the head size is {head_dim}, which is no power of two from 16"
    if head_dim % LANES:
        return f"the head size is {head_dim}, which is no multiple of {LANES}"
    if window is not None and visibility.blocks is not None:
        return "tokens of an image look both ways in sliding layers"
    return None


def attend_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    window: int | None,
    *,
    kernel: bool = False,
) -> jax.Array:
    """`attend` over whole rows of T tokens, a block of queries and one of keys at a time.

    A sliding layer's queries meet the keys of their window alone, so that cost grows with
    T x window; a full layer's meet no block behind them. Nothing [N, T, T] exists. With `kernel`
    the forward pass is `triton_forward`.
    """
    length = q.shape[1]
    block = block_size(length if window is None else 0)
    if length <= 2 * block:
        return attend(q, k, v, visibility.tile(window, (0, length), (0, length)))
    padding = -length % block
    if padding:
        q, k, v = (_pad(x, padding) for x in (q, k, v))
        visibility = visibility.padded(padding)
    tiles = row_tiles(q.shape[1], block, window, both_ways=visibility.blocks is not None)
    return attend_tiles(tiles, window, kernel, q, k, v, visibility)[:, :length]


def attend_given(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, tiles: Tiles | None = None
) -> jax.Array:
    """`attend` under any mask [B, 1 or T, S], a block of queries at a time in long rows.

    `tiles` are known to hold every visible pair; None: each query meets all keys. Nothing
    [N, T, S] exists.
    """
    length, block = q.shape[1], block_size()
    if length <= 2 * block:
        return attend(q, k, v, mask)
    padding = -length % block
    q = _pad(q, padding)
    if mask.shape[1] > 1:
        mask = jnp.pad(mask, ((0, 0), (0, padding), (0, 0)))
    tiles = tiles or whole_tiles(q.shape[1], block, k.shape[1])
    return attend_tiles(tiles, None, False, q, k, v, Given(mask))[:, :length]


def block_size(causal_length: int = 0) -> int:
    """Queries handled at once: few for the caches of a CPU, more where causal tiles are many."""
    if platform() == "cpu":
        return CPU_BLOCK
    return 2 * BLOCK if causal_length >= LONG else BLOCK


def row_tiles(length: int, block: int, window: int | None, *, both_ways: bool) -> Tiles:
    """Of whole rows of `length` tokens, a multiple of `block`.

    `both_ways` says that queries of a sliding layer may look forward too.
    """
    if window is not None:
        ahead = window if both_ways else 0
        tiles = sliding_tiles(length, block, length, back=_back(window, block), ahead=ahead)
        if tiles.keys < length or both_ways:
            return tiles
    return causal_tiles(length, block)


def _back(window: int, block: int) -> int:
    """Whole blocks that reach to a query's first key, window - 1 before it."""
    return block * -(-(window - 1) // block)


def _pad(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0)))


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
        own = () if self.spec.shares_kv else self._own()
        q, *raw = map(self._heads, project(x, self.q_proj, *own))
        q = rotate(self.q_norm(q), cos_sin)  # [B, T, N, H]
        if self.spec.shares_kv:
            k, v = shared
        else:
            k, v, cache = self._keys_values(raw, cos_sin, cache)
        if isinstance(mask, Visibility):
            out = attend_rows(self.config, q, k, v, mask, self.spec.window)
        else:
            out = attend_given(q, k, v, mask, self._ring_tiles(q.shape[1], k.shape[1]))
        return self.o_proj(out.reshape(*x.shape[:2], -1)), (k, v), cache

    def _ring_tiles(self, length: int, keys: int) -> Tiles | None:
        """Of `length` new tokens and what a ring held before them; None where there is no ring."""
        if not is_ring(self.config, self.spec.kind):
            return None
        window, block = self.spec.window, block_size()
        ahead = window if self.config.image_blocks_attend_both_ways else 0
        reach = {"back": _back(window, block), "ahead": ahead, "cached": keys - length}
        return sliding_tiles(length + -length % block, block, keys, **reach)

    def _heads(self, x: jax.Array) -> jax.Array:
        return constrain(
            x.reshape(*x.shape[:2], -1, self.spec.head_dim), "batch", None, "heads", None
        )

    def _own(self) -> tuple[nnx.Linear, ...]:
        """Projections to keys and, where they are not the keys' own, values."""
        return (self.k_proj,) if self.spec.k_eq_v else (self.k_proj, self.v_proj)

    def _keys_values(self, raw, cos_sin, cache):
        """Of what `_own` gave, each [B, T, K, H]."""
        k, v = rotate(self.k_norm(raw[0]), cos_sin), self.v_norm(raw[-1])
        if cache is None:
            return k, v, None
        return store(self.config, self.spec, cache, k, v)
