# SPDX-License-Identifier: Apache-2.0
"""Rows of a source, each read once: to examples, their measures, or an error that names the row.

What differs between conversations, prompts and preferences is a `Road`; the rest is one pipeline.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from tqdm import tqdm

from ..checkpoint.files import write_text
from .conversation import Conversation
from .images import is_path
from .keys import image_in, walk
from .sources import Rows, check_text, field_name

_LONGEST_TEXT = 400  # characters of an error that may hold a whole row
_HELD_BYTES = 256 << 20  # of examples that were read before their turn


class RowError(ValueError):
    """A row that cannot be used; says which one of which file, and why."""


class Measure(NamedTuple):
    """What an example takes."""

    lengths: tuple[int, ...]  # tokens, one number for each of `Road.limits`
    images: int  # how many
    supervised: int  # tokens that are learnt
    thoughts: int = 0  # how many of earlier turns are left out
    unthinking: bool = False  # the template tells the model to think, and no thought is learnt


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

    rows: tuple[Row, ...] = ()
    error: str | None = None


class Road(abc.ABC):
    """What one kind of rows is read into.

    Attributes:
        limits: the most tokens, by the name of the setting, of each of a measure's lengths.
        notes: names that were met: of columns beside what is learnt or asked, and of keys in
            messages that mean nothing here.
        columns_are: what becomes of columns that no form knows.
        bucketed: whether batches are formed of examples of similar length and images.
        dropped_text: says after an epoch how many examples were too long.
        too_few_text: says that there is not even one batch.
    """

    limits: Mapping[str, int]
    columns_are = "columns that are not trained on"
    bucketed = False
    dropped_text = (
        "{name}: {dropped} of {rows} rows are left out, because they are longer than {limits}"
    )
    too_few_text = (
        "{name}: {kept} of its {rows} rows are short enough ({limits}), which is less than one "
        "batch of {batch_size}"
    )

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
        return self._with_row(index, self.road.read)

    def _with_row(self, index: int, use: Callable[[Any], Any]) -> Any:
        row = None
        try:
            row = self.rows[index]
            return use(row)
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
            return Parts()
        if index in self.bad:
            return Parts(error=self.bad[index])
        if known is not None and not self._keep_examples:
            return Parts(tuple(Row(position, n, index, m, None) for n, m in enumerate(known)))
        try:
            examples = self.hold(index) if hold else self.examples(index)
            measures = self._measured(index, examples)
        except RowError as error:
            if not self.skip_bad_rows:
                raise
            self.bad[index] = str(error)
            return Parts(error=str(error))
        self.measures[index] = measures
        self.long |= {(index, n) for n, m in enumerate(measures) if self.road.too_long(m)}
        pairs = enumerate(zip(measures, examples, strict=True))
        return Parts(tuple(Row(position, n, index, m, example) for n, (m, example) in pairs))

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

    def look(self, index: int) -> None:
        """Reads a source row, whose images' files have to exist; templates and tokenizes nothing.

        Raises:
            RowError: saying what is wrong with it.
        """

        def find(row: Any) -> None:
            for number, image in enumerate(self.road.images(row)):
                path = _path_of(image)
                if path is not None and not path.is_file():
                    raise ValueError(f"image {number}: there is no file {str(path)!r}")

        self._with_row(index, find)


class OfRows:
    """What has a plan, and what is known of its rows as far as they were read."""

    plan: Any  # a `pipeline.Plan`

    @property
    def num_rows(self) -> int:
        """Rows of the source, whatever they hold."""
        return len(self.plan.rows)

    @property
    def dropped(self) -> int:
        """Examples that are too long."""
        return len(self.plan.encoder.long)

    @property
    def left_out(self) -> str:
        """What could not be read; empty if all could."""
        return self.plan.encoder.bad_text()


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


How = str | int | bool | None
_ALL_BELOW, _SOME = 20_000, 2_000  # rows
_VERSION = 2
_SECONDS = 30  # between lines where there is no terminal
_NAMED = 10  # rows that an error lists by number


def rows_to_check(how: How, rows: int, name: str = "data.check") -> int:
    """How many of `rows` rows are read whole; see `pipeline.BatchDataset.check`.

    Raises:
        ValueError: naming the setting, for another value.
    """
    if how is None:
        return rows if rows < _ALL_BELOW else _SOME
    if how is False:
        return 0
    if how == "all":
        return rows
    if isinstance(how, bool) or not isinstance(how, int) or how < 1:
        raise ValueError(f"{name}: expected all, a number of rows or false, found {how!r}")
    return min(how, rows)


@dataclasses.dataclass
class Checked:
    """What was found."""

    rows: int  # of the source
    examined: int  # how many of them were read whole
    # How many examples of each measure there are; the same, without those that are too long.
    measures: dict[Measure, int] = dataclasses.field(default_factory=dict)
    kept: dict[Measure, int] = dataclasses.field(default_factory=dict)
    # Of source rows that do not give one example, how many they give.
    parts: dict[int, int] = dataclasses.field(default_factory=dict)
    # (index, part) of the examples that are too long; what is wrong with rows that are left out.
    long: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    bad: dict[int, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)  # see `Road`

    @property
    def is_whole(self) -> bool:
        """Whether every row was read."""
        return self.examined == self.rows

    @property
    def examples(self) -> int:
        """Examples that are trained on, of all rows: exact if every row was read."""
        if not self.examined:
            return 0
        return round(sum(self.kept.values()) * self.rows / self.examined)

    def summary(self, name: str, limits: str) -> str:
        """A few lines for the user."""
        lengths = np.repeat([m.lengths[0] for m in self.measures], list(self.measures.values()))
        tokens = sum(sum(measure.lengths) * count for measure, count in self.kept.items())
        learnt = sum(measure.supervised * count for measure, count in self.kept.items())
        images = sum(measure.images * count for measure, count in self.kept.items())
        checked = "all" if self.is_whole else f"{self.examined:,}"
        lines = [
            f"{name}: {self.rows:,} rows, {checked} checked: {sum(self.kept.values()):,} to train "
            f"on with {tokens:,} tokens"
            + (f", {learnt:,} of them learnt," if learnt else "")
            + f" and {images:,} images."
        ]
        if len(lengths):
            at = np.percentile(lengths, (50, 95, 100), method="higher").astype(int).tolist()
            lines.append("  lengths at 50/95/100 %: {:,}/{:,}/{:,} tokens".format(*at))
        thoughts = sum(measure.thoughts * count for measure, count in self.kept.items())
        if thoughts:
            lines.append(f"  left out, as when the model is asked: {thoughts:,} earlier thoughts")
        unthinking = sum(count for measure, count in self.kept.items() if measure.unthinking)
        if unthinking:
            lines.append(f"  told to think, and without a thought to learn: {unthinking:,}")
        if self.long:
            lines.append(f"  left out: {len(self.long):,} longer than {limits}")
        if self.bad:
            first = self.bad[min(self.bad)]
            lines.append(f"  left out: {len(self.bad):,} that cannot be read, the first: {first}")
        return "\n".join(lines)


def check_rows(
    encoder: Encoder,
    how: How,
    threads: int,
    log: Callable[[str], None],
    *,
    cache: Path | None,
    key: str,
    before: str | None,
) -> Checked:
    """Checks the rows of an encoder, which then knows their measures.

    See `pipeline.BatchDataset.check`. `threads` read besides this one.
    """
    rows, road = encoder.rows, encoder.road
    count = rows_to_check(how, len(rows))
    key = json.dumps([_VERSION, rows.sha256(), len(rows), count, key]) if cache else ""
    found = _read(cache, key)
    if found is None:
        found = _examined(encoder, count, threads, log) if count else Checked(len(rows), 0)
        _write(cache, key, found, before or rows.fingerprints_text)
    else:
        encoder.recall(found)
    if count:
        log(found.summary(rows.name, road.limit_text()))
        if road.notes_text():
            log(road.notes_text())
    return found


def _examined(encoder: Encoder, count: int, threads: int, log: Callable[[str], None]) -> Checked:
    """Reads `count` rows whole, and looks at the others."""
    rows = len(encoder.rows)
    chosen = set(np.linspace(0, rows - 1, count).round().astype(int).tolist())

    def visit(index: int) -> tuple[int, str | None]:
        try:
            if index in chosen:
                return index, encoder.parts(0, index, hold=True).error
            encoder.look(index)
        except RowError as error:
            encoder.bad[index] = str(error)
            return index, str(error)
        return index, None

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(16 * threads, 1))
    visited = grain.MapDataset.range(rows).map(visit).to_iter_dataset(options)
    shown = _shown(visited, encoder.rows.name, rows, log)
    bad = {index: error for index, error in shown if error is not None}
    if bad and not encoder.skip_bad_rows:
        encoder.bad.clear()
        raise RowError(_all_text(bad, encoder.rows.name))
    measures = {index: encoder.measures.get(index, ()) for index in chosen if index not in bad}
    every = collections.Counter(m for parts in measures.values() for m in parts)
    return Checked(
        rows=rows,
        examined=len(chosen),
        measures=dict(every),
        kept={m: n for m, n in every.items() if not encoder.road.too_long(m)},
        parts={index: len(parts) for index, parts in measures.items() if len(parts) != 1},
        long=sorted(encoder.long),
        bad=bad,
        notes=encoder.road.notes,
    )


def _shown(
    visited: Iterable[Any], name: str, total: int, log: Callable[[str], None]
) -> Iterable[Any]:
    """`visited` with a bar on a terminal, and with lines now and then elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(visited, total=total, desc=f"checking {name}", unit="row", leave=False)
        return
    log(f"Checking {total:,} rows of {name}.")
    said = time.monotonic()
    for number, found in enumerate(visited, 1):
        if time.monotonic() - said > _SECONDS:
            said = time.monotonic()
            log(f"  {number:,} of {total:,}")
        yield found


def _all_text(bad: dict[int, str], name: str) -> str:
    """The first error, and which other rows have one."""
    first, *others = sorted(bad)
    if not others:
        return bad[first]
    listed = ", ".join(map(str, others[:_NAMED])) + (", ..." if len(others) > _NAMED else "")
    return (
        f"{bad[first]}\nOf {name} {len(others)} more cannot be read: {listed}. Correct or remove "
        "them, or leave them out with skip_bad_rows (data.skip_bad_rows in a recipe)"
    )


def checked_rows(cache: Path) -> str | None:
    """The fingerprints of the rows whose check is kept in a file; None if that has none."""
    try:
        return json.loads(cache.read_text("utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_rows(cache: Path, rows: str | None) -> None:
    """Keeps other fingerprints beside the result of a check."""
    write_text(cache, json.dumps(json.loads(cache.read_text("utf-8")) | {"rows": rows}))


def _read(cache: Path | None, key: str) -> Checked | None:
    """A result that was kept for the same data and settings."""
    if cache is None or not cache.is_file():
        return None
    try:
        kept = json.loads(cache.read_text("utf-8"))
        if kept["key"] != key:
            return None
        fields = kept["found"]
        for name in ("measures", "kept"):
            fields[name] = {
                Measure(tuple(lengths), *rest): count for lengths, *rest, count in fields[name]
            }
        for name in ("parts", "bad"):
            fields[name] = {int(index): value for index, value in fields[name].items()}
        fields["long"] = [tuple(place) for place in fields["long"]]
        return Checked(**fields)
    except (ValueError, KeyError, TypeError):
        return None  # Broken, or of another version: the check is made again.


def _write(cache: Path | None, key: str, found: Checked, rows: str | None) -> None:
    if cache is None or jax.process_index() != 0:
        return
    fields = dict(vars(found))
    for name in ("measures", "kept"):
        fields[name] = [[*measure, count] for measure, count in fields[name].items()]
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_text(cache, json.dumps({"key": key, "found": fields, "rows": rows}))
