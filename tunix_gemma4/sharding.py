# SPDX-License-Identifier: Apache-2.0
"""Which mesh axis carries which dimension. Only this file names mesh axes.

Parameters are declared with logical axes (`metadata("embed", "heads")`); on a mesh, an axis that
the mesh lacks or that does not divide the dimension is dropped, and that dimension is replicated
along it. A kernel's dimension of heads is split between heads, never within one.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from absl import logging
from flax import nnx
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

with warnings.catch_warnings():
    # Deprecated, but the only public name of the mesh that `with mesh:` sets and Tunix reads.
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.interpreters.pxla import thread_resources as _thread_resources

Made = TypeVar("Made")

_MESH_AXIS = {
    "batch": "fsdp",
    "embed": "fsdp",
    # Whole ones: tokens travel to their experts, which is less than the experts would be.
    "experts": ("fsdp", "tp"),
    "heads": "tp",
    "kv_heads": "tp",
    "vision_heads": "tp",
    "mlp": "tp",
    # Over every chip: the two vocabulary tables are the largest tensors, their rows are looked up
    # or scored where they lie, and neither they nor their gradients are ever gathered.
    "vocab": ("fsdp", "tp"),
}
# Of the axes of heads, what a mesh that does not divide their number leaves whole.
_REPLICATED_HEADS = {"kv_heads": "key/value", "vision_heads": "vision"}


def metadata(*logical_axes: str | None, heads: int | None = None) -> dict[str, Any]:
    """Keyword arguments that give an `nnx.Param` its sharding.

    Eager sharding is off: flax would otherwise need a mesh to create the parameter at all.

    Args:
        *logical_axes: one per dimension; None is never split.
        heads: how many heads lie along the axis of heads, if there is one.
    """
    axes = tuple(None if axis is None else _MESH_AXIS[axis] for axis in logical_axes)
    result = {"out_sharding": axes, "eager_sharding": False}
    if heads is None:
        return result
    (axis,) = (axis for axis in logical_axes if axis and axis.endswith("heads"))
    return result | {"heads": (axis, heads)}


def spread(axis: str | None) -> tuple[str, ...]:
    """Every mesh axis, `axis` first: for what is too small to be worth a copy on each chip.

    An adapter's matrix has one long side, which its kernel splits over one axis alone.
    """
    names = ("fsdp", "tp")
    return names if axis is None else (axis, *(name for name in names if name != axis))


def _axes(variable: nnx.Variable) -> tuple:
    return tuple(variable.get_metadata().get("out_sharding") or ())


def _fitting_spec(axes: tuple, shape: tuple, mesh: Any, heads: int | None = None) -> PartitionSpec:
    """`axes` without those that `mesh` lacks or that do not divide `shape`, or its heads."""
    if len(axes) > len(shape):
        return PartitionSpec()
    fitting = [_fitting_axis(axis, size, mesh) for axis, size in zip(axes, shape, strict=False)]
    if heads is not None and heads % _head_parts(mesh):
        # The other side takes the mesh axis that the heads leave, so that no chip stores them all.
        others = zip(map(_without_heads, fitting), shape, strict=False)
        fitting = [axis and (_fitting_axis(spread(axis), n, mesh) or axis) for axis, n in others]
    while fitting and fitting[-1] is None:
        fitting.pop()
    return PartitionSpec(*fitting)


def _without_heads(axis: str | tuple[str, ...] | None) -> str | None:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return next((name for name in names if name != _MESH_AXIS["heads"]), None)


def _fitting_axis(axis: str | tuple[str, ...] | None, size: int, mesh: Any) -> Any:
    """The mesh axes of `axis` that exist and together divide `size`.

    If they do not, the one of them that splits it into most parts; None if there is none.
    """
    names = (axis,) if isinstance(axis, str) else axis or ()
    names = tuple(name for name in names if name in mesh.shape)
    if names and size % math.prod(mesh.shape[name] for name in names) == 0:
        return names[0] if len(names) == 1 else names
    parts = {name: mesh.shape[name] for name in names if size % mesh.shape[name] == 0}
    best = max(parts, key=parts.__getitem__, default=None)
    return best if best is not None and parts[best] > 1 else None


def is_variable(leaf: Any) -> bool:
    """For `is_leaf`: a parameter with its metadata, not yet the array within."""
    return isinstance(leaf, nnx.Variable)


def _head_parts(mesh: Any) -> int:
    """Into how many parts `mesh` splits heads."""
    return mesh.shape.get(_MESH_AXIS["heads"], 1)


def _check_heads(state: Any, mesh: Mesh) -> None:
    """Refuses query heads that `mesh` would cut; says once which others it leaves whole."""
    axis, parts = _MESH_AXIS["heads"], _head_parts(mesh)
    variables = jax.tree.leaves(state, is_leaf=is_variable)
    found = {v.get_metadata().get("heads") for v in variables if is_variable(v)}
    cut = sorted(pair for pair in found - {None} if pair[1] % parts)
    for kind, count in cut:
        if kind not in _REPLICATED_HEADS:
            fitting = [str(size) for size in range(1, count + 1) if count % size == 0]
            raise ValueError(
                f"mesh: {count} query heads (num_attention_heads) cannot be split over {axis} of "
                f"size {parts}; sizes of {axis} that work: {', '.join(fitting)}"
            )
    if cut:
        whole = " and ".join(
            f"{name} heads ({', '.join(str(count) for kind, count in cut if kind == of)})"
            for of, name in _REPLICATED_HEADS.items()
            if any(kind == of for kind, _ in cut)
        )
        message = "mesh: %s cannot be split over %s of size %d; each part of %s has all of them."
        logging.log_first_n(logging.WARNING, message, 1, whole, axis, parts, axis)


def param_shardings(state: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` on `mesh` of every array of `state`, in the structure of `state`.

    That is an `nnx.State` or any tree of `nnx.Variable`, of arrays or shapes. Key/value heads whose
    number `tp` does not divide are replicated, which is logged once.

    Raises:
        ValueError: for a mesh with explicit axes, whose shardings the model does not spell out,
            or with a `tp` that does not divide the query heads.
    """
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh: expected Auto axes, found {mesh.axis_types}, which jax.make_mesh makes by "
            "default; pass it axis_types=(jax.sharding.AxisType.Auto,) * len(axis_names)"
        )
    _check_heads(state, mesh)

    def of_variable(variable: nnx.Variable) -> nnx.Variable:
        _, heads = variable.get_metadata().get("heads") or (None, None)

        def place(leaf: Any) -> NamedSharding:
            return NamedSharding(mesh, _fitting_spec(_axes(variable), leaf.shape, mesh, heads))

        return variable.replace(jax.tree.map(place, variable.get_raw_value()))

    return jax.tree.map(of_variable, state, is_leaf=is_variable)


def shapes_on(state: Any, mesh: Mesh) -> Any:
    """`state` as shapes, each with the sharding that `param_shardings` gives it."""

    def placed(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(placed, state, param_shardings(state, mesh))


def shard_model(model: nnx.Module, mesh: Mesh) -> nnx.Module:
    """Moves the arrays of `model` onto `mesh`, in place, and returns it."""
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, param_shardings(state, mesh)))
    return model


def eval_shape(function: Callable[..., Made], *args: Any) -> Made:
    """`nnx.eval_shape`, whatever mesh is set.

    Under `jax.set_mesh` flax would give each shape the sharding that its metadata names, and fail
    where the mesh lacks an axis; `param_shardings` knows what to do there.
    """
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.eval_shape(function, *args)


def mesh_of(tree: Any) -> Any | None:
    """The mesh that arrays or shapes of `tree` lie on, those that do; None if none does."""
    for leaf in jax.tree.leaves(tree):
        where = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding):
            return where.mesh
    return None


def active_mesh() -> Any | None:
    """The mesh of `jax.set_mesh`, or else of `with mesh:`, which Tunix reads; None without one."""
    meshes = jax.sharding.get_abstract_mesh(), _thread_resources.env.physical_mesh
    return next((mesh for mesh in meshes if not mesh.empty), None)


def batch_shards() -> int:
    """Into how many parts the active mesh splits rows."""
    mesh = active_mesh()
    return 1 if mesh is None else mesh.shape.get(_MESH_AXIS["batch"], 1)


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Asks the compiler for a sharding of an activation; does nothing outside jit or a mesh."""
    return _constrain(x, metadata(*logical_axes)["out_sharding"])


def _constrain(x: jax.Array, axes: tuple) -> jax.Array:
    mesh = active_mesh()
    if mesh is None or not isinstance(x, Tracer):
        return x
    spec = _fitting_spec(axes, x.shape, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gathered(variable: nnx.Variable) -> jax.Array:
    """A parameter's array, whole on every chip; its gradient goes back to where its parts lie."""
    value, axes = variable[...], _axes(variable)
    return _gathered(value, axes[len(axes) - value.ndim :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, axes: tuple) -> jax.Array:
    return _constrain(x, ())


_gathered.defvjp(
    lambda x, axes: (_gathered(x, axes), None),
    lambda axes, _, gradient: (_constrain(gradient, axes),),
)


def platform() -> str:
    """Platform of the devices compiled for: those of the mesh, or else JAX's default ones.

    When a program is compiled ahead of time for a machine that is not here they differ.
    """
    mesh = active_mesh()
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    device = getattr(mesh, "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def head_repeats(heads: int, kv_heads: int) -> int:
    """How often to repeat key/value heads so that the mesh splits them like their query heads."""
    mesh = active_mesh()
    parts = 1 if mesh is None else _head_parts(mesh)
    return 1 if heads % parts else math.lcm(kv_heads, parts) // kv_heads


def map_shards(
    function: Callable[..., Any],
    arrays: Sequence[jax.Array],
    logical_axes: Sequence[tuple[str | None, ...]],
) -> Any:
    """`function` of every chip's own parts of `arrays`, for what the compiler cannot split itself.

    It gives a part of an array that is split like the first one. `logical_axes` are of each array,
    as `constrain` takes them.
    """
    mesh = active_mesh()
    if mesh is None:
        return function(*arrays)
    split = [metadata(*axes)["out_sharding"] for axes in logical_axes]
    specs = tuple(_fitting_spec(axes, x.shape, mesh) for x, axes in zip(arrays, split, strict=True))
    # Kernels do not say over which axes their results vary, so that is not checked.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*arrays)
