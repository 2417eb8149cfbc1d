# SPDX-License-Identifier: Apache-2.0
"""How many columns of prompts and completions a step computes: as few as hold its longest ones.

Each number compiles programs of its own, so there are three of each at most. The host's arrays keep
the limits' shapes; what is left out is padding.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

# Shorter rows than these save less than a program costs.
_LEAST = 16


def allowed_lengths(limit: int) -> list[int]:
    """A quarter of `limit`, its half and itself, those that are worth a program."""
    parts = {limit // 4, limit // 2}
    return [*sorted(part for part in parts if part >= _LEAST), limit]


def fitting_length(longest: int, limit: int) -> int:
    """The shortest of `allowed_lengths` that holds `longest` tokens."""
    return next(length for length in allowed_lengths(limit) if length >= min(longest, limit))


def on_host(*arrays: Any) -> list[np.ndarray] | None:
    """Their values; None where they are being compiled, or lie on other hosts too."""
    if any(isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True) for x in arrays):
        return None
    return jax.device_get(list(arrays))


def same_in_groups(rows: np.ndarray, group: int) -> bool:
    """Whether each `group` of rows next to each other are equal."""
    if len(rows) % group:
        return False
    groups = rows.reshape(-1, group, rows.shape[1])
    return bool((groups == groups[:, :1]).all())


def columns_of(prompts: np.ndarray, completions: np.ndarray, pad_id: int) -> tuple[int, int]:
    """What holds all tokens of prompts, padded on the left, and completions, on the right."""
    asked, said = ((rows != pad_id).any(axis=0) for rows in (prompts, completions))
    longest = [len(used) - int(used.argmax()) if used.any() else 0 for used in (asked, said[::-1])]
    return fitting_length(longest[0], len(asked)), fitting_length(longest[1], len(said))
