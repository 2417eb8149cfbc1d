# SPDX-License-Identifier: Apache-2.0
"""PPO's rewards, whole.

The host's PPO learner adds a reward to zeros shaped and typed like the completion's ids, which are
integers: 0.7 becomes 0, of any model.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp


class _FloatZeros:
    """`jax.numpy`, whose `zeros_like` of integers are float32. The learner calls it once."""

    def __init__(self, module: ModuleType):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def zeros_like(self, array: Any, *args: Any, **kwargs: Any) -> jax.Array:
        if not (args or kwargs) and jnp.issubdtype(array.dtype, jnp.integer):
            kwargs = {"dtype": jnp.float32}
        return self._module.zeros_like(array, *args, **kwargs)


def wrap_jnp(original: ModuleType) -> _FloatZeros:
    """The module's `jnp`, for rewards that are no integers."""
    return _FloatZeros(original)
