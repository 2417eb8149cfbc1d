# SPDX-License-Identifier: Apache-2.0
"""Sequence lengths that fit, per size and device: the planner's search over the recipes.

    python benchmarks/lengths.py                            # all; TPUs take minutes a length
    python benchmarks/lengths.py --only h100:1 h200:1       # GPUs: minutes; needs `aot-gpu`

One row of text a chip, LoRA of rank 16 on all language projections, AdamW. A length is the largest
multiple of 256 whose step the chip's compiler puts into the chip's memory, as `tunix-gemma4 plan
--search` finds it. What it printed is in docs/how-to/plan.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"


import tunix_gemma4
from tunix_gemma4.planning.command import load_settings
from tunix_gemma4.planning.hardware import hardware
from tunix_gemma4.planning.plan import GB
from tunix_gemma4.planning.search import Search

START = 8192


class Case(NamedTuple):
    """A line of the table."""

    size: str
    recipe: str
    settings: str
    topology: str


_RECIPES = {
    "E2B": "lora-text e2b",
    "E4B": "lora-image e4b",
    "12B": "lora-text 12b",
    "26B-A4B": "lora-image 26b-a4b",
    "31B": "lora-image 31b",
}
_NF4 = "lora.quantize=nf4"
CASES = (
    *(Case(size, _RECIPES[size], "", "h100:1") for size in ("E2B", "E4B", "12B", "26B-A4B")),
    Case("31B", _RECIPES["31B"], _NF4, "h100:1"),
    Case("31B", _RECIPES["31B"], "", "h200:1"),
    Case("31B", _RECIPES["31B"], _NF4, "h200:1"),
    *(Case(size, recipe, "", "v5e:2x4") for size, recipe in _RECIPES.items()),
    Case("31B", _RECIPES["31B"], "", "v5p:2x2x1"),
)


def longest(case: Case) -> tuple[int | None, int]:
    """The length, and bytes per chip there."""
    chips = hardware(case.topology)
    settings = [
        *case.settings.split(),
        "text_only=true",
        f"mesh={{fsdp: {chips.chips}, tp: 1}}",
        f"batch_size={chips.chips}",
        "gradient_accumulation_steps=1",
        f"data.max_length={START}",
    ]
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    search = Search(load_settings(case.recipe.split(), settings), case.topology, 0, say)
    _, length = search.longest(chips.capacity)
    totals = [one.total for one in search.tried if one.settings == f"data.max_length={length}"]
    return length, max(totals, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="topologies, such as h100:1")
    arguments = parser.parse_args()
    tunix_gemma4.register()
    print("| size | chips | kernels | longest row | GB per chip | of |\n|---|---|---|---|---|---|")
    for case in CASES:
        if arguments.only and case.topology not in arguments.only:
            continue
        length, total = longest(case)
        capacity = hardware(case.topology).capacity / GB
        print(
            f"| {case.size} | {case.topology} | {'nf4' if case.settings else 'bfloat16'} "
            f"| {'none' if length is None else f'{length:,}'} | {total / GB:.1f} "
            f"| {capacity:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
