# SPDX-License-Identifier: Apache-2.0
"""Rows of a source, each read once: to examples, their measures, or an error that names the row.

What differs between conversations, prompts and preferences is a `Road`; the rest is one pipeline.
"""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .conversation import Conversation
from .images import is_path
from .keys import image_in
from .sources import Rows, check_text, field_name, walk

_LONGEST_TEXT = 400  # characters of an error that may hold a whole row
_HELD_BYTES = 256 << 20  # of examples that were read before their turn


class RowError(ValueError):
    """A row that cannot be used; says which one of which file, and why."""


class Measure(NamedTuple):
    """What an example takes.

    Attributes:
        lengths: tokens, one number for each of `Road.limits`.
        images: how many.
        supervised: tokens that are learnt.
        thoughts: how many of earlier turns are left out.
        unthinking: whether the template tells to think, and no thought is learnt.
    """

    lengths: tuple[int, ...]
    images: int
    supervised: int
    thoughts: int = 0
    unthinking: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One example of the stream, measured."""

    position: int  # of its source row in the stream, which runs through all epochs
    part: int  # which of the examples of its source row
    index: int  # of its source row in the source
    measure: Measure
    example: Any | None  # None: measured in an earlier epoch, encoded again only when needed


@dataclasses.dataclass(frozen=True)
class Parts:
    """What one source row gives: its examples, or what is wrong with it."""

    rows: tuple[Row, ...]
    index: int
    error: str | None = None


class Road(abc.ABC):
    """What one kind of rows is read into.

    Attributes:
        limits: the most tokens, by the name of the setting, of each of a measure's lengths.
        notes: names that were met: of columns beside what is learnt or asked, and of keys in
            messages that mean nothing here.
        columns_are: what becomes of columns that no form knows.
        bucketed: whether batches are formed of examples of similar length and images.
    """

    limits: Mapping[str, int]
    columns_are = "columns that are not trained on"
    bucketed = False

    def __init__(self) -> None:
        self.notes: dict[str, dict[str, None]] = {"columns": {}, "keys": {}}

    @abc.abstractmethod
    def read(self, row: Any) -> list[Any]:
        """The examples of a source row: read once, templated once."""

    @abc.abstractmethod
    def images(self, row: Any) -> Sequence[Any]:
        """The images of a source row, as it names them."""

    @abc.abstractmethod
    def measure(self, example: Any) -> Measure:
        """What an example takes."""

    @abc.abstractmethod
    def collate(
        self, examples: list[Any], shape: tuple[int, int], size: int, denominator: float
    ) -> Any:
        """A batch.

        Args:
            examples: at most `size`.
            shape: tokens and images per row.
            size: rows of the batch.
            denominator: supervised tokens of the step, divided by its micro-batches.
        """

    def note(self, read: Conversation, *columns: str) -> None:
        """Takes up the names in a row that was read, and further columns of it."""
        self.notes["columns"] |= dict.fromkeys([*read.columns, *columns])
        self.notes["keys"] |= dict.fromkeys(read.unread)

    def notes_text(self) -> str:
        """The names, for the user; empty if there are none."""
        found = {kind: ", ".join(sorted(names)) for kind, names in self.notes.items() if names}
        what = {"columns": self.columns_are, "keys": "keys of messages that are not read"}
        return "\n".join(f"  {what[kind]}: {names}" for kind, names in found.items())

    def too_long(self, measure: Measure) -> bool:
        """Whether a limit would have to cut the example."""
        return any(
            length > most
            for length, most in zip(measure.lengths, self.limits.values(), strict=True)
        )

    def limit_text(self) -> str:
        """The limits, for messages."""
        return ", ".join(f"{name}={most}" for name, most in self.limits.items())

    def dropped_text(self, name: str, dropped: int, rows: int) -> str:
        """Says after an epoch how many examples were too long."""
        return (
            f"{name}: {dropped} of {rows} rows are left out, because they are longer than "
            f"{self.limit_text()}"
        )

    def too_few_text(self, name: str, kept: int, rows: int, batch_size: int, shortest: int) -> str:
        """Says that there is not even one batch."""
        return (
            f"{name}: {kept} of its {rows} rows are short enough ({self.limit_text()}), which is "
            f"less than one batch of {batch_size}"
        )


class Encoder:
    """Reads, encodes and measures rows; remembers the measures, not the tokens and images.

    Attributes:
        skip_bad_rows: leave out what cannot be read.
        bad: what is wrong with source rows that were left out, by index.
        long: (index, part) of examples that are too long.
        measures: of the examples of each source row that was read.
    """

    def __init__(self, rows: Rows, road: Road, *, keep_examples: bool, skip_bad_rows: bool):
        self.rows, self.road = rows, road
        # With several processes most examples belong to another one: once a row's measures are
        # known, it is encoded only by the process that trains on it.
        self._keep_examples = keep_examples
        self.skip_bad_rows = skip_bad_rows
        self.bad: dict[int, str] = {}
        self.long: set[tuple[int, int]] = set()
        self.measures: dict[int, tuple[Measure, ...]] = {}
        self._known: dict[int, int] | None = None  # Examples to train on, once all are known.
        self._held: dict[int, list[Any]] = {}
        self._held_bytes, self._lock = 0, threading.Lock()

    def examples(self, index: int) -> list[Any]:
        """The examples of source row `index`.

        Raises:
            RowError: whatever was raised on the way, so that nothing ends an epoch unnamed.
        """
        held = self._held.pop(index, None)
        if held is not None:
            with self._lock:
                self._held_bytes -= _size(held)
            return held
        row = None
        try:
            row = self.rows[index]
            return self.road.read(row)
        except (MemoryError, RowError):
            raise
        except Exception as error:
            raise RowError(f"{self.rows.place(index)}: {_told(error, row)}") from error

    def hold(self, index: int) -> list[Any]:
        """As `examples`, which will give what was read now, unless it is too much to keep."""
        examples = self.examples(index)
        size = _size(examples)
        with self._lock:
            if self._held_bytes + size <= _HELD_BYTES:
                self._held[index] = examples
                self._held_bytes += size
        return examples

    def parts(self, position: int, index: int, *, hold: bool = False) -> Parts:
        """Source row `index` at `position` of the stream."""
        known = self.measures.get(index)
        if self.rows.is_gone(index):
            return Parts((), index)
        if index in self.bad:
            return Parts((), index, self.bad[index])
        if known is not None and not self._keep_examples:
            rows = (Row(position, part, index, m, None) for part, m in enumerate(known))
            return Parts(tuple(rows), index)
        try:
            examples = self.hold(index) if hold else self.examples(index)
            measures = self._measured(index, examples)
        except RowError as error:
            if not self.skip_bad_rows:
                raise
            self.bad[index] = str(error)
            return Parts((), index, str(error))
        self.measures[index] = measures
        self.long |= {(index, n) for n, m in enumerate(measures) if self.road.too_long(m)}
        pairs = enumerate(zip(measures, examples, strict=True))
        return Parts(tuple(Row(position, n, index, m, example) for n, (m, example) in pairs), index)

    def _measured(self, index: int, examples: list[Any]) -> tuple[Measure, ...]:
        try:
            return tuple(map(self.road.measure, examples))
        except ValueError as error:
            raise RowError(f"{self.rows.place(index)}: {error}") from error

    def kept(self, index: int, *, hold: bool = True) -> int:
        """Examples of a source row that are trained on; reads it if that is not known."""
        if index in self.bad or self.rows.is_gone(index):
            return 0
        if self._known is not None:
            return self._known.get(index, 1)
        if index not in self.measures:
            self.parts(0, index, hold=hold)
        return sum(not self.road.too_long(m) for m in self.measures.get(index, ()))

    def recall(self, found: Any) -> None:
        """Takes over what an earlier check of the same rows has found; see `Checked`."""
        self.bad |= found.bad
        self.long |= set(found.long)
        self.road.notes = {kind: dict(names) for kind, names in found.notes.items()}
        if found.is_whole:
            known = dict(found.parts)
            for index, _ in found.long:
                known[index] = known.get(index, 1) - 1
            self._known = known

    def bad_text(self) -> str:
        """Which rows cannot be read; empty if there are none."""
        if not self.bad:
            return ""
        return (
            f"{len(self.bad)} of {len(self.rows)} rows cannot be read and are left out, the first: "
            f"{self.bad[min(self.bad)]}"
        )

    def shortest(self) -> int:
        """Tokens of the shortest example that was read."""
        return min((m.lengths[0] for ms in self.measures.values() for m in ms), default=0)

    def look(self, index: int) -> str | None:
        """What is wrong with a source row that is read, but neither templated nor tokenized.

        The files of its images have to exist.
        """
        row = None
        try:
            row = self.rows[index]
            for number, image in enumerate(self.road.images(row)):
                path = _path_of(image)
                if path is not None and not path.is_file():
                    raise ValueError(f"image {number}: there is no file {str(path)!r}")
        except MemoryError:
            raise
        except Exception as error:
            return f"{self.rows.place(index)}: {_told(error, row)}"
        return None


def _path_of(image: Any) -> Path | None:
    image = image_in(image)
    if not isinstance(image, str | Path):
        return None
    text = str(image).removeprefix("file://")
    return Path(text) if is_path(text) else None


def _told(error: Exception, row: Any) -> str:
    """An error in words; of one that nobody wrote for the user, its kind and the field too."""
    text = str(error)
    if isinstance(error, UnicodeError | TypeError) or isinstance(error.__cause__, UnicodeError):
        try:
            check_text(row)
        except ValueError as found:
            return str(found)
    if type(error) is not ValueError:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        field = _field_of(error, row)
        text = f"{field}: {text}" if field else text
    if len(text) <= _LONGEST_TEXT:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]} ... {text[-half:]}"


def _field_of(error: Exception, row: Any) -> str | None:
    """The field of `row` whose value an error names, such as a file."""
    named = {part for part in (*error.args, getattr(error, "filename", None)) if part is not None}
    named = {str(part) for part in named if isinstance(part, str | Path)}
    for path, value in walk(row):
        if isinstance(value, str) and value and value in named:
            return field_name(path)
    return None


def _size(examples: list[Any]) -> int:
    """Bytes of the arrays in examples."""
    total = 0
    for example in examples:
        for value in vars(example).values():
            if isinstance(value, np.ndarray):
                total += value.nbytes
            elif dataclasses.is_dataclass(value):
                total += _size([value])
    return total
