# SPDX-License-Identifier: Apache-2.0
"""Projections of one input, taken together, compute what each computes by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tunix_gemma4.lora.adapters import LoraConfig, adapt
from tunix_gemma4.model.lora import project
from tunix_gemma4.planning.measure import count_flops

SIZE = 32
COLUMNS, RANKS = (48, 16, 24), (4, None, 3)
ROWS = (2, 40)


def build(dtype=jnp.float32):
    """Three projections of one input: two adapted, with ranks and scales of their own, one not."""
    made = []
    for index, (columns, rank) in enumerate(zip(COLUMNS, RANKS, strict=True)):
        rngs = nnx.Rngs(index)
        options = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        linear = nnx.Linear(SIZE, columns, **options)
        if rank:
            config = LoraConfig(rank=rank, alpha=5)
            linear = adapt(linear, name=str(index), config=config, key=jax.random.key(index))
            b = linear.kernel_lora_b
            b[...] = jax.random.normal(jax.random.key(9 + index), b.shape)
        made.append(linear)
    return nnx.List(made)


def separately(projections, x):
    def one(p):
        y = x @ p.kernel[...]
        if not hasattr(p, "lora"):
            return y
        return y + p.lora.scale * (x @ p.kernel_lora_a[...]) @ p.kernel_lora_b[...]

    return [one(p) for p in projections]


def objective(call):
    def of(projections, x):
        return sum(jnp.sum(jnp.sin(y)) for y in call(projections, x))

    return of


@pytest.mark.parametrize("remat", [False, True])
def test_values_and_all_gradients_are_those_of_each_alone(remat):
    projections = build()
    x = jax.random.normal(jax.random.key(1), (*ROWS, SIZE))
    together = lambda projections, x: project(x, *projections)  # noqa: E731
    for found, expected in zip(together(projections, x), separately(projections, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    together = nnx.remat(together) if remat else together
    both = [nnx.grad(objective(call), argnums=(0, 1)) for call in (together, separately)]
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4),
        *(gradient(projections, x) for gradient in both),
    )


def adapters_step(projections, x):
    """The gradient that training takes: of the adapters and of what lies below."""
    graphdef, adapters, rest = nnx.split(projections, nnx.LoRAParam, ...)

    def loss(adapters, x):
        merged = nnx.merge(graphdef, adapters, rest)
        return objective(lambda projections, x: project(x, *projections))(merged, x)

    return jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 1))).trace(adapters, x).jaxpr


def test_frozen_kernels_get_no_gradient():
    projections, rows = build(), 80
    x = jnp.ones((1, rows, SIZE))
    wide = SIZE * sum(COLUMNS)
    narrow = sum(r * (SIZE + c) for c, r in zip(COLUMNS, RANKS, strict=True) if r)
    # Forward, once more, back to x; and the gradients of the narrow matrices.
    assert count_flops(adapters_step(projections, x)) == 2 * rows * (3 * wide + 4 * narrow)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_update_far_smaller_than_its_weight_is_not_rounded_away(dtype):
    p = build(dtype)[0]
    signs = jnp.where(jnp.arange(SIZE) % 2, -1.0, 1.0)
    p.kernel[...] = jnp.ones_like(p.kernel[...])
    p.kernel_lora_a[...] = jnp.tile(signs[:, None], RANKS[0])
    p.kernel_lora_b[...] = jnp.full_like(p.kernel_lora_b[...], 2**-13)
    # The ones cancel, which leaves the update alone; 1 + 2^-13 is 1 in bfloat16.
    (y,) = project(jnp.broadcast_to(signs, (*ROWS, SIZE)).astype(dtype), p)
    expected = p.lora.scale * SIZE * RANKS[0] * 2**-13
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=1e-2)
