# SPDX-License-Identifier: Apache-2.0
"""Rows of conversations from JSONL, JSON, parquet or a Python sequence, by random access."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .processor_images import is_path
from .processor_keys import ANSWERS, CHOSEN, CONVERSATIONS, IMAGE_PARTS, IMAGES, PROMPTS, REJECTED

# Keys of lists of images, and those under which messages and parts may stand in each other.
_IMAGES = (*IMAGES, "rejected_images")
# What else stands beside the path in an image part.
_NO_PATHS = ("type", "text", "detail", "media_type", "data", "bytes", "base64", "cache_control")
_NESTED = (
    *(*CONVERSATIONS, *PROMPTS, *ANSWERS, *CHOSEN, *REJECTED),
    *("input", "content", "value"),
)


class Rows:
    """Rows by index, as the file or sequence has them: `read_conversation` knows their forms.

    Only paths of images change: those in a file are relative to the file's folder.
    """

    def __init__(self, source: str | Path | Sequence):
        if isinstance(source, str | Path):
            path = Path(source)
            self.name, self._folder, self._records = path.name, path.parent, _open(path)
        else:
            self.name, self._folder, self._records = "the given sequence", None, source
        if len(self._records) == 0:
            raise ValueError(f"{self.name}: expected at least one row, found none.")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int):
        row = self._records[index]
        if self._folder is None:
            return row
        if not isinstance(row, Mapping):
            return _anchored(row, self._folder)
        images = {key: _with_paths(row[key], self._folder) for key in _IMAGES if key in row}
        return {**_anchored(row, self._folder), **images}

    def place(self, index: int) -> str:
        """How messages to the user call row `index`."""
        return f"row {index} of {self.name}"


class _JsonLines:
    """A JSONL file: checked line by line when opened, then only the lines' offsets are kept."""

    def __init__(self, path: Path):
        self._path = path
        self._offsets = []
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        json.loads(line)
                    except ValueError as error:
                        raise ValueError(
                            f"{path}, line {number}: expected one JSON object, found something "
                            f"that is not JSON ({error}). Correct or remove the line."
                        ) from error
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int):
        # A file handle of its own for each read, because several threads read at once.
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return json.loads(file.readline())


class _ParquetTable:
    """A parquet file, its columns in memory, turned into Python objects row by row."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(
                f"{path}: reading parquet needs the package pyarrow, which is not installed. "
                "Install pyarrow, or convert the file to JSONL."
            ) from error
        try:
            self._table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a readable parquet file ({error}).") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict:
        return self._table.slice(index, 1).to_pylist()[0]


def _json_list(path: Path) -> list:
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). "
            "If each line is an object of its own, name the file .jsonl."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error}).") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, found {type(rows).__name__}.")
    return rows


_OPENERS = {".jsonl": _JsonLines, ".json": _json_list, ".parquet": _ParquetTable}


def _open(path: Path):
    if path.suffix not in _OPENERS:
        raise ValueError(f"{path}: expected a file ending in {', '.join(_OPENERS)}.")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file (current folder: {Path.cwd()}).")
    return _OPENERS[path.suffix](path)


def _anchored(value, folder: Path):
    """`value` with the relative paths in image parts put under `folder`; all else stays.

    What a tool was asked or answered is data, whatever its keys are called.
    """
    if isinstance(value, list):
        return [_anchored(part, folder) for part in value]
    if not isinstance(value, Mapping) or value.get("type") == "tool_use":
        return value
    if value.get("type") in IMAGE_PARTS:
        return _with_paths(value, folder)
    return {key: _anchored(part, folder) if key in _NESTED else part for key, part in value.items()}


def _with_paths(value, folder: Path):
    """An image, or several, whose strings are paths unless they are addresses or base64."""
    if isinstance(value, str):
        return str(folder / value) if is_path(value) else value
    if isinstance(value, Mapping):
        return {
            key: part if key in _NO_PATHS else _with_paths(part, folder)
            for key, part in value.items()
        }
    return [_with_paths(part, folder) for part in value] if isinstance(value, list) else value
