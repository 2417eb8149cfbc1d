# SPDX-License-Identifier: Apache-2.0
"""Batches of prompts in any form, made safe for the host's transport.

Between data set and learner the host repeats, flattens, slices and concatenates columns, and some
forms do not survive it: lists of arrays are repeated along the wrong axis, arrays are flattened to
scalars. So every cell travels as one opaque object in a one-dimensional array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tunix.rl.agentic.parser.chat_template_parser.parser import BaseChatTemplateParser, TokenConfig

from ...data.keys import REFUSED, SYSTEMS, TEMPLATE, TOOLS
from ...data.processor import Example, Processor
from ...data.prompts import Prompt

PROMPTS, IMAGE_COLUMNS = "prompts", ("images", "image")
_HEADERS = {"system": "system\n", "user": "user\n", "tool": "user\n"}


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One value of any other column."""

    given: Any


def unwrap(value: Any) -> Any:
    """What the user gave: of a column, each cell's."""
    if isinstance(value, Prompt | Cell):
        return value.given
    if isinstance(value, list | np.ndarray):
        return [unwrap(cell) for cell in value]
    return value


def column(cells: Sequence[Any]) -> np.ndarray:
    """A one-dimensional array of objects, whatever they are."""
    result = np.empty(len(cells), object)
    result[:] = cells
    return result


class PromptReader:
    """Turns batches of a data set into columns of `Prompt` and `Cell`.

    Args:
        tokenize: from a string that already follows the chat template to ids.
        processor: for conversations and images; made when first needed.
        max_prompt_length: longer prompts are refused, because a cut one has lost its end or part
            of an image.
        names: columns that reward functions ask for, which are not refused whatever they mean.
    """

    def __init__(
        self,
        tokenize: Callable[[str], Sequence[int]],
        processor: Callable[[], Processor],
        max_prompt_length: int,
        names: Collection[str] = (),
    ):
        self._names = frozenset(names)
        self._tokenize = tokenize
        self._processor = processor
        self._max_length = max_prompt_length
        self._count = 0

    def read(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One batch: `prompts`, perhaps `images` or `image`, and any other columns.

        Raises:
            ValueError: naming the row whose prompt or images cannot be read or are too long.
        """
        columns = {name: _cells(name, cells) for name, cells in batch.items()}
        if PROMPTS not in columns:
            raise ValueError(f"a batch needs the column 'prompts', found {sorted(columns)}")
        lengths = {name: len(cells) for name, cells in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of a batch differ in their number of rows: {lengths}")
        present = [columns[name] for name in IMAGE_COLUMNS if name in columns]
        images = [list(_images(row)) for row in zip(*present, strict=True)]
        images = images or [[]] * len(columns[PROMPTS])
        # Columns that say something of the prompt, or that no prompt may have.
        meant = {*SYSTEMS, *TOOLS, *TEMPLATE, *(REFUSED.keys() - self._names)}
        prompts = []
        for index, (given, beside) in enumerate(zip(columns[PROMPTS], images, strict=True)):
            keys = {name: cells[index] for name, cells in columns.items() if name in meant}
            try:
                prompts.append(self._prompt(given, beside, keys))
            except MemoryError:
                raise
            except Exception as error:
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise ValueError(f"prompt {self._count}: {kind}{error}") from error
            self._count += 1
        read = {name: column([Cell(cell) for cell in cells]) for name, cells in columns.items()}
        return read | {PROMPTS: column(prompts)}

    def _prompt(self, given: Any, images: list[Any], keys: Mapping[str, Any]) -> Prompt:
        if isinstance(given, Prompt):
            prompt = given  # Read by a data set of this package, its images too.
        elif isinstance(given, str):
            prompt = self._templated(str(given), images)
        else:
            row = dict(given) if isinstance(given, Mapping) else {"messages": given}
            row = {**keys, **row} | ({"images": images} if images else {})
            processor = self._processor()
            example = processor.encode(row, add_generation_prompt=True)
            text = processor.decode(example.tokens.tolist(), skip_special_tokens=False)
            prompt = Prompt(given, text, example)
        length = len(prompt.example.tokens)
        if length > self._max_length:
            raise ValueError(
                f"it has {length} tokens and max_prompt_length is {self._max_length}; raise it, "
                "leave the prompt out, or lower max_soft_tokens if images take the space"
            )
        return prompt

    def _templated(self, text: str, images: list[Any]) -> Prompt:
        """A string in the template's form, in which `<|image|>` stands for each image."""
        if not images:
            ids = np.asarray(self._tokenize(text), np.int32)
            return Prompt(text, text, Example(ids, np.zeros_like(ids), None))
        return Prompt(text, text, self._processor().encode_templated(text, images))


def _cells(name: str, cells: Any) -> list[Any]:
    """The rows of a column. An array's first axis is that of its rows."""
    if isinstance(cells, str | bytes | Mapping) or not hasattr(cells, "__len__"):
        raise ValueError(
            f"column {name!r}: expected a list or array with one value per row, found "
            f"{type(cells).__name__}"
        )
    if isinstance(cells, np.ndarray) and cells.dtype != object and cells.ndim == 1:
        return cells.tolist()
    return list(cells)


def _images(cells: Sequence[Any]) -> Iterator[Any]:
    """The images of one row, of its cells in the image columns."""
    for cell in cells:
        if isinstance(cell, list | tuple) or (
            isinstance(cell, np.ndarray) and (cell.dtype == object or cell.ndim == 4)
        ):
            yield from (image for image in cell if image is not None)
        elif cell is not None:
            yield cell


class ChatParser(BaseChatTemplateParser):
    """`chat_parser` of the host's agentic learners, which render message by message.

    Args:
        processor: its chat template gives the tokens around a turn and the model's header. Text
            alone: the host's agents have no images.
    """

    def __init__(self, processor: Processor):
        self._chat = processor.chat
        super().__init__(processor.tokenizer)

    def _init_tokens(self) -> TokenConfig:
        chat = self._chat
        begin = {role: chat.turn_start + header for role, header in _HEADERS.items()}
        return TokenConfig(
            bos_token=self.tokenizer.bos_token,
            eot_token=chat.turn_end,
            system_token=begin["system"],
            user_token=begin["user"],
            assistant_token=chat.turn_start + chat.header,
            message_separator="\n",
        )

    def _init_generation_prompt(self) -> str:
        prefix = "".join(piece.text for piece in self._chat.prefix)
        return self.tokens.assistant_token + prefix

    def parse(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = False,
        is_first_msg: bool = False,
    ) -> str:
        """The text of `messages`, which have `role` and `content`, and of what precedes an answer.

        If `is_first_msg` it begins a conversation; otherwise it goes on behind a turn's last token.
        """
        turns = [self._parse_message(dict(message)) for message in messages]
        if add_generation_prompt:
            turns.append(self.generation_prompt)
        separator = self.tokens.message_separator
        begin = self.tokens.bos_token if is_first_msg else separator
        return begin + separator.join(turns) if turns else ""
