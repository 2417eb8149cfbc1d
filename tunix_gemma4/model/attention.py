# SPDX-License-Identifier: Apache-2.0
"""Attention of the text decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from ..config import LayerSpec, ModelConfig
from ..sharding import constrain, platform
from .blockwise import block_pairs, blockwise_attention, shared_block_size
from .cache import LayerCache, store
from .kernels.splash import LANES, splash_attend
from .layers import RMSNorm, linear, rotate
from .lora import project
from .masks import AttentionMask

KeysValues = tuple[jax.Array, jax.Array]

# Queries, and in full layers keys, that meet at once; rows of at most two blocks meet all at once.
BLOCK, CPU_BLOCK = 256, 128
# From here on a full layer's blocks are twice as long.
LONG = 2048
# Experimental kernels, by what they are for.
_PLATFORMS = {"splash": "tpu", "triton": "gpu"}


def attend(
    config: ModelConfig, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask
) -> jax.Array:
    """Softmax attention with scale 1, softmax in float32, by whatever fits device and case.

    In long rows a block of queries meets a block of keys at a time, so that nothing [N, T, S]
    exists: in a sliding layer the keys of their window alone, in a full one none behind them. A
    kernel may take the place of that in whole rows, if `attention_implementation` asks for one.

    q is [B, T, N, H], k and v are [B, S, K, H] with N a multiple of K; the result is like q, in its
    dtype. A query that may see nothing gets a mean of values, which is finite.
    """
    kernel = _kernel(config, q, mask)
    if kernel == "splash":
        block = config.flash_attention_block_size
        return splash_attend(q, k, v, mask.segments, mask.window, largest_block=block)
    length = q.shape[1]
    block = block_size(length if mask.of_whole_rows and mask.window is None else 0)
    if mask.shared is not None:
        block = shared_block_size(mask, length, (block, block_size(), block_size() // 2))
    if length <= 2 * block:
        return attend_at_once(q, k, v, mask.block((0, length), (0, k.shape[1])))
    if padding := -length % block:
        q = _pad(q, padding)
        if mask.of_whole_rows:
            k, v = _pad(k, padding), _pad(v, padding)
        mask = mask.padded(padding)
    pairs = block_pairs(mask, block, q.shape[1], k.shape[1])
    out: Any = blockwise_attention(pairs, kernel == "triton", q, k, v, mask)
    return out[:, :length]


def attend_at_once(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`attend` by XLA for all pairs at once; mask bool [B, 1 or T, S]."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0)


def block_size(causal_length: int = 0) -> int:
    """Queries handled at once: few for the caches of a CPU, more where causal blocks are many."""
    if platform() == "cpu":
        return CPU_BLOCK
    return 2 * BLOCK if causal_length >= LONG else BLOCK


def _pad(x: jax.Array, count: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0)))


def _kernel(config: ModelConfig, q: jax.Array, mask: AttentionMask) -> str | None:
    """The kernel that is wanted and can run, if there is one; says in the log why it cannot."""
    if not (config.wants_kernel and mask.of_whole_rows):
        # "auto" as well: no kernel's speed was measured, and splash saves no memory.
        return None
    wanted = config.attention
    if wanted == "flash":
        wanted = "triton" if platform() == "gpu" else "splash"
    obstacle = _obstacle(wanted, q, mask)
    if obstacle is None:
        return wanted
    message = "attention_implementation=%r: %s, so XLA's attention runs there."
    logging.log_first_n(logging.WARNING, message, 3, wanted, obstacle)
    return None


def _obstacle(kernel: str, q: jax.Array, mask: AttentionMask) -> str | None:
    """Why a kernel cannot run, or None."""
    length, head_dim = q.shape[1], q.shape[3]
    wanted, found = _PLATFORMS[kernel], platform()
    if found != wanted:
        return f"the kernel is for {wanted.upper()}, and this is compiled for {found}"
    if length <= 2 * BLOCK:
        return f"rows of {length} tokens are no longer than {2 * BLOCK}"
    if mask.visible is not None:
        return "the caller gives a mask of all pairs of tokens"
    if mask.shared is not None:
        return "completions share their prompt's row"
    if kernel == "triton":
        power = head_dim & (head_dim - 1) == 0 and head_dim >= 16
        return None if power else f"the head size is {head_dim}, which is no power of two from 16"
    if head_dim % LANES:
        return f"the head size is {head_dim}, which is no multiple of {LANES}"
    if mask.looks_ahead:
        return "tokens of an image look both ways in sliding layers"
    return None


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
        mask: AttentionMask,
        cache: LayerCache | None,
        shared: KeysValues | None,
    ) -> tuple[jax.Array, KeysValues, LayerCache | None]:
        """Returns the output [B, T, D], the keys and values attended to, and the new cache."""
        q, *raw = map(self._heads, project(x, self.q_proj, *self._own()))
        q = rotate(self.q_norm(q), cos_sin)  # [B, T, N, H]
        if shared is None:
            k, v, cache = self._keys_values(raw, cos_sin, cache)
        else:
            k, v = shared
        out = attend(self.config, q, k, v, mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), (k, v), cache

    def _heads(self, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:2], -1, self.spec.head_dim)
        return constrain(x, "batch", None, "heads", None)

    def _own(self) -> tuple[nnx.Linear, ...]:
        """Projections to keys and, where they are not the keys' own, values."""
        if self.spec.shares_kv:
            return ()
        return (self.k_proj,) if self.spec.k_eq_v else (self.k_proj, self.v_proj)

    def _keys_values(self, raw, cos_sin, cache):
        """Of what `_own` gave, each [B, T, K, H]."""
        k, v = rotate(self.k_norm(raw[0]), cos_sin), self.v_norm(raw[-1])
        return (k, v, None) if cache is None else store(self.config, self.spec, cache, k, v)
