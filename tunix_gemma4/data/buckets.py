# SPDX-License-Identifier: Apache-2.0
"""The buckets of (length, images) that turn measured rows into micro-batches."""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence

from .road import Measure, Row

_SHORTEST_BUCKET = 64  # tokens

Shape = tuple[int, int]  # tokens per row, images per row


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Up to batch_size rows of all processes together; missing rows become empty ones."""

    shape: Shape
    rows: Sequence[Row]


class Buckets:
    """Sorts rows into buckets; whole micro-batches come out when a bucket fills or on flush."""

    def __init__(self, lengths: Sequence[int], images: Sequence[int], batch_size: int):
        self._lengths, self._images, self._batch_size = lengths, images, batch_size
        self.waiting: dict[Shape, list[Row]] = {}

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


def count_batches(shapes: Mapping[Shape, int], batch_size: int) -> int:
    """Micro-batches of an epoch that has so many examples of each shape, in whatever order."""
    buckets = Buckets((), (), batch_size)
    whole = sum(count // batch_size for count in shapes.values())
    buckets.waiting = {shape: [None] * (count % batch_size) for shape, count in shapes.items()}
    return whole + len(buckets.flush())


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
    if not given:
        raise ValueError(
            f"image_buckets: expected numbers of images, such as (0, 1, 2), found {given}."
        )
    return tuple(sorted(set(given)))
