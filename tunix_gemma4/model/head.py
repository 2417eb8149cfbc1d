# SPDX-License-Identifier: Apache-2.0
"""The tied head: from hidden states to logits over a vocabulary that is split over all chips.

Every chip scores its own words for all rows: gathering states is cheaper than gathering the table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..config import ModelConfig
from ..sharding import constrain


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


def hidden_gradient(table: jax.Array, gradient: jax.Array, config: ModelConfig) -> jax.Array:
    """float32 [..., D]: what a gradient [..., V] of uncapped logits is for hidden states.

    The product is taken in the activations' dtype, as that of the logits is.
    """
    gradient = constrain(gradient, *(None,) * (gradient.ndim - 1), "vocab").astype(config.dtype)
    table = table.astype(config.dtype)
    return jnp.einsum("...v,vd->...d", gradient, table, preferred_element_type=jnp.float32)
