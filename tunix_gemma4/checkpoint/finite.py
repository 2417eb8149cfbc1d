# SPDX-License-Identifier: Apache-2.0
"""Whether arrays hold NaN or infinity, found where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_SHOWN = 3


class NonFiniteError(RuntimeError):
    """A run or a model has come to numbers that are not finite."""


def finite_sum(leaves: list[jax.Array]) -> jax.Array:
    """A number that is finite if all of the leaves are, float32. For traced code.

    Their sum: NaN and infinity stay in it, and nothing takes less to compile or to run. It is
    infinite, too, for numbers about 1e38, with which no step can be taken.
    """
    sums = [jnp.sum(leaf, dtype=jnp.float32) for leaf in leaves if _floats(leaf)]
    return sum(sums, jnp.zeros((), jnp.float32))


def nonfinite(arrays: Mapping[str, Any]) -> list[str]:
    """The names among `arrays` (or trees of them) that hold NaN or infinity."""
    # One after the other: programs of several devices that are started all at once can wait for
    # each other for ever on a CPU. Equal shapes share a program.
    return [
        name
        for name, tree in arrays.items()
        if not all(bool(_is_finite(leaf)) for leaf in jax.tree.leaves(tree) if _floats(leaf))
    ]


def nonfinite_variables(model: nnx.Module, *kinds: Any) -> list[str]:
    """The paths of the model's variables of `kinds` (all if none) that hold NaN or infinity."""
    state = nnx.to_flat_state(nnx.state(model, kinds or ...))
    return nonfinite({".".join(map(str, path)): variable for path, variable in state})


def require_finite(arrays: Mapping[str, Any], what: str) -> None:
    """Raises NonFiniteError naming those of `arrays` that must not be written."""
    names = nonfinite(arrays)
    if names:
        raise NonFiniteError(
            f"{what}: {len(names)} of {len(arrays)} tensors hold NaN or infinity "
            f"({shown(names)}); nothing is written. Train on from the last checkpoint, or load "
            "the model anew"
        )


def shown(names: list[str], most: int = _SHOWN) -> str:
    """The first few of `names`."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()


def _floats(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
