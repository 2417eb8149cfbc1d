# SPDX-License-Identifier: Apache-2.0
"""Attention of the text decoder."""

from __future__ import annotations

import jax
from flax import nnx

from ..config import LayerSpec, ModelConfig
from ..sharding import constrain
from .cache import LayerCache, store
from .layers import RMSNorm, linear
from .rope import rotate

KeysValues = tuple[jax.Array, jax.Array]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with scale 1, softmax in float32.

    q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K, mask bool [B, 1 or T, S].
    A query that may see nothing gets the mean of all values, which is finite.
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0)


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
        mask: jax.Array,
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
