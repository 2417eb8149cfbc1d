# SPDX-License-Identifier: Apache-2.0
"""Sums of two-digit numbers as conversations, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..testing.digits import NUM_CURVE, NUM_HELD_OUT, TaskData

_NUMBERS = range(10, 90)


def problems() -> list[tuple[int, int]]:
    """Every pair of two-digit numbers with a sum of two digits, in a fixed random order.

    A pair comes next to its mirror image, so that none of what is held out was trained on the
    other way round.
    """
    pairs = [(low, high) for low in _NUMBERS for high in range(low, 100 - low)]
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = [pairs[index] for index in order]
    return [pair for low, high in chosen for pair in dict.fromkeys([(low, high), (high, low)])]


def conversation(first: int, second: int) -> dict:
    """One row: a sum and its answer."""
    return {
        "messages": [
            {"role": "user", "content": f"{first}+{second}"},
            {"role": "assistant", "content": str(first + second)},
        ]
    }


def write_sums(directory: Path) -> TaskData:
    """Writes the rows to train on and the curve's, and returns what is held out."""
    rows = [conversation(*pair) for pair in problems()]
    held_out, train = rows[:NUM_HELD_OUT], rows[NUM_HELD_OUT:]
    directory.mkdir(parents=True, exist_ok=True)
    paths = {"train": directory / "sums_train.jsonl", "curve": directory / "sums_curve.jsonl"}
    for name, chosen in (("train", train), ("curve", held_out[:NUM_CURVE])):
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in chosen), "utf-8")
    return TaskData(held_out=held_out, **paths)
