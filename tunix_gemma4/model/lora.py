# SPDX-License-Identifier: Apache-2.0
"""The LoRA product, `x W + scale (x A) B`, and the projection that computes it."""

from __future__ import annotations

import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from ..sharding import gathered, is_variable


class LoraLinear(nnx.Linear):
    """`x W + scale (x A) B`: A and B float32, the sum rounded once, to the dtype of `x W`.

    Takes the place of a projection under its name; `plain_linear` leads back. `kernel` is an
    `nnx.Param`, or a `qwix.QArray` of two: `qvalue` [in, out] and `scale` [in / tile, out].

    Source: PEFT 0.21 `Linear`.

    It has the kernel and dtypes of `linear`, A [in, rank] and B [rank, out]. `lora` is the
    `LoraConfig` that it was made by, for who saves it.
    """

    kernel: nnx.Param | qwix.QArray

    def __init__(self, linear: nnx.Linear, a: nnx.LoRAParam, b: nnx.LoRAParam, lora: Any):
        super().__init__(**_arguments(linear, linear.kernel))
        self.kernel = linear.kernel
        self.kernel_dtype = linear.kernel.dtype  # What merging returns the kernel to.
        # Qwix's names of the two, which Tunix looks for when it sends weights to a rollout.
        self.kernel_lora_a, self.kernel_lora_b = a, b
        self.scale, self.lora = lora.scale, lora

    def __call__(self, x: jax.Array) -> jax.Array:
        return project(x, self)[0]

    def base(self, x: jax.Array) -> jax.Array:
        """`x W`."""
        if isinstance(self.kernel, qwix.QArray):
            return _quantized_dot(x.astype(self.dtype), unboxed(self.kernel))
        return super().__call__(x)


def plain_linear(linear: LoraLinear, kernel: nnx.Param) -> nnx.Linear:
    """`linear` without its adapter, of another kernel."""
    plain = nnx.Linear(**_arguments(linear, kernel))
    plain.kernel = kernel
    return plain


def _arguments(linear: nnx.Linear, kernel: nnx.Param) -> dict[str, Any]:
    """Those of an `nnx.Linear` like `linear`, which makes no kernel of its own."""
    names = ("in_features", "out_features", "use_bias", "dtype", "param_dtype", "precision")
    names += ("dot_general", "promote_dtype", "preferred_element_type")
    return {name: getattr(linear, name) for name in names} | {
        "kernel_init": lambda *_: kernel.get_raw_value(),
        "rngs": types.SimpleNamespace(params=lambda: None),
    }


def unboxed(kernel: qwix.QArray) -> qwix.QArray:
    """The kernel with arrays in place of variables."""
    return jax.tree.map(lambda leaf: leaf[...], kernel, is_leaf=is_variable)


@jax.checkpoint
def _quantized_dot(x: jax.Array, kernel: qwix.QArray) -> jax.Array:
    """`x` times the dequantised kernel, which the backward pass dequantises again.

    Without the checkpoint every dequantised kernel would be kept for the backward pass, which is
    the memory that quantising saves.
    """
    return x @ qwix.dequantize(kernel).astype(x.dtype)


def project(x: jax.Array, *projections: nnx.Linear) -> list[jax.Array]:
    """`[projection(x) for projection in projections]`.

    The adapters' narrow matrices A meet x as one: it is read once, forward and for their gradient,
    and gets one gradient from them instead of one from each. The kernels stay apart: joined, they
    would be copied.
    """
    # Where Qwix adapts a model itself, it adds matrices to projections that stay plain.
    adapted = [p for p in projections if isinstance(p, LoraLinear)]
    if not adapted:
        return [p(x) for p in projections]
    # Gathered first: else rows would travel to the chips that store parts of the long side.
    # Scaled while it is narrow.
    a = [p.scale * gathered(p.kernel_lora_a) for p in adapted]
    b = [gathered(p.kernel_lora_b) for p in adapted]
    ends = list(itertools.accumulate(matrix.shape[1] for matrix in a))[:-1]
    narrow = jnp.split(_dot32(x, jnp.concatenate(a, axis=1)), ends, axis=-1)
    updates = zip(narrow, b, strict=True)

    def add_update(y: jax.Array) -> jax.Array:
        # In float32 and rounded once: an update smaller than a rounding of y still counts.
        return (y + _dot32(*next(updates))).astype(y.dtype)

    return [add_update(p.base(x)) if isinstance(p, LoraLinear) else p(x) for p in projections]


@jax.custom_vjp
def _dot32(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix` in float32, one side of the matrix being far longer than the other.

    The gradient of the matrix starts from the narrower of `x` and the output's gradient: JAX's own
    may start from the wide one, which XLA for CPU transposes to multiply it. A bfloat16 x is not
    converted first, so the backward pass keeps it as it is.
    """
    return _contract(x, matrix, (x.ndim - 1,), (0,))


def _contract(one: jax.Array, other: jax.Array, of_one: tuple, of_other: tuple) -> jax.Array:
    """Sum of products over axes of both, in float32."""
    axes = (of_one, of_other), ((), ())
    return jax.lax.dot_general(one, other, axes, preferred_element_type=jnp.float32)


def _dot32_forward(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple]:
    return _dot32(x, matrix), (x, matrix)


def _dot32_backward(saved: tuple, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = saved
    rows = tuple(range(x.ndim - 1))
    d_x = _contract(d_out, matrix, (len(rows),), (1,)).astype(x.dtype)
    # The result has the axes of the first operand first, so the wide one stays as it lies.
    if x.shape[-1] < d_out.shape[-1]:
        return d_x, _contract(x, d_out, rows, rows)
    return d_x, _contract(d_out, x, rows, rows).T


_dot32.defvjp(_dot32_forward, _dot32_backward)
