# SPDX-License-Identifier: Apache-2.0
"""Preferences, a better and a worse answer to a prompt, as Tunix's DPO and ORPO trainer takes them.

row -> Preference (tokens of prompt and answers, patches of the prompt's images) -> batch
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from ..data_sources import Rows
from ..processor import Example, Processor, image_slots
from ..processor_conversation import read_preference_pair

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True, eq=False)
class Preference:
    """One row, not padded. An answer ends with the token that ends its turn."""

    prompt: Int[np.ndarray, " P"]
    chosen: Int[np.ndarray, " R"]
    rejected: Int[np.ndarray, " R"]
    images: Float[np.ndarray, "I M C"] | None  # None: no images

    def fits(self, max_prompt_length: int, max_response_length: int) -> bool:
        """Whether nothing would have to be cut: that could take away part of an image."""
        answer = max(len(self.chosen), len(self.rejected))
        return len(self.prompt) <= max_prompt_length and answer <= max_response_length


def read_preference(row: Mapping[str, Any], processor: Processor) -> Preference:
    """One row of preferences.

    Args:
        row: a prompt in any form of docs/how-to/data.md, with `chosen` and `rejected`, each a
            string, an assistant message, a list of one, or the prompt's messages and one; or
            `chosen` and `rejected` alone, two conversations that differ in their last message; or
            another tool's form of that page. Images stand as in any conversation.
        processor: of the checkpoint.

    Raises:
        ValueError: saying what is missing, or what cannot be compared.
    """
    sides = []
    for name, side in read_preference_pair(row).items():
        try:
            example = processor.encode(side)
            sides.append((example.images, *_split(example)))
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    (images, tokens, chosen), (other_images, other_tokens, rejected) = sides
    if not np.array_equal(tokens, other_tokens) or not _same(images, other_images):
        raise ValueError(
            "'chosen' and 'rejected' answer two different prompts; expected two conversations "
            "that differ in their last message alone"
        )
    if np.array_equal(chosen, rejected):
        raise ValueError("'chosen' and 'rejected' are the same answer; there is nothing to prefer")
    return Preference(tokens, chosen, rejected, images)


def _same(images: np.ndarray | None, others: np.ndarray | None) -> bool:
    if images is None or others is None:
        return images is others
    return np.array_equal(images, others)


def _split(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Tokens up to the answer, and the answer's."""
    learnt = np.flatnonzero(example.loss_mask)
    first, end = learnt[0], learnt[-1] + 1
    if len(learnt) != end - first:
        raise ValueError("the answer has parts that are not learnt; expected one message of text")
    return example.tokens[:first], example.tokens[first:end]


def collate(
    preferences: Sequence[Preference],
    processor: Processor,
    *,
    max_prompt_length: int,
    max_response_length: int,
    images: int | None = None,
) -> dict[str, np.ndarray]:
    """A batch, in the fields of `tunix.sft.dpo.dpo_trainer.TrainingInput`.

    Prompts are padded on the left and answers on the right.

    Args:
        preferences: at least one; none longer than the lengths.
        processor: that read them.
        max_prompt_length, max_response_length: tokens of every row.
        images: images per row; 0, 1, 2, 4, 8, ... as needed if None.
    """
    prompts = [Example(p.prompt, np.zeros_like(p.prompt), p.images) for p in preferences]
    batch = processor.collate(prompts, length=max_prompt_length, images=images, side="left")
    result = {"prompt_ids": batch.tokens, "prompt_mask": batch.padding_mask}
    if batch.images is not None:
        result["images"] = batch.images
    for name in SIDES:
        answers = [getattr(preference, name) for preference in preferences]
        examples = [Example(answer, np.ones_like(answer), None) for answer in answers]
        batch = processor.collate(examples, length=max_response_length, images=0)
        result |= {f"{name}_ids": batch.tokens, f"{name}_mask": batch.padding_mask}
    return result


class PreferenceBatches:
    """Whole batches from a file or a sequence of rows, each row once per epoch in a seeded order.

    Without end if `epochs` is None.

    Attributes:
        dropped: rows that were too long, counted in the first epoch.
    """

    def __init__(
        self,
        source: str | Path | Sequence,
        processor: Processor,
        *,
        batch_size: int,
        max_prompt_length: int,
        max_response_length: int,
        epochs: int | None = 1,
        seed: int = 0,
    ):
        self._rows, self._processor = Rows(source), processor
        self._batch_size, self._epochs, self._seed = batch_size, epochs, seed
        self._lengths = {
            "max_prompt_length": max_prompt_length,
            "max_response_length": max_response_length,
        }
        self._slots, self.dropped = 0, 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        waiting: list[Preference] = []
        self.dropped = 0
        for epoch in itertools.count() if self._epochs is None else range(self._epochs):
            kept = 0
            for preference in self._epoch(epoch):
                kept += 1
                waiting.append(preference)
                if len(waiting) == self._batch_size:
                    yield self._batch(waiting)
                    waiting = []
            if epoch == 0:
                self._report(kept)

    def _epoch(self, epoch: int) -> Iterator[Preference]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        for index in order.tolist():
            try:
                preference = read_preference(self._rows[index], self._processor)
            except ValueError as error:
                raise ValueError(f"{self._rows.place(index)}: {error}") from error
            if preference.fits(**self._lengths):
                yield preference
            elif epoch == 0:
                self.dropped += 1

    def _batch(self, preferences: list[Preference]) -> dict[str, np.ndarray]:
        most = max(0 if p.images is None else len(p.images) for p in preferences)
        # Never fewer than before, so that few programs are compiled.
        self._slots = max(self._slots, image_slots(most))
        return collate(preferences, self._processor, images=self._slots, **self._lengths)

    def _report(self, kept: int) -> None:
        lengths = ", ".join(f"{name}={value}" for name, value in self._lengths.items())
        rows = kept * (self._batch_size if self._epochs is None else self._epochs)
        if rows < self._batch_size:
            raise ValueError(
                f"{self._rows.name}: {kept} of its {len(self._rows)} rows are short enough "
                f"({lengths}), which is less than one batch of {self._batch_size}"
            )
        if self.dropped:
            logging.warning(
                "%s: %d of %d rows are left out, because they are longer than %s",
                *(self._rows.name, self.dropped, len(self._rows), lengths),
            )
