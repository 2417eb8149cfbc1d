# SPDX-License-Identifier: Apache-2.0
"""Reading JSON: what a directory's small files, rows and calls of tools hold, and no key twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """What JSON holds.

    Args:
        text: the JSON.
        finite: refuse NaN, Infinity and numbers beyond float64, which the format does not have.

    Raises:
        ValueError: `json.JSONDecodeError` where it is no JSON; otherwise naming a key that stands
            in one object twice, or the number.
    """
    numbers = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
    return json.loads(text, object_pairs_hook=_once, **numbers)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand there once; readers differ in which of two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands in one object twice")
    return found


def _finite(written: str) -> float:
    number = float(written)
    if not math.isfinite(number):
        raise ValueError(f"{written:.80} is no finite number")
    return number


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it cannot be read, is no JSON, holds something else than an object, or a key
            twice.
    """
    try:
        content = parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
