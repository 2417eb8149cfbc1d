# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of a source before the first step: what is wrong is said then, and what is not.

A result is kept in a file beside the hash of the data, so that a run that goes on need not wait.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from tqdm import tqdm

from ..checkpoint.disk import write_text
from .road import Encoder, Measure, RowError

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
    """What was found.

    Attributes:
        rows: of the source.
        examined: how many of them were read whole.
        measures: how many examples of each measure there are.
        kept: the same, without those that are too long.
        parts: of source rows that do not give one example, how many they give.
        long: (index, part) of the examples that are too long.
        bad: what is wrong with rows that are left out.
        notes: see `road.Road`.
    """

    rows: int
    examined: int
    measures: dict[Measure, int] = dataclasses.field(default_factory=dict)
    kept: dict[Measure, int] = dataclasses.field(default_factory=dict)
    parts: dict[int, int] = dataclasses.field(default_factory=dict)
    long: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    bad: dict[int, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, dict[str, None]] = dataclasses.field(default_factory=dict)

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


class Checker:
    """Checks the rows of an encoder, which then knows their measures.

    Args:
        encoder: of a pipeline.
        threads: that read; 0: none but this.
        log: takes lines of text, if any.
    """

    def __init__(self, encoder: Encoder, threads: int, log: Callable[[str], None] | None):
        self._encoder, self._threads = encoder, threads
        self._log = log or (lambda text: None)

    def run(
        self, how: How, cache: Path | None = None, key: str = "", before: str | None = None
    ) -> Checked:
        """See `pipeline.BatchDataset.check`."""
        rows = self._encoder.rows
        count = rows_to_check(how, len(rows))
        key = json.dumps([_VERSION, rows.sha256(), len(rows), count, key]) if cache else ""
        found = _read(cache, key)
        if found is None:
            found = self._check(count) if count else Checked(len(rows), 0)
            _write(cache, key, found, before or fingerprints_text(rows.fingerprints))
        else:
            self._encoder.recall(found)
        if count:
            road = self._encoder.road
            self._log(found.summary(rows.name, road.limit_text()))
            if road.notes_text():
                self._log(road.notes_text())
        return found

    def _check(self, count: int) -> Checked:
        encoder, rows = self._encoder, len(self._encoder.rows)
        chosen = set(np.linspace(0, rows - 1, count).round().astype(int).tolist())

        def visit(index: int) -> tuple[int, str | None]:
            try:
                if index in chosen:
                    return index, encoder.parts(0, index, hold=True).error
                error = encoder.look(index)
            except RowError as raised:
                error = str(raised)
            if error is not None:
                encoder.bad[index] = error
            return index, error

        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=max(16 * self._threads, 1)
        )
        visited = grain.MapDataset.range(rows).map(visit).to_iter_dataset(options)
        bad = {index: error for index, error in self._shown(visited, rows) if error is not None}
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

    def _shown(self, visited: Iterable[Any], total: int) -> Iterable[Any]:
        """`visited` with a bar on a terminal, and with lines now and then elsewhere."""
        name, on_terminal = self._encoder.rows.name, sys.stderr.isatty()
        if on_terminal:
            yield from tqdm(visited, total=total, desc=f"checking {name}", unit="row", leave=False)
            return
        self._log(f"Checking {total:,} rows of {name}.")
        said = time.monotonic()
        for number, found in enumerate(visited, 1):
            if time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                self._log(f"  {number:,} of {total:,}")
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


def fingerprints_text(rows: np.ndarray | None) -> str | None:
    """`Rows.fingerprints` as text; `pipeline.follow_rows` reads it."""
    return None if rows is None else base64.b64encode(rows.tobytes()).decode()


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
