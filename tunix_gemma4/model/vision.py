# SPDX-License-Identifier: Apache-2.0
"""The vision tower of E2B, E4B, 26B-A4B and 31B: patches in, soft tokens out.

Source: transformers 5.12 `Gemma4VisionModel` and its parts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import ModelConfig, RematConfig
from ..sharding import constrain, metadata
from .attention import attend
from .layers import (
    MLP,
    ClippableLinear,
    HasBuffers,
    RMSNorm,
    angles,
    frequencies,
    linear,
    remat_call,
    rotate_2d,
)
from .masks import AttentionMask
from .scan import LayerStack

Angles = tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class PatchEmbedder(nnx.Module):
    """Projects pixels, moved to [-1, 1], and adds a learned embedding per column and row."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        vision = config.tower
        self.dtype = config.dtype
        sizes = vision.patch_dim, vision.hidden_size
        self.input_proj = linear(*sizes, axes=(None, "embed"), config=config, rngs=rngs)
        shape = (2, vision.position_embedding_size, vision.hidden_size)
        table = nnx.initializers.normal(0.02)(rngs.params(), shape, config.param_dtype)
        self.position_embedding_table = nnx.Param(table, **metadata(None, None, "embed"))

    def __call__(self, pixels: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        """pixels float32 [I, M, 3 p p] in [0, 1], positions int [I, M, 2] to [I, M, D]."""
        x = self.input_proj((2 * (pixels - 0.5)).astype(self.dtype))
        clamped = jnp.maximum(positions, 0)
        table = self.position_embedding_table[...].astype(self.dtype)
        placed = table[0][clamped[..., 0]] + table[1][clamped[..., 1]]
        return x + jnp.where(valid[..., None], placed, 0)


class VisionAttention(nnx.Module):
    """Attention of every patch to every patch that is not padding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        vision = config.tower
        self.config, self.head_dim = config, vision.head_dim
        size, heads = vision.hidden_size, vision.num_attention_heads
        inner = heads * vision.head_dim
        make = {"config": config, "rngs": rngs, "heads": heads}
        self.q_proj, self.k_proj, self.v_proj = (
            ClippableLinear(size, inner, axes=("embed", "vision_heads"), **make) for _ in range(3)
        )
        self.o_proj = ClippableLinear(inner, size, axes=("vision_heads", "embed"), **make)
        norm = lambda size: RMSNorm(size, config=config, eps=vision.rms_norm_eps)  # noqa: E731
        self.q_norm, self.k_norm, self.v_norm = map(norm, (self.head_dim, self.head_dim, None))

    def __call__(self, x: jax.Array, by_axis: Angles, valid: jax.Array) -> jax.Array:
        projected = [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (y.reshape(*x.shape[:2], -1, self.head_dim) for y in projected)  # [I, M, N, H]
        q, k = (rotate_2d(y, *by_axis) for y in (self.q_norm(q), self.k_norm(k)))
        out = attend(self.config, q, k, self.v_norm(v), AttentionMask(valid[:, None, :]))
        return self.o_proj(out.reshape(*x.shape[:2], -1))


class VisionLayer(nnx.Module):
    """Attention and MLP, each between two norms."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        vision = config.tower
        self.self_attn = VisionAttention(config, rngs=rngs)
        size, width = vision.hidden_size, vision.intermediate_size
        self.mlp = MLP(size, width, make=ClippableLinear, config=config, rngs=rngs)
        norm = lambda: RMSNorm(size, config=config, eps=vision.rms_norm_eps)  # noqa: E731
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()

    def __call__(self, x: jax.Array, by_axis: Angles, valid: jax.Array) -> jax.Array:
        attended = self.self_attn(self.input_layernorm(x), by_axis, valid)
        x = x + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed)


class VisionEncoder(nnx.Module):
    """The vision layers, one by one or stacked."""

    stack: LayerStack  # In place of `layers`.

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        count = config.tower.num_hidden_layers
        self.layers = nnx.List([VisionLayer(config, rngs=rngs) for _ in range(count)])

    def __call__(self, x: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        vision = self.config.tower
        frequency = frequencies(vision.head_dim // 2, vision.rope_theta)
        by_axis = tuple(angles(positions[..., axis], frequency) for axis in (0, 1))
        remat = self.config.remat is not RematConfig.NONE

        def run(layer: VisionLayer, x: jax.Array) -> jax.Array:
            return remat_call(layer, remat, constrain(x, "batch", None, None), by_axis, valid)

        if hasattr(self, "stack"):
            return self.stack.scan(lambda layer, x, _: run(layer, x), x, dtype=x.dtype)
        for layer in self.layers:
            x = run(layer, x)
        return x


class VisionTower(nnx.Module, HasBuffers):
    """Embeds, encodes, pools and, for 26B-A4B and 31B, standardises."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        vision = config.tower
        self.config = config
        self.patch_embedder = PatchEmbedder(config, rngs=rngs)
        self.encoder = VisionEncoder(config, rngs=rngs)
        self.std_bias = (0.0,) * vision.hidden_size
        self.std_scale = (1.0,) * vision.hidden_size

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        vision = self.config.tower
        names = ("std_bias", "std_scale") if vision.standardize else ()
        return dict.fromkeys(names, (vision.hidden_size,))

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encodes images float32 [I, M, 3 p p + 2].

        Returns soft tokens [I, M / k**2, D], k the pooling kernel size, and which are valid:
        bool [I, M / k**2]. Pooling and standardisation run in float32: the bias of the released
        checkpoints is too large for float16.
        """
        vision = self.config.tower
        pixels, positions = images[..., :-2], images[..., -2:].astype(jnp.int32)
        valid = positions[..., 0] >= 0
        x = self.patch_embedder(pixels, positions, valid)
        x = self.encoder(x, positions, valid)
        pooled, filled = pool(x, positions, valid, kernel=vision.pooling_kernel_size)
        pooled = pooled * vision.hidden_size**0.5
        if vision.standardize:
            pooled = (pooled - jnp.array(self.std_bias)) * jnp.array(self.std_scale)
        return pooled.astype(self.config.dtype), filled


def pool(
    x: jax.Array, positions: jax.Array, valid: jax.Array, *, kernel: int
) -> tuple[jax.Array, jax.Array]:
    """Means over kernel x kernel patches, row by row, in float32.

    x [I, M, D] to [I, M / kernel**2, D], of which the cells that bool [I, M / kernel**2] marks
    received patches.
    """
    columns = jnp.maximum(positions[..., 0], 0).max(axis=-1, keepdims=True) + 1
    cell = positions // kernel
    index = cell[..., 0] + (columns // kernel) * cell[..., 1]
    # One-hot of a negative index is zero, so padding patches fall away.
    index = jnp.where(valid, index, -1)
    member = jax.nn.one_hot(index, x.shape[1] // kernel**2, dtype=jnp.float32)  # [I, M, S]
    pooled = jnp.einsum("ims,imd->isd", member, x.astype(jnp.float32)) / kernel**2
    return pooled, member.any(axis=1)


class VisionProjector(nnx.Module):
    """Norms soft tokens, then projects them to the decoder's width: in this order."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        vision = config.tower
        self.norm = RMSNorm(None, config=config, eps=vision.rms_norm_eps)
        sizes = vision.hidden_size, config.hidden_size
        self.embedding_projection = linear(*sizes, axes=(None, "embed"), config=config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.embedding_projection(self.norm(x))
