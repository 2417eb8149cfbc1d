# SPDX-License-Identifier: Apache-2.0
"""Conversations to batches of supervised fine-tuning; see `pipeline`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..config.domains import require
from .conversation import read_conversation
from .pipeline import BatchDataset, Plan
from .processor import Batch, Example, num_images
from .road import Measure, Road
from .sources import Rows

_SHORTEST_BUCKET = 64  # tokens


class ConversationRoad(Road):
    """Conversations, as supervised fine-tuning learns them."""

    bucketed = True
    dropped_text = "{name}: {dropped} of {rows} rows are longer than {limits} and are dropped."
    too_few_text = (
        "{name}: all {rows} rows are longer than {limits}; the shortest found has {shortest} "
        "tokens. Raise max_length."
    )

    def __init__(self, processor: Any, max_length: int, most_images: int):
        super().__init__()
        self._processor, self._most_images = processor, most_images
        self.limits = {"max_length": max_length}

    def read(self, row: Any) -> list[Example]:
        # A processor of one's own need not know that a row may make several.
        encode_all = getattr(self._processor, "encode_all", None)
        if encode_all is None:
            return [self._processor.encode(row)]
        read = read_conversation(row)
        self.note(read)
        return encode_all(read)

    def images(self, row: Any) -> Sequence[Any]:
        read = read_conversation(row)
        self.note(read)
        return read.images

    def measure(self, example: Example) -> Measure:
        images = num_images(example)
        if images > self._most_images:
            raise ValueError(
                f"it has {images} images, and image_buckets ends at {self._most_images}: add "
                f"{images} to image_buckets, or remove the row."
            )
        # The first token of a row is predicted from nothing, so it is never a target.
        supervised = int(np.sum(np.asarray(example.loss_mask)[1:] != 0))
        said = example.thoughts_left_out, example.unthinking
        return Measure((len(example.tokens),), images, supervised, *said)

    def collate(
        self, examples: list[Example], shape: tuple[int, int], size: int, denominator: float
    ) -> Batch:
        nothing = np.zeros(0, np.int32)
        examples = examples + [Example(nothing, nothing, None)] * (size - len(examples))
        length, images = shape
        batch = self._processor.collate(examples, length=length, images=images)
        return dataclasses.replace(batch, loss_denominator=np.full(size, denominator, np.float32))


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
    skip_bad_rows: bool = False,
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
      skip_bad_rows: leave out rows that cannot be read, and count them, in place of an error.

    For evaluation: `num_epochs=1, shuffle=False`.

    Each batch has `loss_denominator`: the supervised tokens of its whole step divided by the
    number of the step's micro-batches, since the optimizer takes the mean over micro-batches.
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    require(max_length=max_length, bucket_lengths=bucket_lengths, image_buckets=image_buckets)
    image_buckets = sorted_image_buckets(image_buckets)
    return BatchDataset(
        Plan(
            rows=Rows(source),
            road=ConversationRoad(processor, max_length, image_buckets[-1]),
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            seed=seed,
            shuffle=shuffle,
            num_epochs=num_epochs,
            bucket_lengths=bucket_lengths_up_to(max_length, bucket_lengths),
            image_buckets=image_buckets,
            process_index=process_index,
            process_count=process_count,
            prefetch=prefetch,
            skip_bad_rows=skip_bad_rows,
        )
    )


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
