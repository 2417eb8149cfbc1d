# SPDX-License-Identifier: Apache-2.0
"""Prompts for reinforcement learning: rows of a file to batches of columns, in a seeded order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data_sources import Rows
from ..processor import Processor
from ..processor_conversation import Conversation, read_conversation
from .rl_config import PromptConfig

_ASSISTANT = ("assistant", "model", "gpt")
# What is read here and does not go to the reward functions as it stands.
_CONSUMED = ("messages", "conversations", "prompt", "images", "image")
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
        return {"prompts": prompt.messages} | {name: others.get(name) for name in self.columns}


def read_prompt(row: Any, config: PromptConfig) -> tuple[Conversation, dict[str, Any]]:
    """The conversation that a row asks to go on with, and the columns beside it.

    Raises:
        ValueError: saying what is wrong with the row.
    """
    if not isinstance(row, Mapping):
        row = {"messages": row}
    columns = {name: value for name, value in row.items() if name not in _CONSUMED}
    taken = [name for name in columns if name in _RESERVED]
    if taken:
        raise ValueError(f"the column {taken[0]!r} has a name that rewards need; rename it")
    prompt, answer = _split(row, columns, config)
    if answer is not None:
        columns.setdefault("answer", answer)
    conversation = read_conversation(prompt, prompt_only=True)
    system = config.system_prompt
    if system is not None and conversation.messages[0]["role"] != "system":
        conversation.messages.insert(0, {"role": "system", "content": system})
    return conversation, columns


def _split(
    row: Mapping[str, Any], columns: dict[str, Any], config: PromptConfig
) -> tuple[dict[str, Any], str | None]:
    """The row without its last answer, and that answer's text."""
    beside = {name: row[name] for name in ("images", "image") if row.get(name) is not None}
    name = config.prompt_column
    if name is not None:
        if row.get(name) is None:
            raise ValueError(f"it has no column {name!r}, which data.prompt_column names")
        columns.pop(name, None)
        return beside | {"prompt": row[name]}, None
    for name in ("messages", "conversations"):
        messages = row.get(name)
        if messages is not None and len(messages):
            last = messages[-1]
            if last.get("role", last.get("from")) not in _ASSISTANT:
                return beside | {name: messages}, None
            return beside | {name: messages[:-1]}, _text(last)
    if row.get("prompt") is None:
        raise ValueError(
            "expected 'prompt' or 'messages', or data.prompt_column to name the column of the "
            f"prompts; found {', '.join(row)}"
        )
    return beside | {"prompt": row["prompt"]}, None


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content", message.get("value"))
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _length(processor: Processor, prompt: Conversation, enough: int) -> int:
    """Tokens of a prompt, or, where that suffices, more than it has and at most `enough`.

    Images are opened only where their size decides.
    """
    words = [
        message
        if isinstance(message["content"], str)
        else message | {"content": [part for part in message["content"] if part["type"] == "text"]}
        for message in prompt.messages
    ]
    length = len(processor.encode(words, add_generation_prompt=True).tokens)
    most = length + len(prompt.images) * (processor.max_soft_tokens + 2)
    if most <= enough or not prompt.images or length > enough:
        return most
    whole = {"messages": prompt.messages, "images": prompt.images}
    return len(processor.encode(whole, add_generation_prompt=True).tokens)


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
