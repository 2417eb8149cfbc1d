# SPDX-License-Identifier: Apache-2.0
"""Lookups in a table that is spread over a mesh, a chunk of the batch at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tunix_gemma4.model import vocabulary

WORDS, FEATURES, B, T = 64, 16, 8, 50


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tp"))


def found(mesh, dtype=jnp.float32):
    """Rows of random tokens and the table's gradient of a weighted sum; and the program."""
    table = nnx.Embed(WORDS, FEATURES, dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, WORDS, (B, T)).astype(np.int32)
    weights = rng.normal(size=(B, T, FEATURES)).astype(np.float32)
    graphdef, state = nnx.split(table)

    def loss(state, tokens, weights):
        rows = vocabulary.lookup(nnx.merge(graphdef, state), tokens)
        return (rows * weights).sum(), rows

    where = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    arguments = (
        jax.device_put(state, where(("fsdp", "tp"), None)),
        jax.device_put(tokens, where("fsdp")),
        jax.device_put(weights, where("fsdp")),
    )
    with mesh:
        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(*arguments).compile()
    gradient, rows = compiled(*arguments)
    return rows, jax.tree.leaves(gradient)[0], compiled.as_text()


@pytest.mark.parametrize("count", [7, 50, 1])
def test_some_columns_at_a_time_give_the_rows_and_gradient_of_all(mesh, monkeypatch, count):
    rows, gradient, _ = found(mesh)
    monkeypatch.setattr(vocabulary, "LOOKUP_ELEMENTS", count * B * FEATURES)
    some, of_some, text = found(mesh)
    np.testing.assert_array_equal(some, rows)
    np.testing.assert_allclose(of_some, gradient, rtol=1e-5, atol=1e-6)
    # Rows of one part of the mesh: no chip holds those of all.
    assert f"f32[{B // 4},{T},{FEATURES}]" in text
    assert f"f32[{B},{T},{FEATURES}]" not in text


def test_rows_have_the_dtype_of_activations(mesh, monkeypatch):
    monkeypatch.setattr(vocabulary, "LOOKUP_ELEMENTS", 1)
    rows, gradient, _ = found(mesh, jnp.bfloat16)
    assert (rows.dtype, gradient.dtype) == (jnp.bfloat16, jnp.float32)
    assert gradient.sharding.spec[0] == ("fsdp", "tp")


def test_gradients_add_up_in_the_tables_dtype():
    """In bfloat16 a sum of ones stays at 256."""
    table = nnx.Embed(WORDS, FEATURES, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    tokens = jnp.full((1, 1000), 3)
    gradient = nnx.grad(lambda table: vocabulary.lookup(table, tokens).sum())(table)
    assert (gradient["embedding"][3] == 1000).all()
