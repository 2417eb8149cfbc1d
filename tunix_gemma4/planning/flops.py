# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a traced program, loops counted as often as they run.

A compiler's `cost_analysis()` counts the body of a loop once. Here the matrix products of the
jaxpr are added up, each times the lengths of the loops around it; what else a model computes is
small beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def count_flops(jaxpr: core.ClosedJaxpr, *, while_trips: int = 1) -> float:
    """Floating-point operations of the matrix products of `jaxpr`, over all devices.

    A multiplication and an addition are two operations. Of branches the dearest counts. A
    `shard_map` counts on every device of its mesh, a Pallas kernel in every cell of its grid unless
    it says itself how much it does.

    Args:
        jaxpr: as `jax.jit(f).trace(...).jaxpr` gives it.
        while_trips: how often a `while_loop` is taken to run, which a jaxpr does not tell, unless
            its metadata say so (`set_xla_metadata(trip_count=...)`).
    """
    return sum(_of_equation(equation, while_trips) for equation in jaxpr.jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, trips: int) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name in _PRODUCTS:
        return _PRODUCTS[name](equation)
    if name == "cond":
        return max(_of_inner(branch, trips) for branch in parameters["branches"])
    times = 1
    if name == "scan":
        times = parameters["length"]
    elif name == "while":
        # `set_xla_metadata` may say what the jaxpr does not.
        times = int((equation.ctx.xla_metadata or {}).get("trip_count", trips))
    elif name == "shard_map":
        times = math.prod(parameters["mesh"].shape.values())
    elif name == "pallas_call":
        if estimate := parameters.get("cost_estimate"):
            return float(estimate.flops)
        times = math.prod(parameters["grid_mapping"].grid)
    return times * sum(_of_inner(inner, trips) for inner in _inner(parameters))


def _of_inner(inner: Any, trips: int) -> float:
    inner = getattr(inner, "jaxpr", inner)  # Closed or not.
    return sum(_of_equation(equation, trips) for equation in inner.eqns)


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    """The programs among the parameters of an equation."""
    for value in jax.tree.leaves(parameters, is_leaf=_is_jaxpr):
        if _is_jaxpr(value):
            yield value


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _dot_general(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    depth = math.prod(left.shape[axis] for axis in contracted)
    return 2.0 * equation.outvars[0].aval.size * depth


def _convolution(equation: core.JaxprEqn) -> float:
    """Of every output number, the inputs of its window."""
    numbers, kernel = equation.params["dimension_numbers"], equation.invars[1].aval
    outputs = kernel.shape[numbers.rhs_spec[0]]
    return 2.0 * equation.outvars[0].aval.size * kernel.size / outputs


_PRODUCTS = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}
