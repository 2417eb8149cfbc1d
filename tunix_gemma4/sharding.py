# SPDX-License-Identifier: Apache-2.0
"""Which mesh axis carries which dimension. Only this file names mesh axes.

Parameters are declared with logical axes (`metadata("embed", "heads")`); on a mesh, an axis that
the mesh lacks or that does not divide the dimension is dropped, and that dimension is replicated.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

with warnings.catch_warnings():
    # Deprecated, but the only public name of the mesh that `with mesh:` sets and Tunix reads.
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.interpreters.pxla import thread_resources as _thread_resources

_MESH_AXIS = {
    "batch": "fsdp",
    "embed": "fsdp",
    "experts": None,
    "heads": "tp",
    "mlp": "tp",
    # Over every chip: the two vocabulary tables are the largest tensors, their rows are looked up
    # or scored where they lie, and neither they nor their gradients are ever gathered.
    "vocab": ("fsdp", "tp"),
}


def metadata(*logical_axes: str | None) -> dict[str, Any]:
    """Keyword arguments that give an `nnx.Param` its sharding.

    Eager sharding is off: flax would otherwise need a mesh to create the parameter at all.
    """
    axes = tuple(None if axis is None else _MESH_AXIS[axis] for axis in logical_axes)
    return {"out_sharding": axes, "eager_sharding": False}


def _fitting_spec(axes: tuple, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """`axes` without those that `mesh` lacks or that do not divide `shape`."""
    if len(axes) > len(shape):
        return PartitionSpec()
    fitting = [_fitting_axis(axis, size, mesh) for axis, size in zip(axes, shape, strict=False)]
    while fitting and fitting[-1] is None:
        fitting.pop()
    return PartitionSpec(*fitting)


def _fitting_axis(axis: str | tuple[str, ...] | None, size: int, mesh: Any) -> Any:
    """The mesh axes of `axis` that exist and together divide `size`; None if there are none."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    names = tuple(name for name in names if name in mesh.shape)
    if not names or size % math.prod(mesh.shape[name] for name in names):
        return None
    return names[0] if len(names) == 1 else names


def param_shardings(state: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every array of `state`, in the structure of `state`.

    Args:
        state: an `nnx.State`, or any tree of `nnx.Variable`, of arrays or shapes.
        mesh: the mesh to place it on.

    Raises:
        ValueError: for a mesh with explicit axes, whose shardings the model does not spell out.
    """
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh: expected Auto axes, found {mesh.axis_types}, which jax.make_mesh makes by "
            "default; pass it axis_types=(jax.sharding.AxisType.Auto,) * len(axis_names)"
        )

    def of_variable(variable: nnx.Variable) -> nnx.Variable:
        axes = tuple(variable.get_metadata().get("out_sharding") or ())
        return variable.replace(
            jax.tree.map(
                lambda leaf: NamedSharding(mesh, _fitting_spec(axes, leaf.shape, mesh)),
                variable.get_raw_value(),
            )
        )

    return jax.tree.map(of_variable, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def shard_model(model: nnx.Module, mesh: Mesh) -> nnx.Module:
    """Moves the arrays of `model` onto `mesh`, in place, and returns it."""
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, param_shardings(state, mesh)))
    return model


def active_mesh() -> Any | None:
    """The mesh of `jax.set_mesh`, or else of `with mesh:`, which Tunix reads; None without one."""
    for mesh in (jax.sharding.get_abstract_mesh(), _thread_resources.env.physical_mesh):
        if not mesh.empty:
            return mesh
    return None


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Asks the compiler for a sharding of an activation; does nothing outside jit or a mesh."""
    mesh = active_mesh()
    if mesh is None or not isinstance(x, jax.core.Tracer):
        return x
    axes = metadata(*logical_axes)["out_sharding"]
    spec = _fitting_spec(axes, x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
