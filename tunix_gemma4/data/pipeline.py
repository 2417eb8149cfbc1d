# SPDX-License-Identifier: Apache-2.0
"""Rows to batches: a grain pipeline with buckets, whole steps and an exact position.

    grain: index, shuffle each epoch, repeat -> read, template and measure in threads
        -> drop what is too long, sort the rest into buckets of (length, images), form
           micro-batches and from them whole optimizer steps -> keep this process's rows, pad
    grain: prepare ahead in a thread, save and restore the position

It is the one road of conversations, prompts and preferences, which differ in their `Road`.
Every process reads the same rows in the same order and forms the same global micro-batches, so
that shapes agree between processes; it then pads only its own share of the rows.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grain
import numpy as np
from absl import logging

from ..config.domains import require
from .processor import Batch
from .road import Checked, Encoder, How, Measure, OfRows, Parts, Road, Row, check_rows
from .sources import Rows, follow_rows

Shape = tuple[int, int]  # tokens per row, images per row


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Up to batch_size rows of all processes together; missing rows become empty ones."""

    shape: Shape
    rows: Sequence[Row]


_ENCODING_THREADS = 4


class Buckets:
    """Sorts rows into buckets; whole micro-batches come out when a bucket fills or on flush."""

    def __init__(self, lengths: Sequence[int], images: Sequence[int], batch_size: int):
        self._lengths, self._images, self._batch_size = lengths, images, batch_size
        self.waiting: dict[Shape, list[Any]] = {}  # Rows; to count them, anything.

    def shape(self, measure: Measure) -> Shape:
        """Of the smallest bucket that holds an example; its images are at most the last bucket's"""
        return (
            self._lengths[bisect.bisect_left(self._lengths, measure.lengths[0])],
            self._images[bisect.bisect_left(self._images, measure.images)],
        )

    def add(self, shape: Shape, row: Row) -> MicroBatch | None:
        rows = self.waiting.setdefault(shape, [])
        rows.append(row)
        return MicroBatch(shape, self.waiting.pop(shape)) if len(rows) == self._batch_size else None

    def flush(self) -> list[MicroBatch]:
        """Empties all buckets, the largest shape first.

        What is free in a micro-batch is filled with rows of smaller buckets before it is left
        to empty rows: this costs nothing and saves micro-batches.
        """
        left = sorted(self.waiting.items(), reverse=True)
        self.waiting = {}
        result = []
        for number, (shape, rows) in enumerate(left):
            for smaller, others in left[number + 1 :]:
                if rows and smaller[1] <= shape[1]:
                    free = self._batch_size - len(rows)
                    rows.extend(others[:free])
                    del others[:free]
            if rows:
                result.append(MicroBatch(shape, rows))
        return result


_STATE_VERSION = 1
_COUNTS = ("seen", "dropped", "bad", "kept", "left", "supervised")  # of a saved position


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What a pipeline is made of, settled, and what follows from it; see `make_dataset`."""

    rows: Rows
    road: Road  # what the rows are read into
    batch_size: int
    gradient_accumulation_steps: int = 1
    seed: int = 0  # of the order
    shuffle: bool = True
    num_epochs: int | None = None
    bucket_lengths: tuple[int, ...] = ()  # of batches, where the road has buckets
    image_buckets: tuple[int, ...] = ()
    process_index: int = 0
    process_count: int = 1
    prefetch: int = 2
    skip_bad_rows: bool = False

    def __post_init__(self):
        named = ("batch_size", "gradient_accumulation_steps", "prefetch", "num_epochs", "seed")
        require("", "", **{name: vars(self)[name] for name in named}, **self.road.limits)
        for name in ("shuffle", "skip_bad_rows"):
            if not isinstance(vars(self)[name], bool):
                raise ValueError(f"{name}: expected True or False, found {vars(self)[name]!r}")
        if self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size: expected a multiple of the number of processes, "
                f"{self.process_count}, found {self.batch_size}. "
                "It counts the rows of all processes together."
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index: expected 0 to {self.process_count - 1}, found "
                f"{self.process_index}."
            )

    @functools.cached_property
    def encoder(self) -> Encoder:
        keep, skip = self.process_count == 1, self.skip_bad_rows
        return Encoder(self.rows, self.road, keep_examples=keep, skip_bad_rows=skip)

    def sharing(self, **changes: Any) -> Plan:
        """A plan with other settings, which knows what this one has read."""
        result = dataclasses.replace(self, **changes)
        vars(result)["encoder"] = self.encoder
        return result

    def position_after(self, examples: int) -> int:
        """Where in the stream so many examples were trained on; reads what is not known."""
        position, left = 0, examples
        while left > 0:
            left -= self.encoder.kept(int(self.order[position]), hold=False)
            position += 1
            if position == len(self.rows) and left == examples:
                raise ValueError(self.too_few_text(0))
        return position

    def refuse_changed(self, changed: list[int], seen: int, what: str) -> None:
        """Raises ValueError if a row that changed is among the first `seen` of the stream.

        `changed` are indices of source rows that are gone or others since; `what` begins the
        message.
        """
        read = {int(self.order[place]) for place in range(min(seen, len(self.rows)))}
        trained_on = [index for index in changed if index in read]
        if trained_on:
            raise ValueError(
                f"{what}: {len(trained_on)} of the rows before it are gone from {self.rows.name} "
                f"or others now, the first was row {trained_on[0]}. Put them back and leave out "
                "what cannot be read with data.skip_bad_rows: true, or start anew."
            )
        if changed:
            logging.warning(
                "%s: rows that are gone or others since the checkpoint was written: %d. None of "
                "them had been trained on.",
                *(self.rows.name, len(changed)),
            )

    def too_few_text(self, kept: int) -> str:
        """Says that the rows, of which so many are short enough, do not make a batch."""
        if self.encoder.bad and not self.encoder.long:
            return f"{self.rows.name}: {self.encoder.bad_text()}. Correct them."
        lengths = (m.lengths[0] for ms in self.encoder.measures.values() for m in ms)
        counts = {"kept": kept, "rows": len(self.rows), "shortest": min(lengths, default=0)}
        found = {"name": self.rows.name, "limits": self.road.limit_text()} | counts
        return self.road.too_few_text.format(batch_size=self.batch_size, **found)

    @functools.cached_property
    def order(self) -> Any:  # A `grain.MapDataset`, whose items may be None elsewhere.
        """Indices of source rows, of every epoch."""
        if not self.road.bucketed:
            return grain.MapDataset.source(_Permutations(self))
        order = grain.MapDataset.range(len(self.rows)).seed(self.seed)
        if self.shuffle:
            order = order.shuffle()
        return order.repeat(self.num_epochs)

    @functools.cached_property
    def stream(self) -> grain.MapDataset:
        """The `Parts` of every epoch, by position."""
        return self.order.map_with_index(self.encoder.parts)

    @functools.cached_property
    def settings(self) -> dict:
        """What a saved position depends on, as JSON gives it back.

        The number of processes and of epochs may change.
        """
        names = ["batch_size", "gradient_accumulation_steps", "seed", "shuffle"]
        names += ["bucket_lengths", "image_buckets"] if self.road.bucketed else []
        chosen = {"rows": len(self.rows), **self.road.limits}
        return json.loads(json.dumps(chosen | {name: vars(self)[name] for name in names}))

    @functools.cached_property
    def fingerprints(self) -> str | None:
        """Those of the rows, for a saved position."""
        return self.rows.fingerprints_text


class _Permutations:
    """The order of every epoch, each drawn by itself: `grain.MapDataset.source` takes it."""

    def __init__(self, plan: Plan):
        self._count, self._epochs = len(plan.rows), plan.num_epochs
        self._seed, self._shuffle = plan.seed, plan.shuffle
        self._epoch = functools.lru_cache(maxsize=2)(self._drawn)

    def __len__(self) -> int:
        return sys.maxsize if self._epochs is None else self._count * self._epochs

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self._count)
        return int(self._epoch(epoch)[place]) if self._shuffle else place

    def _drawn(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._count)


class _StepIterator(grain.DatasetIterator):
    """The micro-batches of whole optimizer steps, in order."""

    def __init__(self, plan: Plan):
        super().__init__(_reader(plan))
        self._given = self._plan = plan
        self._seen = self._dropped = self._bad = self._kept = 0
        self._buckets = Buckets(plan.bucket_lengths, plan.image_buckets, plan.batch_size)
        self._ready: collections.deque[MicroBatch] = collections.deque()
        self._left = 0  # micro-batches of the current step that are still in `_ready`
        self._supervised = 0  # tokens of the current step

    def __next__(self) -> Any:
        if self._left == 0:
            while len(self._ready) < self._plan.gradient_accumulation_steps:
                self._read(next(self._parent))
            self._left = self._plan.gradient_accumulation_steps
            self._supervised = sum(
                row.measure.supervised
                for micro_batch in list(self._ready)[: self._left]
                for row in micro_batch.rows
            )
        self._left -= 1
        return self._collate(self._ready.popleft())

    def _read(self, parts: Parts):
        plan = self._plan
        self._seen += 1
        if parts.error is not None:
            self._bad += 1
            if self._bad == 1:
                logging.warning("%s: it is left out, as all such rows.", parts.error)
        for row in parts.rows:
            if plan.road.too_long(row.measure):
                self._drop(row)
                continue
            self._kept += 1
            shape = self._buckets.shape(row.measure) if plan.road.bucketed else (0, 0)
            full = self._buckets.add(shape, row)
            if full is not None:
                self._ready.append(full)
        if self._seen % len(plan.rows) == 0:
            self._end_epoch()

    def _drop(self, row: Row):
        self._dropped += 1
        if self._dropped == 1:
            logging.warning(
                "%s has %d tokens, more than %s: it is dropped, as all such rows.",
                *(self._plan.rows.place(row.index), row.measure.lengths[0]),
                self._plan.road.limit_text(),
            )

    def _end_epoch(self):
        """Reports, and where there are buckets lets out what is left.

        So an epoch ends with a whole step and holds every row. Elsewhere the rest begins the next.
        """
        plan, rows = self._plan, len(self._plan.rows)
        if self._seen == rows:
            self._report()
        if not plan.road.bucketed:
            return
        self._ready.extend(self._buckets.flush())
        while len(self._ready) % plan.gradient_accumulation_steps:
            self._ready.append(MicroBatch(self._ready[-1].shape, ()))

    def _report(self):
        plan = self._plan
        epochs = plan.batch_size if plan.num_epochs is None else plan.num_epochs
        enough = 1 if plan.road.bucketed else plan.batch_size
        if self._kept * epochs < enough:
            raise ValueError(plan.too_few_text(self._kept))
        if self._dropped:
            counts = {"name": plan.rows.name, "dropped": self._dropped, "rows": self._seen}
            text = plan.road.dropped_text.format(**counts, limits=plan.road.limit_text())
            logging.warning("%s", text)
        if self._bad:
            logging.warning("%s: %s", plan.rows.name, plan.encoder.bad_text())

    def _collate(self, micro_batch: MicroBatch) -> Any:
        plan = self._plan
        size = plan.batch_size // plan.process_count
        own = micro_batch.rows[plan.process_index * size : (plan.process_index + 1) * size]
        examples = [
            plan.encoder.examples(row.index)[row.part] if row.example is None else row.example
            for row in own
        ]
        # A step without a single supervised token has loss 0, not 0 / 0.
        denominator = max(self._supervised, 1) / plan.gradient_accumulation_steps
        batch = plan.road.collate(examples, micro_batch.shape, size, denominator)
        if not isinstance(batch, Batch):
            return batch
        indices = [row.index for row in own] + [-1] * (size - len(own))
        return dataclasses.replace(batch, rows=np.array(indices, np.int32))

    def get_state(self) -> dict:
        return {
            "version": _STATE_VERSION,
            "settings": self._plan.settings,
            "fingerprints": self._plan.fingerprints,
            **{name: vars(self)[f"_{name}"] for name in _COUNTS},
            "ready": [[*m.shape, _places(m.rows)] for m in self._ready],
            "waiting": [[*shape, _places(rows)] for shape, rows in self._buckets.waiting.items()],
        }

    def set_state(self, state: dict):
        plan = _continued(state, self._given)
        _check_state(state, plan)
        if plan is not self._plan:
            self._plan, self._parents = plan, (_reader(plan),)
        # Positions of earlier versions lack some.
        counts = {"bad": 0, "kept": state["seen"] - state["dropped"]} | state
        vars(self).update({f"_{name}": counts[name] for name in _COUNTS})
        self._ready = collections.deque(
            MicroBatch((length, images), self._rows(places))
            for length, images, places in state["ready"]
        )
        self._buckets.waiting = {
            (length, images): self._rows(places) for length, images, places in state["waiting"]
        }
        grain.experimental.set_next_index(self._parent, self._seen)

    def _rows(self, places: list) -> list[Row]:
        pairs = (place if isinstance(place, list) else (place, 0) for place in places)
        return [self._plan.stream[position].rows[part] for position, part in pairs]


def _reader(plan: Plan) -> grain.DatasetIterator:
    threads = _ENCODING_THREADS if plan.prefetch else 0
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, plan.prefetch * plan.batch_size)
    )
    return iter(plan.stream.to_iter_dataset(options))


def _places(rows: Sequence[Row]) -> list:
    """Where in the stream rows stand: a position, or one and the part of its source row."""
    return [[row.position, row.part] if row.part else row.position for row in rows]


class BatchIterator(grain.DatasetIterator):
    """Yields batches; `get_state` is a JSON-serializable dict, `set_state` goes back to it.

    A state may be restored in another process or into another number of processes. What it
    depends on (rows, batch size, buckets, seed, ...) is checked.
    """

    def __init__(self, ahead: grain.DatasetIterator):
        super().__init__()
        # Not one of grain's parents, because it must be gone before the interpreter takes its
        # modules apart: grain's thread stops by itself so late that it prints an error, which
        # whoever trains a fixed number of steps would see each time.
        self._held = [ahead]
        weakref.finalize(self, _release, self._held)

    @property
    def _ahead(self) -> grain.DatasetIterator:
        if not self._held:
            raise ValueError("this iterator was closed; take a new one with iter(dataset).")
        return self._held[0]

    def __next__(self) -> Any:
        return next(self._ahead)

    def get_state(self) -> dict:
        return self._ahead.get_state()

    def set_state(self, state: dict):
        self._ahead.set_state(state)

    def start_prefetch(self):
        """Begins to prepare batches before the first is asked for."""
        self._ahead.start_prefetch()

    def close(self):
        """Stops the threads; the iterator cannot be used afterwards."""
        _release(self._held)

    @property
    def seen(self) -> int:
        """Rows read until the last batch, over all epochs, the dropped ones included."""
        return self.get_state()["seen"]

    @property
    def dropped(self) -> int:
        """Rows read until the last batch, over all epochs, that were longer than max_length."""
        return self.get_state()["dropped"]

    @property
    def bad(self) -> int:
        """Rows read until the last batch, over all epochs, that could not be read."""
        return self.get_state()["bad"]


class BatchDataset(OfRows, grain.IterDataset):
    """What `make_dataset` returns: each `iter` of it starts from the beginning."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        self.checked: Checked | None = None

    def __iter__(self) -> BatchIterator:
        steps = _StepIterator(self.plan)
        ahead = grain.experimental.ThreadPrefetchDatasetIterator(steps, self.plan.prefetch)
        return BatchIterator(ahead)

    @property
    def name(self) -> str:
        """Of the source, for messages."""
        return self.plan.rows.name

    def first(self) -> Any:
        """The first example of the source that is not left out. Raises RowError."""
        encoder, road = self.plan.encoder, self.plan.road
        for index in range(self.num_rows):
            if encoder.kept(index):
                examples = encoder.hold(index)
                return next(e for e in examples if not road.too_long(road.measure(e)))
        self.refuse_all()

    def refuse_all(self) -> NoReturn:
        """Raises ValueError: none of the rows can be used."""
        raise ValueError(self.plan.too_few_text(0))

    def check(
        self,
        how: How = None,
        *,
        log: Callable[[str], None] | None = None,
        cache: Path | None = None,
        key: str = "",
        before: str | None = None,
    ) -> Checked:
        """Reads rows before the first step, so that what is wrong is said now.

        Args:
            how: "all"; a number of rows, spread over the source, besides which of every row is
                read what it is and whether its images exist; False: none; None: all of fewer than
                20,000, and otherwise 2,000.
            log: takes a summary.
            cache: a file that keeps the result for the next start.
            key: of all settings that the result depends on.
            before: fingerprints that the file is to keep in place of those of the rows.

        Raises:
            RowError: naming the rows that cannot be used, unless such rows are skipped.
        """
        plan, epochs = self.plan, self.plan.num_epochs
        threads, log = _ENCODING_THREADS if plan.prefetch else 0, log or (lambda text: None)
        given = {"cache": cache, "key": key, "before": before}
        self.checked = check_rows(plan.encoder, how, threads, log, **given)
        if epochs is not None and not plan.road.bucketed and self.checked.is_whole:
            rest = self.checked.examples * epochs % plan.batch_size
            if rest:
                logging.warning(
                    "%s: the last %d of %d rows (%d epochs) are left out, because they do not fill "
                    "a batch of %d.",
                    *(plan.rows.name, rest, self.checked.examples * epochs, epochs),
                    plan.batch_size,
                )
        return self.checked

    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch, as `check` found: exact if all rows were checked."""
        if self.checked is None or not self.checked.examples:
            return None
        plan, size = self.plan, self.plan.batch_size
        buckets = Buckets(plan.bucket_lengths, plan.image_buckets, size)
        shapes: collections.Counter = collections.Counter()
        for measure, count in self.checked.kept.items():
            shapes[buckets.shape(measure)] += count
        share = self.num_rows / self.checked.examined
        scaled = {shape: round(count * share) for shape, count in shapes.items()}
        # Those that fill up, in whatever order rows come, and what the end of an epoch flushes.
        buckets.waiting = {shape: [None] * (count % size) for shape, count in scaled.items()}
        batches = sum(count // size for count in scaled.values()) + len(buckets.flush())
        return -(-batches // plan.gradient_accumulation_steps)

    def refuse_other(self, position: dict) -> None:
        """Raises ValueError for a saved position that is not one in these rows and settings."""
        iterator = iter(self)
        try:
            iterator.set_state(position)
        finally:
            iterator.close()

    @property
    def rows_are_known(self) -> bool:
        """Whether a saved position tells a row that has changed."""
        return self.plan.fingerprints is not None


def _release(held: list[grain.DatasetIterator]):
    while held:
        held.pop().close()


def _continued(state: dict, plan: Plan) -> Plan:
    """`plan` with its rows numbered as those of a saved position, of which some may be gone."""
    found = follow_rows(plan.rows, state.get("fingerprints"))
    if found is None:
        return plan
    rows, changed = found
    continued = dataclasses.replace(plan, rows=rows)
    continued.refuse_changed(changed, state["seen"], "saved position")
    return continued


def _check_state(state: dict, plan: Plan):
    if state.get("version") != _STATE_VERSION:
        raise ValueError(
            f"saved position: expected version {_STATE_VERSION}, found {state.get('version')}."
        )
    changed = [
        f"{name} was {state['settings'].get(name)}, is {value}"
        for name, value in plan.settings.items()
        if state["settings"].get(name) != value
    ]
    if changed:
        hint = "Continue with the same data and settings, or start anew."
        if "rows" in changed[0].split():
            hint = (
                "Continue with the same rows (data.skip_bad_rows: true leaves out those that "
                "cannot be read) and settings, or start anew."
            )
        raise ValueError(
            f"saved position: it belongs to another dataset ({'; '.join(changed)}). {hint}"
        )
    if state["seen"] > len(plan.order):
        raise ValueError(
            f"saved position: {state['seen']} rows were read, and num_epochs={plan.num_epochs} "
            f"of {len(plan.rows)} rows end before. Raise num_epochs, or start anew."
        )
