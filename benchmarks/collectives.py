# SPDX-License-Identifier: Apache-2.0
"""Collectives of a LoRA step, and its temporary memory, from mesh to mesh.

    python benchmarks/collectives.py                       # E2B, one row of 2,048 tokens a chip
    python benchmarks/collectives.py --layers 4 --names 12 # cut; and what the largest are for

Compiles the supervised recipe's step ahead of time for TPU v5e and reads the compiled program: a
collective in a loop counts as often as the loop runs. `GB` is what arrives at one chip: of n parts
that a chip gathers it has one already, and a sum over n chips takes as much as scattering it and
gathering the sums. What it printed is in docs/how-to/shard.md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import re
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from memory import CASES, measured

import tunix_gemma4
from tunix_gemma4.planning.plan import GB

MESHES = {
    "fsdp 4": ("v5e:2x2", 4, 1),
    "fsdp 8": ("v5e:2x4", 8, 1),
    "fsdp 16": ("v5e:4x4", 16, 1),
    "fsdp 4 x tp 2": ("v5e:2x4", 4, 2),
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[(.*?)\] \{(.*?)\})")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
        kind: of `KINDS`.
        times: that it runs.
        arrives: bytes at one chip, each time.
        name: of the operation that it comes from.
    """

    kind: str
    times: int
    arrives: float
    name: str


def collectives(text: str) -> list[Collective]:
    """All of a compiled program.

    The TPU's compiler spreads one over several fusions, to compute meanwhile; its channel tells
    which are the same.
    """
    bodies: dict[str, list[str]] = {}
    entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        elif bodies:
            lines.append(line)

    def of(computation: str, times: int) -> Iterator[tuple[str, Collective]]:
        for line in bodies.get(computation, ()):
            if match := _COLLECTIVE.search(line):
                name = re.search(r'op_name="([^"]*)"', line)
                channel = re.search(r"channel_id=\d+", line)
                kind, result = match[2], match[1]
                arrives = _arrives(kind, bool(match[3]), result, line)
                if computation.startswith("all-reduce-scatter"):  # Keeps a part of the sums.
                    kind, arrives = "reduce-scatter", arrives / 2
                found = Collective(kind, times, arrives, name[1] if name else "")
                yield channel[0] if channel else line, found
                continue
            inside = times * (_trips(line, bodies) if " while(" in line else 1)
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip(" %") for branch in branches.split(",")]
            for name in called:
                yield from of(name, inside)

    return list(dict(of(entry, 1)).values())


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Of a loop, which counts from 0 to what its condition compares with."""
    if match := _KNOWN.search(line):
        return int(match[1])
    condition, body = (
        "\n".join(bodies[re.search(rf"{name}=%?([\w.-]+)", line)[1]])
        for name in ("condition", "body")
    )
    limits = re.findall(r" = [su]32\[\]\S* constant\((\d+)\)", condition)
    if len(limits) != 1 or "direction=LT" not in condition:
        raise ValueError(f"a loop whose trips are not known: {line.strip()[:200]}")
    return -(-int(limits[0]) // _stride(condition, body))


def _stride(condition: str, body: str) -> int:
    """What a loop adds to its counter: 2 where the compiler made one turn of two; else 1."""
    counter = re.search(r" get-tuple-element\(.*?\), index=(\d+)", condition)
    result = re.search(r"^ *ROOT .* tuple\((.*?)\)", body, re.MULTILINE)
    if counter is None or result is None:
        return 1
    name = re.sub(r"/\*.*?\*/", "", result[1]).split(",")[int(counter[1])].strip()
    added = re.search(rf"^ *{re.escape(name)} = .* add\(.*?, (\S+?)\)", body, re.MULTILINE)
    if added is None:
        return 1
    value = re.search(rf"^ *{re.escape(added[1])} = .* constant\((\d+)\)", body, re.MULTILINE)
    return int(value[1]) if value else 1


def _arrives(kind: str, started: bool, result: str, line: str) -> float:
    """Bytes at one chip; `result` is the type, of a start the operands' as well."""
    size = sum(
        math.prod(int(size) for size in shape.split(",") if size) * _BYTES[dtype]
        for dtype, shape in re.findall(rf"({'|'.join(_BYTES)})\[([\d,]*)\]", result)
    )
    if kind == "collective-permute":
        return size / 2 if started else size
    chips = _chips(line)
    if kind == "all-gather" and started:
        size *= chips / (chips + 1)
    if kind == "reduce-scatter":
        return size * (chips - 1)
    return size * (chips - 1) / chips * (2 if kind == "all-reduce" else 1)


def _chips(line: str) -> int:
    """How many take part together."""
    groups = _GROUPS.search(line)
    if groups is None:
        raise ValueError(f"a collective of unknown chips: {line.strip()[:200]}")
    count, first, mesh, axes = groups.groups()
    if mesh is None:
        return int(count) if count else len(first.split(","))
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))


def compiled_text(mesh: str, length: int, layers: int | None) -> tuple[str, float]:
    """The program of one chip, and its temporary bytes."""
    topology, fsdp, tp = MESHES[mesh]
    settings = (
        f"gradient_accumulation_steps=1 mesh.fsdp={fsdp} mesh.tp={tp} batch_size={fsdp} "
        f"data.max_length={length}"
    )
    case = dataclasses.replace(
        CASES["lora-2048"], settings=settings, topology=topology, layers=layers
    )
    texts = []
    compile_ = jax.stages.Lowered.compile

    def keep(lowered: jax.stages.Lowered, *args: object, **kwargs: object) -> jax.stages.Compiled:
        compiled = compile_(lowered, *args, **kwargs)
        texts.append(compiled.as_text())
        return compiled

    jax.stages.Lowered.compile = keep
    try:
        usage = measured(case).usage[case.program]
    finally:
        jax.stages.Lowered.compile = compile_
    return texts[-1], usage.temporaries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", nargs="+", choices=MESHES, default=list(MESHES))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="cut the decoder to this even number of layers")
    parser.add_argument("--names", type=int, default=0, help="operations to list, largest first")
    arguments = parser.parse_args()
    tunix_gemma4.register()
    for mesh in arguments.mesh:
        text, temporaries = compiled_text(mesh, arguments.length, arguments.layers)
        found = collectives(text)
        print(f"{mesh}: {temporaries / GB:.2f} GB of temporaries per chip", flush=True)
        for kind in KINDS:
            ones = [one for one in found if one.kind == kind]
            if ones:
                arrives = sum(one.times * one.arrives for one in ones)
                times = sum(one.times for one in ones)
                print(f"  {kind:<20}{len(ones):5} in the program {times:6} runs"
                      f"{arrives / GB:8.2f} GB")  # fmt: skip
        of_names: collections.Counter[tuple[str, str]] = collections.Counter()
        for one in found:
            of_names[one.kind, one.name] += one.times * one.arrives
        for (kind, name), size in of_names.most_common(arguments.names):
            print(f"    {size / GB:7.3f} GB {kind:<15}{name}")


if __name__ == "__main__":
    main()
