# SPDX-License-Identifier: Apache-2.0
"""Products with adapted kernels, `x W + scale (x A) B`: all projections of one input together."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding import gathered, platform


def project(x: jax.Array, *projections: nnx.Linear) -> list[jax.Array]:
    """`[projection(x) for projection in projections]`.

    The adapters' narrow matrices A meet x as one: it is read once, forward and for their gradient,
    and gets one gradient from them instead of one from each.
    """
    adapted = [p for p in projections if _is_adapted(p)]
    products = iter(_meet(x, adapted) if adapted else ())
    return [next(products) if _is_adapted(p) else p(x) for p in projections]


def _is_adapted(projection: nnx.Linear) -> bool:
    # Qwix, where it adapts a model itself, adds matrices to projections that stay as they are.
    return hasattr(projection, "lora")


def _meet(x: jax.Array, adapted: list[nnx.Linear]) -> list[jax.Array]:
    # Gathered first: else rows would travel to the chips that store parts of the long side.
    # Scaled while it is narrow.
    a = [p.lora.scale * gathered(p.kernel_lora_a) for p in adapted]
    b = [gathered(p.kernel_lora_b) for p in adapted]
    if _merging_pays(x, adapted):
        return _merged_dots(x, [p.kernel[...] for p in adapted], a, b)
    narrow = _parts(_dot32(x, jnp.concatenate(a, axis=1)), a)
    products = [p.base(x) for p in adapted]
    return [
        (y + _dot32(update, matrix)).astype(y.dtype)
        for y, update, matrix in zip(products, narrow, b, strict=True)
    ]


def _parts(joined: jax.Array, matrices: list[jax.Array]) -> list[jax.Array]:
    """The columns of `joined` that belong to each of the `matrices` it comes from."""
    ends = itertools.accumulate(matrix.shape[1] for matrix in matrices)
    return jnp.split(joined, list(ends)[:-1], axis=-1)


def _merging_pays(x: jax.Array, adapted: list[nnx.Linear]) -> bool:
    """Whether `W + A B` takes fewer operations than `(x A) B`, and as exact as it.

    Only a CPU multiplies float32 as float32: elsewhere, and in narrower kernels, updates far
    smaller than their weights would be rounded away.
    """
    if platform() != "cpu" or x.dtype != jnp.float32:
        return False
    if not all(isinstance(p.kernel, nnx.Param) for p in adapted):
        return False
    if not all(p.kernel.dtype == p.dtype == jnp.float32 for p in adapted):
        return False
    size, columns = x.shape[-1], sum(p.kernel.shape[1] for p in adapted)
    return x.size // size * (size + columns) > size * columns


@jax.custom_vjp
def _merged_dots(
    x: jax.Array, kernels: list[jax.Array], a: list[jax.Array], b: list[jax.Array]
) -> list[jax.Array]:
    """`x (W + A B)` for each kernel W; gradients of A and B by way of their narrow side.

    Without a gradient it is `x W + (x A) B`: XLA for CPU would make all sums W + A B of a forward
    pass first, a copy of the model.
    """
    return [x @ kernel + (x @ a) @ b for kernel, a, b in zip(kernels, a, b, strict=True)]


def _merged(*matrices: list[jax.Array]) -> list[jax.Array]:
    return [kernel + a @ b for kernel, a, b in zip(*matrices, strict=True)]


def _merged_forward(x: Any, kernels: Any, a: Any, b: Any) -> tuple[list[jax.Array], tuple]:
    frozen = not any(kernel.perturbed for kernel in kernels)
    values = jax.tree.map(lambda one: one.value, (x, kernels, a, b), is_leaf=_is_primal)
    x, *matrices = values
    # What is static must be told by the structure.
    return [x @ merged for merged in _merged(*matrices)], (*values, None if frozen else ())


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _merged_backward(saved: tuple, gradients: list[jax.Array]) -> tuple:
    x, kernels, a, b, trained = saved
    last, rows = x.ndim - 1, tuple(range(x.ndim - 1))
    pairs = list(zip(gradients, b, strict=True))
    narrow = jnp.concatenate([_contract(g, matrix, last, 1) for g, matrix in pairs], axis=-1)
    of_a = _parts(_contract(narrow, x, rows, rows).T, a)
    lowered = _parts(_contract(x, jnp.concatenate(a, axis=1), last, 0), a)
    of_b = [_contract(u, g, rows, rows) for u, g in zip(lowered, gradients, strict=True)]
    merged = _merged(kernels, a, b)
    of_x = sum(g @ kernel.T for g, kernel in zip(gradients, merged, strict=True))
    of_kernels = [None if trained is None else _contract(x, g, rows, rows) for g in gradients]
    return of_x, of_kernels, of_a, of_b


_merged_dots.defvjp(_merged_forward, _merged_backward, symbolic_zeros=True)


@jax.custom_vjp
def _dot32(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x @ matrix` in float32, one side of the matrix being far longer than the other.

    The gradient of the matrix starts from the narrower of `x` and the output's gradient: JAX's own
    may start from the wide one, which XLA for CPU transposes to multiply it. A bfloat16 x is not
    converted first, so the backward pass keeps it as it is.
    """
    return _contract(x, matrix, x.ndim - 1, 0)


def _contract(one: jax.Array, other: jax.Array, *axes: Any) -> jax.Array:
    """Sum of products over `axes[0]` of `one` and `axes[1]` of `other`, in float32."""
    contracted = tuple((axis,) if isinstance(axis, int) else axis for axis in axes)
    return jax.lax.dot_general(
        one, other, (contracted, ((), ())), preferred_element_type=jnp.float32
    )


def _dot32_forward(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple]:
    return _dot32(x, matrix), (x, matrix)


def _dot32_backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix = saved
    rows = tuple(range(x.ndim - 1))
    of_x = _contract(gradient, matrix, len(rows), 1).astype(x.dtype)
    if x.shape[-1] < gradient.shape[-1]:
        return of_x, _contract(x, gradient, rows, rows)
    return of_x, _contract(gradient, x, rows, rows).T


_dot32.defvjp(_dot32_forward, _dot32_backward)
