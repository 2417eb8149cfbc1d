# SPDX-License-Identifier: Apache-2.0
"""A few columns of a batch at a time, where all of them at once would fill a chip."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..sharding import active_mesh, constrain

# Of rows of a table that exist at once over the whole mesh: 128 MiB in bfloat16.
LOOKUP_ELEMENTS = 2**26


def over_columns(
    function: Callable[..., tuple[Any, Any]], columns: int, *rows: jax.Array, carry: Any = None
) -> tuple[Any, Any]:
    """`function(carry, *rows)` for at most `columns` of the rows [B, T, ...] at a time.

    Each time takes as many, the last with zeros where there are none left.

    Returns:
        The last carry, and what else `function` returned, joined to [B, T, ...].
    """
    batch, length = rows[0].shape[:2]
    count = -(-length // columns)
    columns = -(-length // count)
    padding = count * columns - length
    if count == 1:
        return function(carry, *rows)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, columns, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1).reshape(batch, count * columns, *x.shape[3:])[:, :length]
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    carry, parts = jax.lax.scan(
        lambda carry, xs: function(carry, *xs), carry, tuple(map(split, rows))
    )
    return carry, jax.tree.map(join, parts)


def lookup(table: nnx.Embed, tokens: jax.Array) -> jax.Array:
    """Rows [B, T, features] of a table whose words are split over all chips.

    Each chip looks up its own words for the rows of all chips, which are then summed: as many as
    the mesh has, unless it is done by columns.

    Args:
        table: its embedding is [words, features].
        tokens: int [B, T].
    """
    mesh = active_mesh()
    columns = tokens.shape[1]
    if mesh is not None and mesh.size > 1:
        columns = max(1, LOOKUP_ELEMENTS // (tokens.shape[0] * table.features))
    return _lookup(columns, table.dtype, table.embedding[...], tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(columns: int, dtype: Any, table: jax.Array, tokens: jax.Array) -> jax.Array:
    def some(_: None, tokens: jax.Array) -> tuple[None, jax.Array]:
        # Every sum has one term that is not zero, so none is rounded.
        rows = jnp.take(table, tokens, axis=0).astype(dtype)
        return None, constrain(rows, "batch", None, None)

    return over_columns(some, columns, tokens)[1]


def _lookup_backward(
    columns: int, dtype: Any, saved: tuple, gradient: jax.Array
) -> tuple[jax.Array, None]:
    """Adds to the table's gradient in place, in the table's own dtype.

    JAX's own would make one for each part of the rows, and add up in that of activations.
    """
    del dtype
    table, tokens = saved

    def add(of_table: jax.Array, tokens: jax.Array, rows: jax.Array) -> tuple[jax.Array, None]:
        return of_table.at[tokens].add(rows.astype(of_table.dtype)), None

    zeros = constrain(jnp.zeros_like(table), "vocab", None)
    return over_columns(add, columns, tokens, gradient, carry=zeros)[0], None


_lookup.defvjp(
    lambda columns, dtype, table, tokens: (
        _lookup(columns, dtype, table, tokens),
        (table, tokens),
    ),
    _lookup_backward,
)
