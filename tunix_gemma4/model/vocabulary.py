# SPDX-License-Identifier: Apache-2.0
"""The vocabulary's tables, split over all chips: words to rows, hidden states to logits.

Every chip looks up and scores its own words for the rows of all chips: tokens and states travel,
which is cheaper than gathering a table.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import ModelConfig
from ..sharding import active_mesh, constrain
from .layers import over_chunks

# Of rows of a table that exist at once over the whole mesh: 128 MiB in bfloat16.
LOOKUP_ELEMENTS = 2**26


def lookup(table: nnx.Embed, tokens: jax.Array) -> jax.Array:
    """Rows [B, T, features] of tokens [B, T] in a table [words, features] split over all chips.

    Each chip looks up its own words for the rows of all chips, which are then summed: as many as
    the mesh has, unless it is done by chunks.
    """
    mesh, size = active_mesh(), tokens.shape[1]
    if mesh is not None and mesh.size > 1:
        size = max(1, LOOKUP_ELEMENTS // (tokens.shape[0] * table.features))
    return _lookup(size, table.dtype, table.embedding[...], tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(size: int, dtype: Any, table: jax.Array, tokens: jax.Array) -> jax.Array:
    def some(_: None, tokens: jax.Array) -> tuple[None, jax.Array]:
        # Every sum has one term that is not zero, so none is rounded.
        rows = jnp.take(table, tokens, axis=0).astype(dtype)
        return None, constrain(rows, "batch", None, None)

    return over_chunks(some, size, tokens)[1]


def _lookup_forward(size, dtype, table, tokens):
    return _lookup(size, dtype, table, tokens), (table, tokens)


def _lookup_backward(size, dtype, saved, d_rows):
    """Adds to the table's gradient in place, in the table's own dtype.

    JAX's own would make one for each part of the rows, and add up in that of activations.
    """
    table, tokens = saved

    def add(d_table, tokens, d_rows):
        return d_table.at[tokens].add(d_rows.astype(d_table.dtype)), None

    zeros = constrain(jnp.zeros_like(table), "vocab", None)
    return over_chunks(add, size, tokens, d_rows, carry=zeros)[0], None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def uncapped_logits(table: jax.Array, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """float32 [..., V] of hidden states [..., D] and the embedding table [V, D]."""
    unsharded = (None,) * (hidden.ndim - 1)
    hidden = constrain(hidden, *unsharded, None)
    table = table.astype(config.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    return constrain(logits, *unsharded, "vocab")


def soft_cap(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """`cap * tanh(logits / cap)`; without a cap as they are."""
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def hidden_gradient(table: jax.Array, d_logits: jax.Array, config: ModelConfig) -> jax.Array:
    """float32 [..., D]: what a gradient [..., V] of uncapped logits is for hidden states.

    The product is taken in the activations' dtype, as that of the logits is.
    """
    d_logits = constrain(d_logits, *(None,) * (d_logits.ndim - 1), "vocab").astype(config.dtype)
    table = table.astype(config.dtype)
    return jnp.einsum("...v,vd->...d", d_logits, table, preferred_element_type=jnp.float32)
