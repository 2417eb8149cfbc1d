# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts that stands beside the dense MLP in every layer of 26B-A4B."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import ModelConfig
from ..sharding import metadata
from .experts import expert_mix
from .layers import RMSNorm, linear


class Router(nnx.Module):
    """Chooses `top_k_experts` per token, in float32.

    Fed the raw residual, with a norm of its own. The softmax runs over all experts; the chosen
    weights are renormalised and only then scaled per expert, so they need not sum to 1.

    Source: transformers 5.12 `Gemma4TextRouter`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        size, experts = config.hidden_size, config.num_experts
        self.top_k, self.root = config.top_k_experts, size**-0.5
        self.norm = RMSNorm(None, config=config)
        self.proj = linear(
            size, experts, axes=("embed", None), config=config, rngs=rngs, dtype=jnp.float32
        )
        self.scale = nnx.Param(jnp.ones((size,), config.param_dtype), **metadata(None))
        self.per_expert_scale = nnx.Param(
            jnp.ones((experts,), config.param_dtype), **metadata(None)
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., D] to weights float32 and expert indices int32, both [..., top_k]."""
        x = self.norm(x.astype(jnp.float32)) * self.scale[...].astype(jnp.float32) * self.root
        probabilities = jax.nn.softmax(self.proj(x), axis=-1)
        weights, indices = jax.lax.top_k(probabilities, self.top_k)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights * self.per_expert_scale[...].astype(jnp.float32)[indices], indices


class Experts(nnx.Module):
    """All experts' gated MLPs; see `expert_mix`.

    `gate_up_proj` is [E, D, 2F], gate first; `down_proj` is [E, F, D]: HF's with the last two
    axes exchanged. On a mesh each chip holds some of the experts, whole.

    Source: transformers 5.12 `Gemma4TextExperts`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        size, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        shapes = {"gate_up_proj": (experts, size, 2 * width), "down_proj": (experts, width, size)}
        for name, shape in shapes.items():
            value = init(rngs.params(), shape, config.param_dtype)
            setattr(self, name, nnx.Param(value, **metadata("experts", None, None)))

    def __call__(self, x: jax.Array, weights: jax.Array, indices: jax.Array) -> jax.Array:
        """x [B, T, D], weights and indices [B, T, top_k] to [B, T, D]."""
        return expert_mix(x, weights, indices, self.gate_up_proj[...], self.down_proj[...])
