# SPDX-License-Identifier: Apache-2.0
"""Conversations to batches: a grain pipeline with buckets, whole steps and an exact position.

    grain: index, shuffle each epoch, repeat -> encode in threads
        -> drop rows over max_length, sort the rest into buckets of (length, images), form
           micro-batches and from them whole optimizer steps -> keep this process's rows, pad
    grain: prepare ahead in a thread, save and restore the position

Every process reads the same rows in the same order and forms the same global micro-batches, so
that shapes agree between processes; it then pads only its own share of the rows.
"""

import collections
import dataclasses
import functools
import json
import weakref
from collections.abc import Sequence
from pathlib import Path

import grain
import jax
import numpy as np
from absl import logging

from .data_buckets import (
    Buckets,
    Encoder,
    MicroBatch,
    Row,
    bucket_lengths_up_to,
    sorted_image_buckets,
)
from .data_sources import Rows
from .processor import Batch, Example

_ENCODING_THREADS = 4
_STATE_VERSION = 1


# What a saved position depends on. The number of processes and of epochs may change.
_SETTINGS = (
    "batch_size",
    "max_length",
    "gradient_accumulation_steps",
    "seed",
    "shuffle",
    "bucket_lengths",
    "image_buckets",
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """The arguments of `make_dataset`, settled, and what follows from them."""

    rows: Rows
    processor: object
    batch_size: int  # rows of all processes together
    max_length: int  # tokens
    gradient_accumulation_steps: int
    seed: int
    shuffle: bool
    num_epochs: int | None
    bucket_lengths: tuple[int, ...]
    image_buckets: tuple[int, ...]
    process_index: int
    process_count: int
    prefetch: int

    def __post_init__(self):
        least = {"batch_size": 1, "max_length": 1, "gradient_accumulation_steps": 1, "prefetch": 0}
        if self.num_epochs is not None:
            least["num_epochs"] = 1
        for name, value in least.items():
            if vars(self)[name] < value:
                raise ValueError(f"{name}: expected at least {value}, found {vars(self)[name]}.")
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
        return Encoder(self.rows, self.processor, keep_examples=self.process_count == 1)

    @functools.cached_property
    def stream(self) -> grain.MapDataset:
        """Every `Row` of every epoch, by position."""
        order = grain.MapDataset.range(len(self.rows)).seed(self.seed)
        if self.shuffle:
            order = order.shuffle()
        return order.repeat(self.num_epochs).map_with_index(self.encoder.row)

    @functools.cached_property
    def settings(self) -> dict:
        """As JSON gives it back."""
        chosen = {name: vars(self)[name] for name in _SETTINGS}
        return json.loads(json.dumps({"rows": len(self.rows), **chosen}))


class _StepIterator(grain.DatasetIterator):
    """The micro-batches of whole optimizer steps, in order."""

    def __init__(self, plan: _Plan):
        threads = _ENCODING_THREADS if plan.prefetch else 0
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(threads, plan.prefetch * plan.batch_size)
        )
        super().__init__(iter(plan.stream.to_iter_dataset(options)))
        self._plan = plan
        self._seen = self._dropped = 0
        self._buckets = Buckets(plan.bucket_lengths, plan.image_buckets, plan.batch_size)
        self._ready: collections.deque[MicroBatch] = collections.deque()
        self._left = 0  # micro-batches of the current step that are still in `_ready`
        self._supervised = 0  # tokens of the current step

    def __next__(self) -> Batch:
        if self._left == 0:
            while len(self._ready) < self._plan.gradient_accumulation_steps:
                self._read(next(self._parent))
            self._left = self._plan.gradient_accumulation_steps
            self._supervised = sum(
                row.supervised
                for micro_batch in list(self._ready)[: self._left]
                for row in micro_batch.rows
            )
        self._left -= 1
        return self._collate(self._ready.popleft())

    def _read(self, row: Row):
        self._seen += 1
        if row.length > self._plan.max_length:
            self._dropped += 1
            if self._dropped == 1:
                logging.warning(
                    "%s has %d tokens, more than max_length=%d: it is dropped, as all such rows.",
                    *(self._plan.rows.place(row.index), row.length, self._plan.max_length),
                )
        else:
            shape = self._buckets.shape(row, self._plan.rows.place(row.index))
            full = self._buckets.add(shape, row)
            if full is not None:
                self._ready.append(full)
        if self._seen % len(self._plan.rows) == 0:
            self._end_epoch()

    def _end_epoch(self):
        """Lets out what is left, so that an epoch ends with a whole step and holds every row."""
        plan = self._plan
        if self._dropped == self._seen:
            raise ValueError(
                f"{plan.rows.name}: all {len(plan.rows)} rows are longer than max_length="
                f"{plan.max_length}; the shortest found has {plan.encoder.shortest()} tokens. "
                "Raise max_length."
            )
        if self._dropped and self._seen == len(plan.rows):
            logging.warning(
                "%s: %d of %d rows are longer than max_length=%d and are dropped.",
                *(plan.rows.name, self._dropped, self._seen, plan.max_length),
            )
        self._ready.extend(self._buckets.flush())
        while len(self._ready) % plan.gradient_accumulation_steps:
            self._ready.append(MicroBatch(self._ready[-1].shape, ()))

    def _collate(self, micro_batch: MicroBatch) -> Batch:
        plan = self._plan
        size = plan.batch_size // plan.process_count
        own = micro_batch.rows[plan.process_index * size : (plan.process_index + 1) * size]
        examples = [
            plan.encoder.example(row.index) if row.example is None else row.example for row in own
        ]
        examples += [_empty_example() for _ in range(size - len(own))]
        length, images = micro_batch.shape
        batch = plan.processor.collate(examples, length=length, images=images)
        # A step without a single supervised token has loss 0, not 0 / 0.
        denominator = max(self._supervised, 1) / plan.gradient_accumulation_steps
        return batch.replace(loss_denominator=np.full(size, denominator, np.float32))

    def get_state(self) -> dict:
        return {
            "version": _STATE_VERSION,
            "settings": self._plan.settings,
            "seen": self._seen,
            "dropped": self._dropped,
            "left": self._left,
            "supervised": self._supervised,
            "ready": [[*m.shape, [row.position for row in m.rows]] for m in self._ready],
            "waiting": [
                [*shape, [row.position for row in rows]]
                for shape, rows in self._buckets.waiting.items()
            ],
        }

    def set_state(self, state: dict):
        _check_state(state, self._plan)

        def rows(positions):
            return [self._plan.stream[position] for position in positions]

        self._seen, self._dropped = state["seen"], state["dropped"]
        self._left, self._supervised = state["left"], state["supervised"]
        self._ready = collections.deque(
            MicroBatch((length, images), rows(positions))
            for length, images, positions in state["ready"]
        )
        self._buckets.waiting = {
            (length, images): rows(positions) for length, images, positions in state["waiting"]
        }
        grain.experimental.set_next_index(self._parent, self._seen)


class _StepDataset(grain.IterDataset):
    def __init__(self, plan: _Plan):
        super().__init__()
        self._plan = plan

    def __iter__(self) -> _StepIterator:
        return _StepIterator(self._plan)


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

    def __next__(self) -> Batch:
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


class BatchDataset(grain.IterDataset):
    """What `make_dataset` returns: each `iter` of it starts from the beginning."""

    def __init__(self, plan: _Plan):
        super().__init__()
        self._plan = plan

    def __iter__(self) -> BatchIterator:
        return BatchIterator(
            iter(
                grain.experimental.ThreadPrefetchIterDataset(
                    _StepDataset(self._plan), prefetch_buffer_size=self._plan.prefetch
                )
            )
        )

    @property
    def num_rows(self) -> int:
        """Rows of the source, too long ones included."""
        return len(self._plan.rows)


def make_dataset(
    source: str | Path | Sequence,
    processor,
    *,
    batch_size: int,
    max_length: int,
    gradient_accumulation_steps: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    bucket_lengths: Sequence[int] | None = None,
    image_buckets: Sequence[int] = (0, 1, 2, 4, 8),
    process_index: int | None = None,
    process_count: int | None = None,
    prefetch: int = 2,
) -> BatchDataset:
    """Batches of conversations, `gradient_accumulation_steps` of them to an optimizer step.

    Args:
      source: a .jsonl, .json or .parquet file, or a sequence, of rows with `messages`.
      batch_size: rows of one micro-batch, of all processes together.
      max_length: tokens; longer rows are dropped and counted, never cut.
      num_epochs: None means without end. Within an epoch every row that fits comes exactly once.
      bucket_lengths: tokens; default: powers of two from 64, and max_length.
      image_buckets: the allowed numbers of images per row of a batch.
      process_index, process_count: default: JAX's own.
      prefetch: micro-batches prepared ahead by a thread; 0 works without threads.

    For evaluation: `num_epochs=1, shuffle=False`.

    Each batch has `loss_denominator`: the supervised tokens of its whole step divided by the
    number of the step's micro-batches, since the optimizer takes the mean over micro-batches.
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    return BatchDataset(
        _Plan(
            rows=Rows(source),
            processor=processor,
            batch_size=batch_size,
            max_length=max_length,
            gradient_accumulation_steps=gradient_accumulation_steps,
            seed=seed,
            shuffle=shuffle,
            num_epochs=num_epochs,
            bucket_lengths=bucket_lengths_up_to(max_length, bucket_lengths),
            image_buckets=sorted_image_buckets(image_buckets),
            process_index=process_index,
            process_count=process_count,
            prefetch=prefetch,
        )
    )


def _release(held: list[grain.DatasetIterator]):
    while held:
        held.pop().close()


def _empty_example() -> Example:
    nothing = np.zeros(0, np.int32)
    return Example(tokens=nothing, loss_mask=nothing, images=None)


def _check_state(state: dict, plan: _Plan):
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
        raise ValueError(
            f"saved position: it belongs to another dataset ({'; '.join(changed)}). "
            "Continue with the same data and settings, or start anew."
        )
    if state["seen"] > len(plan.stream):
        raise ValueError(
            f"saved position: {state['seen']} rows were read, and num_epochs={plan.num_epochs} "
            f"of {len(plan.rows)} rows end before. Raise num_epochs, or start anew."
        )
