# SPDX-License-Identifier: Apache-2.0
"""Conversations with images to batches, with a checkpoint directory's own tokenizer and template.

conversation -> Example (tokens, which of them are answers, patches of its images) -> Batch
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Float, Int

from ..config import ModelConfig, refuse_ids_beyond
from ..config.source import naming
from .chat_template import (
    ChatFormat,
    Segment,
    load_tokenizer,
    special_tokens,
    stop_ids_of,
    text_tokenizer,
)
from .conversation import Conversation, each_turn, keep_thoughts, read_conversation
from .images import ImagePacker, soft_tokens_of
from .rows import without_bos

THOUGHTS = ("last", "none", "each_turn")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row, not padded."""

    tokens: Int[np.ndarray, " T"]
    loss_mask: Int[np.ndarray, " T"]  # 1: this token is learnt
    images: Float[np.ndarray, "I M C"] | None  # None: no images
    thoughts_left_out: int = 0  # of earlier turns
    unthinking: bool = False  # the template tells the model to think, and no thought is learnt


@flax.struct.dataclass
class Batch:
    """Padded rows.

    Attributes:
        tokens: int32; image placeholders stand where soft tokens go.
        loss_mask: int32; 1 where a token is learnt, that is, where it is a target.
        padding_mask: int32; 1 where there is a token.
        images: float32; patches, their (x, y) in the last two places, (-1, -1) for padding.
        loss_denominator: float32; supervised tokens of the optimizer step divided by the number
            of its micro-batches. The data pipeline knows it.
        token_type_ids: int32; 1 at image placeholders, 0 elsewhere. Only on request: the model
            does not need it.
        rows: int32; which of the source's rows each is, -1 where there is none. The data pipeline
            knows it; for messages.
    """

    tokens: Int[np.ndarray, "B T"]
    loss_mask: Int[np.ndarray, "B T"]
    padding_mask: Int[np.ndarray, "B T"]
    images: Float[np.ndarray, "B I M C"] | None = None
    loss_denominator: Float[np.ndarray, " B"] | None = None
    token_type_ids: Int[np.ndarray, "B T"] | None = None
    rows: Int[np.ndarray, " B"] | None = None


class Processor:
    """Tokenizes conversations, masks what is not to be learnt, and packs images.

    Attributes:
        tokenizer: the directory's own.
        chat: its chat template's format.
        stop_ids: tokens that end an answer; the one that ends a turn is always among them.
        max_soft_tokens: the most soft tokens an image may become.
        image_token_id, boi_token_id, eoi_token_id, pad_token_id: ids.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: ModelConfig,
        stop_ids: Sequence[int] | None,
        max_soft_tokens: int,
        *,
        thinking: bool = False,
        thoughts: str = "last",
        transformers_alpha: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        if thoughts not in THOUGHTS:
            raise ValueError(f"thoughts: expected one of {THOUGHTS}, found {thoughts!r}")
        self.tokenizer = tokenizer
        self.max_soft_tokens = max_soft_tokens
        self._thoughts = thoughts
        self.image_token_id = config.image_token_id
        self.boi_token_id, self.eoi_token_id = config.boi_token_id, config.eoi_token_id
        self.pad_token_id = config.pad_token_id
        names = ("image_token_id", "boi_token_id", "eoi_token_id")
        self._image_token, *bounds = [_token_of(tokenizer, getattr(config, n), n) for n in names]
        special = special_tokens(tokenizer) | {self._image_token, *bounds}
        self._special_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
        self._text_tokenizer = text_tokenizer(tokenizer, special)
        self.chat = ChatFormat(
            tokenizer, sorted(special), thinking=thinking, arguments=chat_template_kwargs
        )
        if stop_ids is None:
            eos = config.eos_token_id
            stop_ids = [eos] if isinstance(eos, int) else list(eos)
        # A base model's list lacks what an answer ends with.
        self.stop_ids = tuple(dict.fromkeys([*stop_ids, self._special_ids[self.chat.turn_end]]))
        self._packer, self._no_images = None, "the checkpoint has no vision_config"
        if config.model_type != "gemma4":
            self._no_images = f"images of model_type {config.model_type!r} are not supported yet"
        elif config.tower_config is not None:
            self._packer = ImagePacker(
                config.tower_config, max_soft_tokens, transformers_alpha=transformers_alpha
            )

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        max_soft_tokens: int | None = None,
        *,
        thinking: bool = False,
        thoughts: str = "last",
        transformers_alpha: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Processor:
        """Reads tokenizer, chat template, special ids and stop list from a checkpoint directory.

        Args:
            directory: as Hugging Face writes it.
            max_soft_tokens: the most soft tokens an image may become: 70, 140, 280, 560 or 1120;
                None: what the directory's processor_config.json says, or 280.
            thinking: passed to the chat template as `enable_thinking`.
            thoughts: which of a row's thoughts are learnt: "last", those of its last turn, as
                earlier ones are out of sight when a model is asked; "none"; or "each_turn", for
                which `encode_all` makes a row of each turn.
            transformers_alpha: drop the transparency of images, as transformers does, instead of
                laying them on white.
            chat_template_kwargs: other arguments of the chat template; a row's own go before them.
        """
        directory = Path(directory)
        config = ModelConfig.from_hf(directory)
        tokenizer = load_tokenizer(directory)
        refuse_ids_beyond(str(directory), tokenizer.get_vocab(), config)
        stop = stop_ids_of(directory, config.rows_of_embedding)
        if stop is None:
            own = config.source.get("eos_token_id")
            config.eos_token_id = config.eos_token_id if own is None else own
        with naming(str(directory)):
            return cls(
                *(tokenizer, config, stop, soft_tokens_of(directory, max_soft_tokens)),
                thinking=thinking,
                thoughts=thoughts,
                transformers_alpha=transformers_alpha,
                chat_template_kwargs=chat_template_kwargs,
            )

    def __call__(
        self,
        conversations: Sequence[Any],
        add_generation_prompt: bool = False,
        *,
        length: int | None = None,
        images: int | None = None,
        token_type_ids: bool = False,
    ) -> Batch:
        """A batch of conversations.

        Rows are padded on the right, or, with `add_generation_prompt`, on the left, where nothing
        is supervised and the model is to speak next.

        Args:
            conversations: each as `conversation.read_conversation` takes it.
            add_generation_prompt: build prompts; completions are left out.
            length, images, token_type_ids: see `collate`.
        """
        if isinstance(conversations, str | Mapping) or _is_one_conversation(conversations):
            raise ValueError("expected a list of conversations, found one; put it in a list")
        examples = []
        for index, conversation in enumerate(conversations):
            with naming(f"example {index}"):
                example = self.encode(conversation, add_generation_prompt=add_generation_prompt)
                examples.append(example)
        return self.collate(
            examples,
            length=length,
            images=images,
            side="left" if add_generation_prompt else "right",
            token_type_ids=token_type_ids,
        )

    def encode(self, conversation: Any, *, add_generation_prompt: bool = False) -> Example:
        """One conversation, not padded. Images are resized here; their counts follow from it.

        Args:
            conversation: as `read_conversation` takes it, or what that has read already, with
                the same `prompt_only` as `add_generation_prompt`.
            add_generation_prompt: build a prompt.
        """
        read = _read(conversation, prompt_only=add_generation_prompt)
        if not add_generation_prompt and not any(read.trained):
            if any(message["role"] == "assistant" for message in read.messages):
                raise ValueError(
                    "there is no assistant message to learn: the loss switch of each is off"
                )
            raise ValueError(
                "there is no assistant message to learn; add one, or build prompts with "
                "add_generation_prompt=True"
            )
        if read.text is not None:
            return self._encode_text(read, read.text, add_generation_prompt=add_generation_prompt)
        read, left_out = keep_thoughts(read, self._thoughts, prompt=add_generation_prompt)
        images, counts = self._pack(read.images)
        segments = self.chat.segments(read, add_generation_prompt=add_generation_prompt)
        placeholders = sum(s.special and s.text == self._image_token for s in segments)
        if placeholders != len(counts):
            raise ValueError(
                f"the chat template writes {placeholders} image placeholders for {len(counts)} "
                "images"
            )
        tokens, loss_mask = self._tokens(segments, counts)
        if self._thoughts == "each_turn":
            left_out = 0  # Each is learnt in the row of its own turn.
        example = self._example(tokens, loss_mask, images, left_out)
        thinks = any(message.get("reasoning_content") for message in read.messages)
        told = not add_generation_prompt and self.chat.tells_to_think(read.arguments)
        return dataclasses.replace(example, unthinking=told and not thinks)

    def encode_all(self, conversation: Any) -> list[Example]:
        """One row to learn from as the examples it makes: one, or one for each of its turns."""
        if self._thoughts != "each_turn":
            return [self.encode(conversation)]
        read = _read(conversation)
        # A row without anything to learn says so in `encode`.
        return [self.encode(turn) for turn in each_turn(read) or [read]]

    def _tokens(
        self, segments: Sequence[Segment], counts: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Ids, and 1 where one is supervised; `counts` are the images' soft tokens."""
        texts = [segment.text for segment in segments if not segment.special]
        try:
            pieces = iter(self._text_tokenizer.encode_batch(texts, add_special_tokens=False))
        except TypeError as error:
            broken = next(filter(_SURROGATE.search, texts), "")
            raise UnicodeError(
                f"{broken!r:.80} holds half of a surrogate pair, which is no text; correct it"
            ) from error
        soft = iter(counts)
        tokens, loss_mask = [], []
        for segment in segments:
            supervised = segment.supervised
            if not segment.special:
                ids = next(pieces).ids
            elif segment.text == self._image_token:
                ids = self._placeholders(next(soft))
                supervised = False  # A model reads images and does not write them.
            else:
                ids = [self._special_ids[segment.text]]
            tokens += ids
            loss_mask += [int(supervised)] * len(ids)
        return tokens, loss_mask

    def _placeholders(self, count: int) -> list[int]:
        return [self.boi_token_id, *[self.image_token_id] * count, self.eoi_token_id]

    def _example(
        self,
        tokens: list[int],
        loss_mask: list[int],
        images: Float[np.ndarray, "I M C"] | None,
        left_out: int = 0,
    ) -> Example:
        """With the tokenizer's `<bos>` in front, once, whatever the template writes."""
        bos = self.tokenizer.bos_token_id
        own = next((index for index, token in enumerate(tokens) if token != bos), len(tokens))
        return Example(
            np.array([bos, *tokens[own:]], np.int32),
            np.array([0, *loss_mask[own:]], np.int32),
            images,
            left_out,
        )

    def _encode_text(
        self, read: Conversation, text: str, *, add_generation_prompt: bool
    ) -> Example:
        """A prompt that already follows the template, and the answer that goes on with it."""
        self.chat.check_templated(text)
        prompt = self.encode_templated(text, read.images)
        if add_generation_prompt:
            return prompt
        if [message["role"] for message in read.messages] != ["assistant"]:
            raise ValueError(
                "the prompt follows the chat template, so that its answer has to be one text; "
                "give both as messages"
            )
        (message,) = read.messages
        if not isinstance(message["content"], str) or message.get("tool_calls"):
            raise ValueError("the prompt follows the chat template, its answer has to be a string")
        if self._thoughts == "none":
            if text.rfind("<|channel>") > text.rfind("<channel|>"):
                raise ValueError(
                    "the prompt ends in a thought, with which its answer goes on, and thoughts are "
                    "not to be learnt ('none'); take both out"
                )
            message = {key: message[key] for key in ("role", "content")}
        tokens, loss_mask = self._tokens(self.chat.answer(message), [])
        tokens = [*prompt.tokens.tolist(), *tokens]
        return self._example(tokens, [*prompt.loss_mask.tolist(), *loss_mask], prompt.images)

    def encode_templated(self, text: str, images: Sequence[Any]) -> Example:
        """A prompt that already follows the chat template, `<|image|>` standing for each image.

        Unlike in `encode`, special tokens in `text` are special. The first token is the tokenizer's
        `<bos>`, once, however often `text` begins with it.
        """
        packed, counts = self._pack(images)
        text = without_bos(text)
        if self.tokenizer.bos_token in text:
            raise ValueError(
                f"the prompt follows the chat template and has {self.tokenizer.bos_token} behind "
                "its beginning; remove it"
            )
        pieces = text.split(self._image_token)
        if len(pieces) - 1 != len(counts):
            raise ValueError(
                f"the prompt has {len(pieces) - 1} times {self._image_token} and {len(counts)} "
                "images; write one where each image goes, or give the prompt as a list of messages"
            )
        tokens: list[int] = []
        for piece, count in zip(pieces, [*counts, None], strict=True):
            tokens += self.tokenizer.encode(piece, add_special_tokens=False)
            if count is not None:
                tokens += self._placeholders(count)
        return self._example(tokens, [0] * len(tokens), packed)

    def _pack(self, images: Sequence[Any]) -> tuple[Float[np.ndarray, "I M C"] | None, list[int]]:
        if not len(images):
            return None, []
        if self._packer is None:
            raise ValueError(
                f"{len(images)} images were given, but {self._no_images}; leave them out or "
                "use another checkpoint"
            )
        packed = self._packer.empty(len(images))
        counts = []
        for index, image in enumerate(images):
            with naming(f"image {index}"):
                packed[index], count = self._packer.pack(image)
                counts.append(count)
        return packed, counts

    def collate(
        self,
        examples: Sequence[Example],
        *,
        length: int | None = None,
        images: int | None = None,
        side: str = "right",
        token_type_ids: bool = False,
    ) -> Batch:
        """Pads examples to one shape.

        Args:
            examples: at least one.
            length: tokens per row; the longest row's if None.
            images: images per row; 0, 1, 2, 4, 8, ... as needed if None. With 0 there is no
                images array.
            side: where padding goes, "right" or "left".
            token_type_ids: fill `Batch.token_type_ids`.
        """
        if not examples:
            raise ValueError("expected at least one example, found none")
        if side not in ("right", "left"):
            raise ValueError(f"side: expected 'right' or 'left', found {side!r}")
        length = max(len(e.tokens) for e in examples) if length is None else length
        counts = list(map(num_images, examples))
        slots = image_slots(max(counts)) if images is None else images
        shape = (len(examples), length)
        tokens = np.full(shape, self.pad_token_id, np.int32)
        loss_mask, padding_mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        packed = self._packer.empty(len(examples), slots) if slots and self._packer else None
        for row, (example, count) in enumerate(zip(examples, counts, strict=True)):
            size = len(example.tokens)
            if size > length or count > slots:
                raise ValueError(
                    f"example {row}: it has {size} tokens and {count} images, the batch holds "
                    f"{length} and {slots}; leave the example out or raise `length` or `images`"
                )
            place = slice(0, size) if side == "right" else slice(length - size, length)
            tokens[row, place] = example.tokens
            loss_mask[row, place] = example.loss_mask
            padding_mask[row, place] = 1
            if count and packed is not None:
                packed[row, :count] = example.images
        types = (tokens == self.image_token_id).astype(np.int32) if token_type_ids else None
        return Batch(tokens, loss_mask, padding_mask, packed, token_type_ids=types)

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids, a list or an array."""
        ids = np.asarray(ids).astype(int).tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def explain(self, batch: Batch, row: int = 0) -> str:
        """One row for a human: stretches of text, and which of them are learnt.

        row 0: 83 tokens, 2 of them supervised, 1 image
          context     '<bos><|turn>user\\n<|image>[64 x <|image|>]<image|>What digit ...'
          SUPERVISED  '7<turn|>'
          context     '\\n'
        """
        tokens, mask = np.asarray(batch.tokens[row]), np.asarray(batch.loss_mask[row])
        real = np.asarray(batch.padding_mask[row])
        kinds = np.where(real == 0, "padding", np.where(mask == 1, "SUPERVISED", "context"))
        used = 0
        if batch.images is not None:
            used = int((np.asarray(batch.images[row])[..., -1] >= 0).any(-1).sum())
        lines = [
            f"row {row}: {int(real.sum())} tokens, {int(mask.sum())} of them supervised, "
            f"{used} image{'' if used == 1 else 's'}"
        ]
        for kind, start, end in _runs(kinds):
            shown = f"{end - start} tokens" if kind == "padding" else self._shown(tokens[start:end])
            lines.append(f"  {kind:<10}  {shown}")
        return "\n".join(lines)

    def _shown(self, tokens: Int[np.ndarray, " T"]) -> str:
        text = ""
        for is_image, start, end in _runs(tokens == self.image_token_id):
            if is_image:
                text += f"[{end - start} x {self._image_token}]"
            else:
                text += self.decode(tokens[start:end], skip_special_tokens=False)
        return repr(text)


def _runs(values: np.ndarray) -> Iterator[tuple[Any, int, int]]:
    """Each stretch of equal values: the value, where it begins, and where the next does."""
    start = 0
    for value, run in groupby(values):
        end = start + len(list(run))
        yield value, start, end
        start = end


def num_images(example: Any) -> int:
    """How many there are, of what has `images` or None."""
    return 0 if example.images is None else len(example.images)


def image_slots(count: int) -> int:
    """How many images per row a batch makes room for: 0, 1, 2, 4, 8, ..., to compile seldom."""
    return 0 if count == 0 else 1 << (count - 1).bit_length()


def _read(conversation: Any, *, prompt_only: bool = False) -> Conversation:
    if isinstance(conversation, Conversation):
        return conversation
    return read_conversation(conversation, prompt_only=prompt_only)


def _is_one_conversation(conversations: Sequence[Any]) -> bool:
    first = conversations[0] if len(conversations) else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def _token_of(tokenizer: Any, index: int, name: str) -> str:
    token = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
    if token is None:
        raise ValueError(
            f"{name}: config.json says {index}, and the tokenizer has {len(tokenizer)} tokens; "
            "do both belong to the same checkpoint?"
        )
    return token
