# SPDX-License-Identifier: Apache-2.0
"""Rows of conversations from JSONL, JSON, parquet or a Python sequence, by random access."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

# Where a row may hold images, and under which keys their paths stand.
_FIELDS = (
    *("messages", "conversations", "prompt", "completion", "chosen", "rejected"),
    *("images", "image"),
)
_PATH_KEYS = ("images", "image", "path", "url", "image_url")


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
        fields = {key: _anchored(row[key], self._folder, key) for key in _FIELDS if key in row}
        return {**row, **fields}

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


def _anchored(value, folder: Path, key: str = ""):
    """`value` with every relative path of an image in it put under `folder`."""
    if isinstance(value, str):
        is_address = "://" in value or value.startswith("data:")
        return str(folder / value) if key in _PATH_KEYS and not is_address else value
    if isinstance(value, Mapping):
        return {inner: _anchored(part, folder, inner) for inner, part in value.items()}
    if isinstance(value, list):
        return [_anchored(part, folder, key) for part in value]
    return value
