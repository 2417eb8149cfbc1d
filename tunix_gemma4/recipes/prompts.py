# SPDX-License-Identifier: Apache-2.0
"""Prompts for reinforcement learning: rows of a file to batches of columns, in a seeded order."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import processor_conversation
from ..data_sources import Rows
from ..processor import Processor
from ..processor_conversation import Conversation
from .rl_config import PromptConfig

# Names that the host or a reward function's signature has for something else.
_RESERVED = ("prompts", "completions", "rewards", "advantages", "mode", "trajectory_ids")


class PromptRows:
    """The prompts of a file that are short enough, by random access.

    Attributes:
        dropped: prompts that are too long.
        columns: what a batch has besides `prompts`.
    """

    def __init__(self, path: str | Path, processor: Processor, config: PromptConfig):
        self._rows, self._config = Rows(path), config
        self.kept, shortest = [], None
        has_images, columns = False, {}
        for index in range(len(self._rows)):
            try:
                prompt, others = read_prompt(self._rows[index], self._config)
                length = _length(processor, prompt, config.max_prompt_length)
            except ValueError as error:
                raise ValueError(f"{self._rows.place(index)}: {error}") from error
            shortest = length if shortest is None else min(shortest, length)
            if length <= config.max_prompt_length:
                self.kept.append(index)
                has_images = has_images or bool(prompt.images)
                columns |= dict.fromkeys(others)
        if not self.kept:
            raise ValueError(
                f"{path}: each of its {len(self._rows)} prompts is longer than "
                f"data.max_prompt_length={config.max_prompt_length}; the shortest has {shortest} "
                "tokens"
            )
        self.dropped = len(self._rows) - len(self.kept)
        self.columns = (*(["images"] if has_images else []), *columns)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row: `prompts` and every column, None where the row has no such value."""
        prompt, others = read_prompt(self._rows[self.kept[index]], self._config)
        others["images"] = prompt.images
        return {"prompts": prompt.given} | {name: others.get(name) for name in self.columns}


def read_prompt(
    row: Any, config: PromptConfig, names: Collection[str] = ()
) -> tuple[Conversation, dict[str, Any]]:
    """The conversation that a row asks to go on with, and the columns beside it.

    Args:
        row: of any form of docs/how-to/data.md.
        config: of the data.
        names: parameters of reward functions, which get a key of that name whatever it means.

    Raises:
        ValueError: saying what is wrong with the row.
    """
    prompt = processor_conversation.read_prompt(
        row, column=config.prompt_column, system=config.system_prompt, names=names
    )
    taken = [name for name in prompt.columns if name in _RESERVED]
    if taken:
        raise ValueError(f"the column {taken[0]!r} has a name that rewards need; rename it")
    return prompt, dict(prompt.columns)


def _length(processor: Processor, prompt: Conversation, enough: int) -> int:
    """Tokens of a prompt, or, where that suffices, more than it has and at most `enough`.

    Images are opened only where their size decides.
    """
    words = [
        message | {"content": [part for part in message["content"] if part["type"] == "text"]}
        if isinstance(message["content"], list)
        else message
        for message in prompt.messages
    ]
    text = prompt.text if prompt.text is None else prompt.text.replace("<|image|>", "")
    bare = dataclasses.replace(prompt, messages=words, images=[], text=text)
    length = len(processor.encode(bare, add_generation_prompt=True).tokens)
    most = length + len(prompt.images) * (processor.max_soft_tokens + 2)
    if most <= enough or not prompt.images or length > enough:
        return most
    return len(processor.encode(prompt, add_generation_prompt=True).tokens)


class Batches:
    """Whole batches of prompts, by default without end, as the host's learners take them.

    Every row comes once per epoch; the order depends on `seed` alone. A learner that resumes skips
    what it has trained on by taking it again; those batches are empty prompts here, which cost
    nothing.

    Args:
        rows: the prompts.
        batch_size: rows of a batch.
        seed: of the order; None: that of the file.
        skipped: rows that the learner will take and throw away.
        start: row of the endless stream that comes after these.
        limit: end after so many rows; None: never.
    """

    def __init__(
        self,
        rows: PromptRows,
        batch_size: int,
        *,
        seed: int | None,
        skipped: int = 0,
        start: int = 0,
        limit: int | None = None,
    ):
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._skipped, self._start, self._limit = skipped, start, limit

    def __iter__(self) -> Iterator[dict[str, list[Any]]]:
        empty = {"prompts": ""} | dict.fromkeys(self._rows.columns)
        batch = []
        for row in self._stream():
            batch.append(empty if row is None else self._rows[row])
            if len(batch) == self._batch_size:
                yield {name: [row[name] for row in batch] for name in batch[0]}
                batch = []

    def _stream(self) -> Iterator[int | None]:
        """Indices of rows; None for those that are thrown away."""
        for _ in range(self._skipped):
            yield None
        position, count = self._start, len(self._rows)
        epoch, order = None, np.arange(count)
        while self._limit is None or position < self._limit:
            if self._seed is not None and epoch != position // count:
                epoch = position // count
                order = np.random.default_rng([self._seed, epoch]).permutation(count)
            yield int(order[position % count])
            position += 1
