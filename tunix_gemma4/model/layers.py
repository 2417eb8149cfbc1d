# SPDX-License-Identifier: Apache-2.0
"""What blocks are built of: norms, projections, MLPs, rotary embeddings, values that never train.

And two ways of holding less at once: `remat_call` and `over_chunks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from ..config import ModelConfig
from ..sharding import constrain, metadata

# Compiled, so that it is traced once for each shape and not for each layer.
_init_kernel = jax.jit(nnx.initializers.lecun_normal(), static_argnums=(1, 2))


class HasBuffers:
    """A module that holds what HF keeps as buffers: stored, loaded and saved, never trained.

    They are plain Python values (`float`, or `tuple` of floats), static attributes of their
    module: an optimizer over `nnx.Param` cannot reach them, and Tunix's weight sync, which knows
    `nnx.Param` alone, does not see them. Set them before the first jit.
    """

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Attribute name to the shape its tensor has in a checkpoint."""
        raise NotImplementedError


def linear(
    in_features: int,
    out_features: int,
    *,
    axes: tuple[str | None, str | None],
    config: ModelConfig,
    rngs: nnx.Rngs,
    dtype: jnp.dtype | None = None,
    heads: int | None = None,
) -> nnx.Linear:
    """A projection without bias; `kernel` is [in, out], HF's `weight` transposed.

    `heads` is their number where one of `axes` is of heads.
    """
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=False,
        dtype=dtype or config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=_init_kernel,
        kernel_metadata=metadata(*axes, heads=heads),
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """Divides by the root mean square over the last axis, then scales.

    Statistics and scale in float32, result in the input's dtype. Unlike Gemma 1 to 3 the scale
    is `weight`, not `1 + weight`; `size=None` has no scale and no parameter.

    Source: transformers 5.12 `Gemma4RMSNorm`.
    """

    def __init__(self, size: int | None, *, config: ModelConfig, eps: float | None = None):
        self.eps = config.rms_norm_eps if eps is None else eps
        if size is None:
            self.weight = None
        else:
            self.weight = nnx.Param(jnp.ones((size,), config.param_dtype), **metadata(None))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight[...].astype(jnp.float32)
        return y.astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh approximation, HF's `gelu_pytorch_tanh`."""
    return jax.nn.gelu(x, approximate=True)


class MLP(nnx.Module):
    """`down(gelu(gate(x)) * up(x))`, of projections that `make` makes with its `options`.

    Source: transformers 5.12 `Gemma4TextMLP`, `Gemma4VisionMLP`.
    """

    def __init__(self, size: int, width: int, *, make: Callable[..., Any] = linear, **options: Any):
        self.gate_proj = make(size, width, axes=("embed", "mlp"), **options)
        self.up_proj = make(size, width, axes=("embed", "mlp"), **options)
        self.down_proj = make(width, size, axes=("mlp", "embed"), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))


class ClippableLinear(nnx.Module, HasBuffers):
    """A projection whose input and output are clamped to bounds stored in the checkpoint.

    Each projection has bounds of its own. Towers without clipping keep the extra level of naming
    (`.linear`) and infinite bounds, which no checkpoint stores.

    Source: transformers 5.12 `Gemma4ClippableLinear`.
    """

    def __init__(self, in_features: int, out_features: int, *, config: ModelConfig, **options: Any):
        """As `linear`, which takes the `options`."""
        self.linear = linear(in_features, out_features, config=config, **options)
        self.clipped = config.tower.use_clipped_linears
        self.input_min, self.input_max = -math.inf, math.inf
        self.output_min, self.output_max = -math.inf, math.inf

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        names = ("input_min", "input_max", "output_min", "output_max")
        return dict.fromkeys(names, ()) if self.clipped else {}

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.clipped:
            return self.linear(x)
        y = self.linear(jnp.clip(x, self.input_min, self.input_max))
        return jnp.clip(y, self.output_min, self.output_max)


def frequencies(
    head_dim: int, theta: float, *, fraction: float = 1.0, factor: float = 1.0
) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [head_dim / 2].

    Only the first `fraction` of the pairs turn; the others have frequency 0. The exponent's
    denominator stays the whole head ("proportional"), so the low frequencies are dropped, not
    squeezed.

    Source: transformers 5.12 `_compute_proportional_rope_parameters`.
    """
    turning = int(fraction * head_dim // 2)
    exponents = np.arange(0, 2 * turning, 2, dtype=np.float32) / np.float32(head_dim)
    result = np.zeros(head_dim // 2, np.float32)
    result[:turning] = 1.0 / np.float32(theta) ** exponents
    return result / np.float32(factor)


def angles(positions: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine for positions [..., T], float32 [..., T, head_dim / 2]."""
    turned = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(turned), jnp.sin(turned)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (j, j + H/2) of each head of x [B, T, N, H], in float32.

    The result has the dtype of x.
    """
    cos, sin = (part[..., None, :] for part in cos_sin)  # [B, T, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def rotate_2d(
    x: jax.Array, x_angles: tuple[jax.Array, jax.Array], y_angles: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Turns the first half of each head of x [B, M, N, H] by column, the second by row."""
    by_column, by_row = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([rotate(by_column, x_angles), rotate(by_row, y_angles)], axis=-1)


def remat_call(module: nnx.Module, enabled: bool, *args):
    """`module(*args)`, recomputed in the backward pass where `enabled`.

    Qwix creates LoRA parameters during a traced call, marking modules with `qwix_rngs`; they
    would be lost inside a checkpointed function, so that one call runs plainly.
    """
    if not enabled or getattr(module, "qwix_rngs", None) is not None:
        return module(*args)
    graphdef, adapters, weights = nnx.split(module, nnx.LoRAParam, ...)

    def call(adapters, weights, *args):
        # Fused with their use, the slices of stacked weights make programs that take longer to
        # compile and more memory to run. Two barriers, because behind a common one frozen weights
        # would have gradients too.
        adapters, weights = map(jax.lax.optimization_barrier, (adapters, weights))
        return nnx.merge(graphdef, adapters, weights)(*args)

    return jax.checkpoint(call)(adapters, weights, *args)


def over_chunks(
    function: Callable[..., tuple[Any, Any]], size: int, *rows: jax.Array, carry: Any = None
) -> tuple[Any, Any]:
    """`function(carry, *rows)` for a chunk of the positions of `rows`, [B, T, ...], at a time.

    For what would fill a chip for all of them at once. Chunks are alike and have at most `size`
    positions, the last with zeros where there are none left.

    Returns:
        The last carry, and what else `function` returned, joined to [B, T, ...].
    """
    batch, length = rows[0].shape[:2]
    count = -(-length // size)
    size = -(-length // count)
    padding = count * size - length
    if count == 1:
        return function(carry, *rows)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :length]
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    xs = tuple(map(split, rows))
    carry, parts = jax.lax.scan(lambda carry, xs: function(carry, *xs), carry, xs)
    return carry, jax.tree.map(join, parts)


def as_array(cotangent: jax.Array | SymbolicZero) -> jax.Array:
    """A cotangent of a `custom_vjp` with symbolic zeros, zeros or not."""
    if isinstance(cotangent, SymbolicZero):
        shape: Any = cotangent.aval
        return jnp.zeros(shape.shape, shape.dtype)
    return cotangent
