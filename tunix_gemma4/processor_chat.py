# SPDX-License-Identifier: Apache-2.0
"""A directory's chat template, and which stretches of what it writes are the model's answers.

Nothing of the turn grammar is assumed: the tokens that open and close a turn, the header of a
model turn and what a generation prompt puts before the answer are found by rendering probes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .processor_conversation import Conversation

# What a model writes itself. In its turns these stay tokens; all other special tokens, and in
# other turns these too, are taken as the text that somebody typed.
_GRAMMAR = (
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>'),
)
_TOOL_RESPONSE = ("<|tool_response>", "<tool_response|>")


class Segment(NamedTuple):
    """A stretch of the rendered conversation that is tokenized by itself."""

    text: str
    special: bool  # one special token, not text
    supervised: bool = False


class ChatFormat:
    """Renders conversations with the tokenizer's own template.

    Attributes:
        turn_start, turn_end: the special tokens around a turn.
        header: what follows `turn_start` in a model turn.
        prefix: what the generation prompt puts behind the header, so that an answer follows it:
            the empty thought of 12B, 26B-A4B and 31B, nothing for E2B and E4B.
    """

    def __init__(self, tokenizer: Any, special_tokens: Sequence[str], *, thinking: bool = False):
        self._tokenizer, self._thinking = tokenizer, thinking
        self._special = _any_of(special_tokens)
        self._special_in_answer = _any_of([t for t in special_tokens if t not in _GRAMMAR])
        self._learn_turns()

    def _learn_turns(self) -> None:
        question = [{"role": "user", "content": "question"}]
        before = self.render(question)
        prompt = self.render(question, add_generation_prompt=True)
        answered = self.render([*question, {"role": "assistant", "content": "answer"}])
        pieces = list(self._split(prompt.removeprefix(before)))
        closing = [
            piece.text for piece in self._split(answered.rpartition("answer")[2]) if piece.special
        ]
        well_formed = (
            prompt.startswith(before)
            and len(pieces) > 1
            and pieces[0].special
            and "\n" in pieces[1].text
            and closing
        )
        if not well_formed:
            raise ValueError(
                "the chat template is not Gemma 4's: expected turns of a special token, a role, a "
                f"newline, the content and a special token; a question and answer give {answered!r}"
            )
        self.turn_start, self.turn_end = pieces[0].text, closing[0]
        role, newline, rest = pieces[1].text.partition("\n")
        self.header = role + newline
        self.prefix = [Segment(rest, False)] * bool(rest) + pieces[2:]

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """What the template makes of `messages`."""
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=self._thinking,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def segments(
        self, conversation: Conversation, *, add_generation_prompt: bool = False
    ) -> list[Segment]:
        """The rendered conversation in pieces; supervised are the trained answers and their end.

        Where the generation prompt has a prefix, it stands before each trained answer too,
        unsupervised, because that is what the answer will follow when it is generated.
        """
        messages, restore = self._hide(conversation.messages)
        rendered = self.render(messages, add_generation_prompt=add_generation_prompt)
        pieces = [
            piece if piece.special else piece._replace(text=restore(piece.text))
            for piece in self._split(rendered)
        ]
        if add_generation_prompt:
            return pieces
        return self._supervise(pieces, conversation.trained)

    def _hide(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
        """Replaces special tokens that stand in texts by marks; `restore` puts them back."""
        texts = [text for message in messages for text in _texts(message)]
        used = set().union(*texts)
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        hidden: list[str] = []

        def hide(text: str, special: re.Pattern) -> str:
            def replace(match: re.Match) -> str:
                hidden.append(match[0])
                return f"{mark}{len(hidden) - 1}{mark}"

            return special.sub(replace, text)

        def restore(text: str) -> str:
            return re.sub(f"{mark}(\\d+){mark}", lambda match: hidden[int(match[1])], text)

        result = []
        for message in messages:
            answer = message["role"] == "assistant"
            special = self._special_in_answer if answer else self._special
            message = dict(message)
            for key in message.keys() - {"role"}:
                value = message[key]
                if isinstance(value, str):
                    message[key] = hide(value, special)
                else:
                    message[key] = [
                        part | {"text": hide(part["text"], special)} if "text" in part else part
                        for part in value
                    ]
            result.append(message)
        return result, restore

    def _split(self, rendered: str) -> Iterator[Segment]:
        """Special tokens and the text between them."""
        end = 0
        for match in self._special.finditer(rendered):
            if match.start() > end:
                yield Segment(rendered[end : match.start()], False)
            yield Segment(match[0], True)
            end = match.end()
        if end < len(rendered):
            yield Segment(rendered[end:], False)

    def _supervise(self, pieces: list[Segment], trained: list[bool]) -> list[Segment]:
        starts = [
            index
            for index, (piece, following) in enumerate(zip(pieces, pieces[1:], strict=False))
            if piece == Segment(self.turn_start, True)
            and not following.special
            and following.text.startswith(self.header)
        ]
        if len(set(trained)) == 1:
            trained = trained[:1] * len(starts)
        if len(trained) != len(starts):
            raise ValueError(
                f"the chat template writes {len(starts)} model turns for {len(trained)} assistant "
                "messages, so that the ones to train on cannot be told; join assistant messages "
                "that follow each other"
            )
        result, done = [], 0
        for start, train in zip(starts, trained, strict=True):
            try:
                end = pieces.index(Segment(self.turn_end, True), start)
            except ValueError:
                raise ValueError(
                    f"the chat template leaves a model turn open: no {self.turn_end} follows"
                ) from None
            result += pieces[done : start + 1]
            result.append(Segment(self.header, False))
            content = pieces[start + 1].text[len(self.header) :]
            body = [Segment(content, False)] * bool(content) + pieces[start + 2 : end + 1]
            result += self._answer(body) if train else body
            done = end + 1
        return result + pieces[done:]

    def _answer(self, body: list[Segment]) -> list[Segment]:
        """A trained model turn without its header: the prefix, then what is learnt."""
        prefix = self.prefix
        if body[: len(prefix)] == prefix:
            body = body[len(prefix) :]
        elif prefix and body[0] == prefix[0]:
            prefix = []  # The turn has a thought of its own.
        if not "".join(piece.text for piece in body[:-1]).strip():
            raise ValueError(
                "an assistant turn is empty once the chat template has removed its thoughts; "
                "give it an answer or remove it"
            )
        result, quoted = [], False
        for piece in body:
            # What a tool answered stands inside the model's turn and is not the model's.
            result.append(piece._replace(supervised=not quoted))
            if piece.special and piece.text in _TOOL_RESPONSE:
                quoted = piece.text == _TOOL_RESPONSE[0]
        return [*prefix, *result]


def _texts(message: dict[str, Any]) -> Iterator[str]:
    for value in message.values():
        if isinstance(value, str):
            yield value
        else:
            yield from (part["text"] for part in value if "text" in part)


def _any_of(tokens: Sequence[str]) -> re.Pattern:
    # The longest first, should one begin another.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def special_tokens(tokenizer: Any) -> set[str]:
    """Added tokens that text never stands for: those marked special and Gemma 4's own."""
    return {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or token.content.startswith("<|") or token.content.endswith("|>")
    }


def text_tokenizer(tokenizer: Any, special: set[str]) -> Any:
    """A tokenizer for which special tokens are ordinary text.

    A copy: the flag is global to a tokenizer, and threads of the data pipeline use this one.
    """
    from tokenizers import AddedToken, Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in sorted(special)]
    )
    copy.encode_special_tokens = True
    return copy
