# SPDX-License-Identifier: Apache-2.0
"""The map between our variables and the tensors of a Hugging Face checkpoint: a rule, no table.

Modules are called as in the checkpoint, so a name is the path itself; only leaves differ. Loading,
saving, and writing and reading adapters all use these functions.

Source: the state dict of transformers 5.12 `Gemma4ForConditionalGeneration`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..model.layers import HasBuffers

Path = tuple[Any, ...]  # names and indices, as nnx has them

# The head of a `Gemma4ForTokenScores`. It stands beside HF's `model`, not in it.
SCORE = "score"
_PREFIX = "model"
_LEAF = {"kernel": "weight", "embedding": "weight"}
_EXPERTS = "experts"  # Their kernels keep HF's bare names, without `.weight`.


class Parameter(NamedTuple):
    """A trained variable: where it is and what it holds."""

    path: Path
    variable: nnx.Variable


class Buffer(NamedTuple):
    """A value that never trains: an attribute of `module` and the shape of its tensor."""

    module: HasBuffers
    attribute: str
    shape: tuple[int, ...]


def module_name(path: Path) -> str:
    """Name in the checkpoint of the module that owns the variable at `path`."""
    prefix = [] if path[0] == SCORE else [_PREFIX]
    return ".".join([*prefix, *map(str, path[:-1])])


def hf_name(path: Path) -> str:
    """Name in the checkpoint of the variable or buffer at `path`. Injective."""
    return f"{module_name(path)}.{_LEAF.get(path[-1], path[-1])}"


def is_swapped(path: Path) -> bool:
    """Whether the checkpoint holds the variable at `path` with its last two axes swapped.

    Our kernels are [in, out], HF's weights [out, in]; those of the experts have an axis before.
    """
    return path[-1] == "kernel" or (len(path) > 1 and path[-2] == _EXPERTS)


def to_hf(path: Path, array: Any) -> Any:
    """`array`, the variable at `path`, in the checkpoint's layout; a view of a numpy array."""
    return array.swapaxes(-1, -2) if is_swapped(path) else array


def from_hf(path: Path, array: Any) -> Any:
    """The checkpoint's `array` in the layout of the variable at `path`; a view of a numpy array."""
    return to_hf(path, array)  # Swapping two axes undoes itself.


def hf_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the checkpoint of a variable of `shape` at `path`."""
    return (*shape[:-2], shape[-1], shape[-2]) if is_swapped(path) else tuple(shape)


def named_parameters(model: nnx.Module) -> dict[str, Parameter]:
    """Every variable of `model`, abstract ones too, by its name in the checkpoint."""
    state = nnx.to_flat_state(nnx.state(model))
    return {hf_name(path): Parameter(path, variable) for path, variable in state}


def named_buffers(model: nnx.Module) -> dict[str, Buffer]:
    """Every value of `model` that HF keeps as a buffer, by its name in the checkpoint."""
    return {
        hf_name((*path, attribute)): Buffer(module, attribute, shape)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, HasBuffers)
        for attribute, shape in module.buffer_shapes().items()
    }


def buffer_array(buffer: Buffer, dtype: Any = np.float64) -> np.ndarray:
    """The value of `buffer` in its tensor's shape."""
    value = getattr(buffer.module, buffer.attribute)
    return np.asarray(value, np.float64).reshape(buffer.shape).astype(dtype)


def set_buffer(buffer: Buffer, array: np.ndarray) -> None:
    """Sets `buffer` to plain Python numbers: a `float`, or a tuple of them for a vector.

    Anything else would promote activations or show up as state. Do it before the first jit.
    """
    numbers = np.asarray(array, np.float64).reshape(-1).tolist()
    scalar = buffer.shape in ((), (1,))
    setattr(buffer.module, buffer.attribute, numbers[0] if scalar else tuple(numbers))


def unmerged(model: nnx.Module) -> list[str]:
    """Paths of variables that no checkpoint holds: adapters and quantised kernels."""

    def is_plain(variable: nnx.Variable) -> bool:
        value = variable.get_raw_value()
        floats = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
        return type(variable) is nnx.Param and floats

    state = nnx.to_flat_state(nnx.state(model))
    return [".".join(map(str, path)) for path, variable in state if not is_plain(variable)]
