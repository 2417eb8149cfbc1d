# SPDX-License-Identifier: Apache-2.0
"""Measured rows, and the buckets of (length, images) that turn them into micro-batches."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from .data_sources import Rows
from .processor import Example

_SHORTEST_BUCKET = 64  # tokens

Shape = tuple[int, int]  # tokens per row, images per row


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the stream, measured."""

    position: int  # in the stream, which runs through all epochs
    index: int  # in the source
    length: int  # tokens
    images: int
    supervised: int  # tokens
    example: Example | None  # None: measured in an earlier epoch, encoded again only when needed


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Up to batch_size rows of all processes together; missing rows become empty ones."""

    shape: Shape
    rows: Sequence[Row]


class Encoder:
    """Reads, encodes and measures rows; remembers the measures, not the tokens and images."""

    def __init__(self, rows: Rows, processor, *, keep_examples: bool):
        self._rows = rows
        self._processor = processor
        # With several processes most examples belong to another one: once a row's measures are
        # known, it is encoded only by the process that trains on it.
        self._keep_examples = keep_examples
        self._measures: dict[int, tuple[int, int, int]] = {}

    def example(self, index: int) -> Example:
        conversation = self._rows[index]
        try:
            return self._processor.encode(conversation)
        except ValueError as error:
            raise ValueError(f"{self._rows.place(index)}: {error}") from error

    def row(self, position: int, index: int) -> Row:
        if not self._keep_examples and index in self._measures:
            return Row(position, index, *self._measures[index], example=None)
        example = self.example(index)
        images = 0 if example.images is None else len(example.images)
        # The first token of a row is predicted from nothing, so it is never a target.
        supervised = int(np.sum(np.asarray(example.loss_mask)[1:] != 0))
        self._measures[index] = (len(example.tokens), images, supervised)
        return Row(position, index, *self._measures[index], example=example)

    def shortest(self) -> int:
        return min(length for length, _, _ in self._measures.values())


class Buckets:
    """Sorts rows into buckets; whole micro-batches come out when a bucket fills or on flush."""

    def __init__(self, lengths: Sequence[int], images: Sequence[int], batch_size: int):
        self._lengths, self._images, self._batch_size = lengths, images, batch_size
        self.waiting: dict[Shape, list[Row]] = {}

    def shape(self, row: Row, place: str) -> Shape:
        if row.images > self._images[-1]:
            raise ValueError(
                f"{place} has {row.images} images, and image_buckets ends at {self._images[-1]}: "
                f"add {row.images} to image_buckets, or remove the row."
            )
        return (
            self._lengths[bisect.bisect_left(self._lengths, row.length)],
            self._images[bisect.bisect_left(self._images, row.images)],
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


def bucket_lengths_up_to(max_length: int, given: Sequence[int] | None) -> tuple[int, ...]:
    """The given lengths in order, or powers of two from 64 and then `max_length`; tokens."""
    if given is None:
        low, high = int(math.log2(_SHORTEST_BUCKET)), math.ceil(math.log2(max(max_length, 1)))
        return (*(2**power for power in range(low, high)), max_length)
    lengths = tuple(sorted(set(given)))
    if not lengths or lengths[-1] < max_length:
        raise ValueError(
            f"bucket_lengths: expected the last to be at least max_length={max_length}, found "
            f"{list(given)}. Add {max_length}, or lower max_length."
        )
    return lengths


def sorted_image_buckets(given: Sequence[int]) -> tuple[int, ...]:
    """The numbers of images per row that a batch may have, in order."""
    if not given or min(given) < 0:
        raise ValueError(
            f"image_buckets: expected numbers of images, such as (0, 1, 2), found {given}."
        )
    return tuple(sorted(set(given)))
