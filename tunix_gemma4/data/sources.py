# SPDX-License-Identifier: Apache-2.0
"""Rows of conversations from JSONL, JSON, parquet or a Python sequence, by random access."""

from __future__ import annotations

import base64
import copy
import functools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.files import sha256
from ..config.source import parse_json
from .images import is_path
from .keys import ANSWERS, CHOSEN, CONVERSATIONS, IMAGE_PARTS, IMAGES, PROMPTS, REJECTED, walk

# Keys of lists of images, and those under which messages and parts may stand in each other.
_IMAGES = (*IMAGES, "rejected_images")
# What else stands beside the path in an image part.
_NO_PATHS = ("type", "text", "detail", "media_type", "data", "bytes", "base64", "cache_control")
_NESTED = (
    *(*CONVERSATIONS, *PROMPTS, *ANSWERS, *CHOSEN, *REJECTED),
    *("input", "content", "value"),
)
_DEEPEST = 64  # levels of lists and objects in a row
_GONE = 0  # the fingerprint of a row that an earlier run knew
_MOST_FINGERPRINTS = 100_000  # rows
_HELD_BYTES = 32 << 20  # of a JSONL file whose rows are kept in memory


class Rows:
    """Rows by index, as the file or sequence has them: `read_conversation` knows their forms.

    Only paths of images change: those in a file are relative to the file's folder.
    """

    def __init__(self, source: str | Path | Sequence):
        self._before: np.ndarray | None = None
        self._records: Any
        self._folder: Path | None = None
        if isinstance(source, str) and "://" in source:
            raise ValueError(f"{source}: it is an address; download the file and give its path.")
        self.path = Path(source) if isinstance(source, str | Path) else None
        if self.path is not None:
            path = self.path
            self.name, self._folder, self._records = path.name, path.parent, _open(path)
        else:
            if not isinstance(source, Sequence) and not hasattr(source, "__len__"):
                raise ValueError(
                    "rows: expected a file's path or a sequence, found "
                    f"{type(source).__name__}; a generator's rows are given as list(...)"
                )
            self.name, self._records = "the given sequence", source
        if len(self._records) == 0:
            raise ValueError(f"{self.name}: expected at least one row, found none.")

    def __len__(self) -> int:
        return len(self._records) if self._before is None else len(self._before)

    def __getitem__(self, index: int):
        row = self.raw(index)
        check_depth(row)
        if self._folder is None:
            return row
        anchored = _anchored(row, self._folder)
        if not isinstance(row, Mapping):
            return anchored
        return anchored | {k: _with_paths(row[k], self._folder) for k in _IMAGES if k in row}

    def raw(self, index: int):
        """A row as the source has it."""
        return self._records[self._now(index)]

    def place(self, index: int) -> str:
        """How messages to the user call row `index`."""
        return f"row {self._now(index)} of {self.name}"

    def _now(self, index: int) -> int:
        return index if self._before is None else int(self._before[index])

    # ---- The rows of an earlier run, of which some have gone since.

    def is_gone(self, index: int) -> bool:
        """Whether an earlier run knew this row and the source has it no more."""
        return self._before is not None and self._before[index] < 0

    def as_before(self, places: np.ndarray) -> Rows:
        """These rows, numbered as an earlier run did, whose `places` are those of `find_rows`."""
        now, result = self.fingerprints, copy.copy(self)
        result._before = places
        if now is not None:
            sums = np.where(places < 0, _GONE, now[places]).astype(np.uint32)
            vars(result)["fingerprints"] = sums  # in place of those of the rows as they are
        return result

    @functools.cached_property
    def fingerprints(self) -> np.ndarray | None:
        """A number for what each row holds, images left out; None where that takes too long."""
        if len(self._records) > _MOST_FINGERPRINTS:
            return None
        if isinstance(self._records, _JsonLines):
            return self._records.sums
        if not isinstance(self._records, list | tuple | _ParquetTable):
            return None
        return np.array([_sum_of(row) for row in self._records], np.uint32)

    @property
    def fingerprints_text(self) -> str | None:
        """The same as text, which `follow_rows` reads."""
        now = self.fingerprints
        return None if now is None else base64.b64encode(now.tobytes()).decode()

    def sha256(self) -> str | None:
        """Of the file's bytes; None for a sequence."""
        return None if self.path is None else sha256(self.path)


def find_rows(before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray] | int:
    """Where the rows of an earlier run are now, and which of them are gone or others.

    By fingerprints: for each row of `before` its index now, or -1 if it was taken out; and the
    indices in `before` of rows that were taken out or changed. Where there are rows besides, the
    first of these.
    """
    gone = before == _GONE
    if len(before) == len(now) and not gone.any():
        return np.arange(len(before)), np.flatnonzero(before != now)
    places, place = np.full(len(before), -1), 0
    for index, value in enumerate(before):
        if place < len(now) and now[place] == value:
            places[index], place = place, place + 1
    return place if place < len(now) else (places, np.flatnonzero((places < 0) & ~gone))


def follow_rows(rows: Rows, before: str | None) -> tuple[Rows, list[int]] | None:
    """The rows of an earlier run, numbered as it did, and those that are gone or others now.

    `rows` are those of the source as it is, `before` is the earlier run's `Plan.fingerprints`. None
    where nothing changed, or where what changed cannot be told.

    Raises:
        ValueError: there are rows that the earlier run did not know.
    """
    now = rows.fingerprints
    if before is None or now is None:
        return None
    sums = np.frombuffer(base64.b64decode(before), np.uint32)
    if np.array_equal(sums, now):
        return None
    found = find_rows(sums, now)
    if isinstance(found, int):
        raise ValueError(
            f"{rows.name}: it has {len(now)} rows and the run of the checkpoints knew {len(sums)}; "
            f"row {found} is new, or was changed besides others that were taken out. Put back the "
            "file as it was (rows that it had not trained on may be taken out or corrected), or "
            "choose another output_dir"
        )
    places, changed = found
    return rows.as_before(places), changed.tolist()


def field_name(path: tuple) -> str:
    """A path as messages write it: messages[0].content."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return "".join(parts).lstrip(".") or "the row"


def check_depth(row) -> None:
    """Raises ValueError naming the field of what no reader can follow."""
    for path, _ in walk(row):
        if len(path) > _DEEPEST:
            raise ValueError(
                f"{field_name(path[:1])}: expected at most {_DEEPEST} levels of lists and objects "
                "in each other, found more"
            )


def check_text(row) -> None:
    """Raises ValueError naming the field of what no tokenizer can take."""
    for path, value in walk(row):
        try:
            value.encode() if isinstance(value, str) else None
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{field_name(path)}: character {error.start} is half of a surrogate pair "
                f"({error.object[error.start]!r}), which is no text; remove or correct it"
            ) from None


def _sum_of(row) -> int:
    """A number for the JSON of `row`; of arrays their bytes, of what is no JSON its type."""
    try:
        text = json.dumps(row, default=_described, skipkeys=True)
    except (ValueError, RecursionError):
        text = type(row).__name__
    return _sum(text.encode())


def _sum(text: bytes) -> int:
    return zlib.crc32(text) or 1


def _described(value) -> list:
    if isinstance(value, np.ndarray):
        content = zlib.crc32(np.ascontiguousarray(value).data) if value.dtype != object else 0
        return [str(value.dtype), list(value.shape), content]
    if isinstance(value, bytes):
        return ["bytes", zlib.crc32(value)]
    return [type(value).__name__, str(value) if isinstance(value, Path) else ""]


class _JsonLines:
    """A JSONL file, parsed when it is opened; the rows of a large one are read again by offset."""

    def __init__(self, path: Path):
        self._path = path
        self._rows = [] if path.stat().st_size <= _HELD_BYTES else None
        self._offsets, sums = [], []
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = self._parse(line, number)
                    if self._rows is not None:
                        self._rows.append(row)
                    self._offsets.append(offset)
                    sums.append(_sum(line.strip()))
                offset += len(line)
        self.sums = np.array(sums, np.uint32)

    def _parse(self, line: bytes, number: int):
        try:
            return parse_json(line)
        except (ValueError, RecursionError) as error:
            coding = line[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in line
            remedy = "Save it as UTF-8" if coding else "Correct or remove the line"
            raise ValueError(
                f"{self._path}, line {number}: expected one JSON object, found something "
                f"that is not JSON ({error}). {remedy}."
            ) from error

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int):
        if self._rows is not None:
            return self._rows[index]
        # A file handle of its own for each read, because several threads read at once.
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return parse_json(file.readline())


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
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({error}).") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict:
        return self._table.slice(index, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))


def _json_list(path: Path) -> list:
    try:
        rows = parse_json(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). "
            "If each line is an object of its own, name the file .jsonl."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error}).") from error
    except RecursionError as error:
        raise ValueError(f"{path}: its lists and objects stand too deep in each other.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
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


def _anchored(value, folder: Path) -> Any:
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
        return str(folder / value) if value and is_path(value) else value
    if isinstance(value, Mapping):
        return {
            key: part if key in _NO_PATHS else _with_paths(part, folder)
            for key, part in value.items()
        }
    return [_with_paths(part, folder) for part in value] if isinstance(value, list) else value
