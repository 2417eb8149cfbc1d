# SPDX-License-Identifier: Apache-2.0
"""Compiles a traced program for given chips and says what it takes."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from .flops import count_flops
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

    Args:
        traced: from `jax.jit(f).trace(...)`.
        chips: what to compile for.
        resident: bytes of a chip that arguments take, for a refusal that leaves them out.
        while_trips: see `count_flops`.
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
    memory = compiled.memory_analysis()
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
