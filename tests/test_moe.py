# SPDX-License-Identifier: Apache-2.0
"""A mix of experts in blocks: what every expert for every token would give, on any mesh."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tunix_gemma4.model import moe
from tunix_gemma4.model.layers import gelu
from tunix_gemma4.model.moe import expert_mix
from tunix_gemma4.planning.measure import count_flops

B, T, D, F, E, TOP_K = 4, 21, 16, 8, 8, 2


def draw(routing="random"):
    """x, weights, indices and both matrices; and the weight of each output in a loss."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.array(rng.normal(size=shape) * 0.5, jnp.float32)  # noqa: E731
    chosen = {
        "random": lambda: rng.permuted(np.tile(np.arange(E), (B, T, 1)), axis=-1)[..., :TOP_K],
        # The others get no token at all.
        "two experts": lambda: np.broadcast_to([6, 1], (B, T, TOP_K)),
    }[routing]()
    weights = jnp.abs(normal(B, T, TOP_K))
    return (
        (normal(B, T, D), weights, jnp.array(chosen, jnp.int32)),
        (normal(E, D, 2 * F), normal(E, F, D)),
        normal(B, T, D),
    )


def dense(x, weights, indices, gate_up, down):
    """Every expert meets every token."""
    gate, up = jnp.split(jnp.einsum("btd,edf->btef", x, gate_up), 2, axis=-1)
    values = jnp.einsum("btef,efd->bted", gelu(gate) * up, down)
    shares = (jax.nn.one_hot(indices, E) * weights[..., None]).sum(axis=2)
    return jnp.einsum("bted,bte->btd", values, shares)


def value_and_gradients(function, inputs, matrices, wanted):
    """Of a weighted sum, for x, weights and both matrices."""
    x, weights, indices = inputs

    def loss(x, weights, *matrices):
        out = function(x, weights, indices, *matrices)
        return (out * wanted).sum(), out

    call = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, out), gradients = call(x, weights, *matrices)
    return out, *gradients


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("routing", ["random", "two experts"])
@pytest.mark.parametrize("mesh", [None, (1, 1), (4, 1), (2, 4), (3, 1), (3, 2)])
def test_values_and_gradients_are_those_of_all_experts_for_all_tokens(routing, mesh, monkeypatch):
    """3 divides neither rows nor experts: a chip then has all of them, or the half of (3, 2)."""
    monkeypatch.setattr(moe, "LARGEST_BLOCK", 16)
    case = draw(routing)
    expected = value_and_gradients(dense, *case)
    context = contextlib.nullcontext()
    if mesh:
        devices = np.array(jax.devices()[: mesh[0] * mesh[1]]).reshape(mesh)
        context = jax.set_mesh(Mesh(devices, ("fsdp", "tp")))
    with context:
        assert_close(value_and_gradients(expert_mix, *case), expected)


@pytest.mark.parametrize("columns", [5, 1])
def test_a_few_columns_at_a_time_give_the_same(columns, monkeypatch):
    case = draw()
    monkeypatch.setattr(moe, "MIX_ELEMENTS", columns * B * D)
    assert_close(value_and_gradients(expert_mix, *case), value_and_gradients(dense, *case))


def test_frozen_experts_get_no_gradient():
    inputs, matrices, wanted = draw()
    loss = lambda x: (expert_mix(x, *inputs[1:], *matrices) * wanted).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss))(inputs[0]))
    # As constants and as arguments of the loops, but never as what a loop adds to.
    assert not re.findall(rf"f32\[{E},{D},{2 * F}\] = (add|scatter|broadcast)", text)
    both = lambda x, *matrices: (expert_mix(x, *inputs[1:], *matrices) * wanted).sum()  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(both, (0, 1, 2)))(inputs[0], *matrices))
    assert re.findall(rf"f32\[{E},{D},{2 * F}\] = (add|scatter|broadcast)", text)


def test_sums_are_float32_and_the_result_has_the_dtype_of_x():
    inputs, matrices, _ = draw()
    x, matrices = inputs[0].astype(jnp.bfloat16), [m.astype(jnp.bfloat16) for m in matrices]
    found = expert_mix(x, *inputs[1:], *matrices)
    assert found.dtype == jnp.bfloat16
    exact = dense(x.astype(jnp.float32), *inputs[1:], *(m.astype(jnp.float32) for m in matrices))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.02 * np.abs(exact).max())


def test_each_token_meets_its_own_experts_alone():
    """64 pairs for each of 8 experts: one block each, six operations a number of its matrices."""
    x = jnp.ones((1, 256, D))
    inputs = x, jnp.ones((1, 256, TOP_K)), jnp.zeros((1, 256, TOP_K), jnp.int32)
    matrices = jnp.ones((E, D, 2 * F)), jnp.ones((E, F, D))
    assert count_flops(jax.make_jaxpr(expert_mix)(*inputs, *matrices)) == 512 * 6 * D * F
