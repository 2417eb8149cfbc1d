# SPDX-License-Identifier: Apache-2.0
"""Preferences, a better and a worse answer to a prompt, as Tunix's DPO and ORPO trainer takes them.

row -> Preference (tokens of prompt and answers, patches of the prompt's images) -> batch
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ..config.source import naming
from .conversation import Conversation, read_preference_pair
from .pipeline import BatchDataset, BatchIterator, Plan
from .processor import Example, Processor, image_slots, num_images
from .road import How, Measure, OfRows, Road, rows_to_check
from .sources import Rows

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True, eq=False)
class Preference:
    """One row, not padded. An answer ends with the token that ends its turn."""

    prompt: Int[np.ndarray, " P"]
    chosen: Int[np.ndarray, " R"]
    rejected: Int[np.ndarray, " R"]
    images: Float[np.ndarray, "I M C"] | None  # None: no images


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
    return _encoded(read_preference_pair(row), processor)


def _encoded(pair: Mapping[str, Conversation], processor: Processor) -> Preference:
    sides = []
    for name, side in pair.items():
        with naming(repr(name)):
            example = processor.encode(side)
            sides.append((example.images, *_split(example)))
    (images, tokens, chosen), (other_images, other_tokens, rejected) = sides
    most = min(len(tokens), len(other_tokens))
    if len(tokens) != len(other_tokens):
        # Where a template opens answers with an empty thought, one that has a thought of its own
        # lacks it. Beside such a one the empty thought is the other's answer, not the prompt's.
        opening = "".join(piece.text for piece in processor.chat.prefix)
        empty = processor.tokenizer.encode(opening, add_special_tokens=False)
        if max(len(tokens), len(other_tokens)) == most + len(empty):
            chosen, rejected = (
                np.concatenate([prompt[most:], answer])
                if prompt[most:].tolist() == empty
                else answer
                for prompt, answer in ((tokens, chosen), (other_tokens, rejected))
            )
            tokens, other_tokens = tokens[:most], other_tokens[:most]
    if not np.array_equal(images, other_images):  # Both may be None.
        raise ValueError(
            "'chosen' and 'rejected' differ in their images; both have those of the prompt alone"
        )
    if not np.array_equal(tokens, other_tokens):
        raise ValueError(
            "'chosen' and 'rejected' answer two different prompts; expected two conversations "
            "that differ in their last message alone"
        )
    if np.array_equal(chosen, rejected):
        raise ValueError("'chosen' and 'rejected' are the same answer; there is nothing to prefer")
    return Preference(tokens, chosen, rejected, images)


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


class PreferenceRoad(Road):
    """Preferences, as the host's trainer takes them."""

    def __init__(self, processor: Processor, max_prompt_length: int, max_response_length: int):
        super().__init__()
        self._processor = processor
        self._slots = 0  # images per row of a batch: never fewer than before
        self.limits = {
            "max_prompt_length": max_prompt_length,
            "max_response_length": max_response_length,
        }

    def read(self, row: Any) -> list[Preference]:
        pair = read_preference_pair(row)
        self.note(pair["chosen"])
        return [_encoded(pair, self._processor)]

    def images(self, row: Any) -> Sequence[Any]:
        pair = read_preference_pair(row)
        self.note(pair["chosen"])
        return [image for side in pair.values() for image in side.images]

    def measure(self, example: Preference) -> Measure:
        answers = [len(example.chosen), len(example.rejected)]
        lengths = len(example.prompt), max(answers)
        return Measure(lengths, num_images(example), sum(answers))

    def collate(
        self, examples: list[Preference], shape: tuple[int, int], size: int, denominator: float
    ) -> dict[str, np.ndarray]:
        self._slots = max([self._slots, *(image_slots(num_images(e)) for e in examples)])
        return collate(examples, self._processor, images=self._slots, **self.limits)


class PreferenceBatches(OfRows):
    """Whole batches from a file or a sequence of rows, each row once per epoch in a seeded order.

    An iterator of it has a position that can be saved and restored, as one of `make_dataset` has.

    Args:
        source: a .jsonl, .json or .parquet file, or a sequence of rows as `read_preference` takes.
        processor: of the checkpoint.
        batch_size: rows of a batch.
        max_prompt_length, max_response_length: tokens; longer rows are left out and counted.
        epochs: None: without end.
        seed: of the order.
        check, log: how the rows are read when batches are first asked for; see
            `BatchDataset.check`.
        skip_bad_rows: leave out rows that cannot be read, and count them, in place of an error.
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
        check: How = None,
        skip_bad_rows: bool = False,
        log: Callable[[str], None] | None = None,
    ):
        self.plan = Plan(
            rows=Rows(source),
            road=PreferenceRoad(processor, max_prompt_length, max_response_length),
            batch_size=batch_size,
            seed=seed,
            num_epochs=epochs,
            skip_bad_rows=skip_bad_rows,
        )
        rows_to_check(check, self.num_rows, "check")
        self._check, self._log, self._data = check, log, BatchDataset(self.plan)

    def __iter__(self) -> BatchIterator:
        if self._data.checked is None:
            self._data.check(self._check, log=self._log)
        return iter(self._data)
