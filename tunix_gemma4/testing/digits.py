# SPDX-License-Identifier: Apache-2.0
"""Scans of handwritten digits as conversations, on disk as a user's own data would be."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..extras import require_extra

NUM_HELD_OUT = 360
NUM_CURVE = 120  # held-out scans that are looked at while training


@dataclasses.dataclass(frozen=True)
class Task:
    """A question about each scan.

    Attributes:
        name: of its files.
        question: the user's words.
        answer: from the digit that was written to the assistant's words.
    """

    name: str
    question: str
    answer: Callable[[int], str]


DIGIT = Task("digit", "What digit is this?", str)
MINUS = Task("nine_minus", "What is nine minus this digit?", lambda digit: str(9 - digit))


@dataclasses.dataclass(frozen=True)
class TaskData:
    """One task's files and rows.

    Attributes:
        train, curve: JSONL files; `curve` is the beginning of what is held out.
        held_out: all rows that are held out.
    """

    train: Path
    curve: Path
    held_out: list[dict]


def require_demo() -> None:
    """Raises ValueError unless the images and the curves of the demos can be made."""
    for module, use in (("sklearn", "its images"), ("matplotlib", "its curves")):
        require_extra(module, "demo", f"the demo, for {use},")


def write_scans(directory: Path) -> tuple[list[Path], list[int]]:
    """Writes scikit-learn's 1,797 scans of 8 x 8 pixels as PNG files, in a fixed random order.

    Returns:
        Their paths and the digits that were written.
    """
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    folder = directory / "scans"
    folder.mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(scans.images))
    paths = []
    for number, index in enumerate(order):
        pixels = (scans.images[index] * (255 / 16)).astype(np.uint8)
        paths.append(folder / f"{number:04}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths, scans.target[order].tolist()


def write_blank(directory: Path, scans: list[Path]) -> list[Path]:
    """One white image of the scans' size in the place of each."""
    path = directory / "blank.png"
    with Image.open(scans[0]) as scan:
        Image.new(scan.mode, scan.size, 255).save(path)
    return [path] * len(scans)


def write_task(directory: Path, task: Task, scans: list[Path], digits: list[int]) -> TaskData:
    """Writes one task's training rows and the curve's, and returns what is held out."""
    rows = [conversation(task, scan, digit) for scan, digit in zip(scans, digits, strict=True)]
    return write_split(directory, task.name, rows)


def write_split(directory: Path, name: str, rows: list[dict]) -> TaskData:
    """Holds the first rows out, and writes the others and the curve's."""
    held_out, train = rows[:NUM_HELD_OUT], rows[NUM_HELD_OUT:]
    data = TaskData(directory / f"{name}_train.jsonl", directory / f"{name}_curve.jsonl", held_out)
    _write_rows(data.train, train)
    _write_rows(data.curve, held_out[:NUM_CURVE])
    return data


def _write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_preferences(file: Path, task: Task, scans: list[Path], digits: list[int]) -> None:
    """Writes rows that prefer the answer for the digit that was written to that for another."""
    draw = np.random.default_rng(0)
    rows = []
    for scan, digit in zip(scans, digits, strict=True):
        *prompt, chosen = conversation(task, scan, digit)["messages"]
        other = (digit + int(draw.integers(1, 10))) % 10
        rejected = chosen | {"content": task.answer(other)}
        rows.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    _write_rows(file, rows)


def conversation(task: Task, scan: Path, digit: int) -> dict:
    """One row: a scan and a question, and the answer."""
    question = [
        {"type": "image", "image": str(scan.absolute())},
        {"type": "text", "text": task.question},
    ]
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": task.answer(digit)},
        ]
    }
