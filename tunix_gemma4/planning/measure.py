# SPDX-License-Identifier: Apache-2.0
"""Compiles a traced program for given chips and says what it takes: memory, operations, time."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .hardware import GIB, Hardware

# Of the whole program, and of its temporaries where they alone are more than there is.
_IN_ALL = re.compile(r"Used ([\d.]+)([KMGT]) of")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\) exceed")
_UNITS = {"K": GIB / 2**20, "M": GIB / 2**10, "G": GIB, "T": GIB * 2**10}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a compiled program takes. Bytes are of one chip, by the compiler's own account.

    Attributes:
        arguments, outputs, aliased, temporaries, code: bytes; `aliased` are outputs that take an
            argument's place. Of a program that the compiler refused as too large they are 0.
        asked: bytes in all that a refused program asked for; 0 if it was not refused.
        flops: operations of its matrix products on all chips; see `count_flops`.
        seconds: spent on tracing and compiling.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    asked: int
    flops: float
    seconds: float

    @property
    def total(self) -> int:
        """Bytes while it runs."""
        parts = self.arguments + self.outputs - self.aliased + self.temporaries + self.code
        return self.asked or parts


def measure(
    traced: jax.stages.Traced, chips: Hardware, *, resident: int = 0, while_trips: int = 1
) -> Usage:
    """Compiles `traced`, whose arguments lie on devices of `chips`.

    These take `resident` bytes of a chip, which some of the compiler's refusals leave out. For
    `while_trips` see `count_flops`.
    """
    start = time.monotonic()
    flops = count_flops(traced.jaxpr, while_trips=while_trips)
    try:
        compiled = traced.lower().compile(compiler_options=chips.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        asked = _asked(str(error), resident)
        if asked is None:
            raise
        return Usage(0, 0, 0, 0, 0, asked, flops, time.monotonic() - start)
    memory: Any = compiled.memory_analysis()
    return Usage(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        asked=0,
        flops=flops,
        seconds=time.monotonic() - start,
    )


def _asked(message: str, resident: int) -> int | None:
    """Bytes that a program wanted, from the compiler's refusal; None if it is something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern, more in ((_IN_ALL, 0), (_TEMPORARIES, resident)):
        if found := pattern.search(message):
            return int(float(found[1]) * _UNITS[found[2]]) + more
    return None


def bits(dtype: Any) -> int:
    """Of one number in an array; those of less than a byte are packed."""
    for kind, info in ((jnp.floating, jnp.finfo), (jnp.integer, jnp.iinfo)):
        if jnp.issubdtype(dtype, kind):
            return info(dtype).bits
    return 8 * dtype.itemsize


def bytes_per_chip(tree: Any) -> int:
    """Bytes of one chip's share of arrays or shapes that have a sharding."""
    return sum(
        math.ceil(math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits(leaf.dtype) / 8)
        for leaf in jax.tree.leaves(tree)
    )


def count_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr, *, while_trips: int = 1) -> float:
    """Floating-point operations of the matrix products of `jaxpr`, over all devices.

    A compiler's `cost_analysis()` counts the body of a loop once; here it counts as often as it
    runs. What else a model computes is small beside its products. A multiplication and an addition
    are two operations. Of branches the dearest counts. A `shard_map` counts on every device of its
    mesh, a Pallas kernel in every cell of its grid unless it says itself how much it does.

    Args:
        jaxpr: as `jax.jit(f).trace(...).jaxpr` gives it, or an open one.
        while_trips: how often a `while_loop` is taken to run, which a jaxpr does not tell, unless
            its metadata say so (`set_xla_metadata(trip_count=...)`).
    """
    equations = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return sum(_of_equation(equation, while_trips) for equation in equations)


def _of_equation(equation: core.JaxprEqn, trips: int) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        return _of_product(equation)
    if name == "cond":
        return max(count_flops(branch, while_trips=trips) for branch in parameters["branches"])
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
    inner = filter(_is_jaxpr, jax.tree.leaves(parameters, is_leaf=_is_jaxpr))
    return times * sum(count_flops(program, while_trips=trips) for program in inner)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _of_product(equation: core.JaxprEqn) -> float:
    """Of every number of the result, the pairs of numbers that meet in it."""
    variables: list[Any] = [*equation.invars[:2], equation.outvars[0]]
    left, right, out = (variable.aval for variable in variables)
    numbers = equation.params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = numbers
        depth = math.prod(left.shape[axis] for axis in contracted)
    else:
        depth = right.size / right.shape[numbers.rhs_spec[0]]
    return 2.0 * out.size * depth
