# SPDX-License-Identifier: Apache-2.0
"""A directory's tokenizer and chat template, and what of its writing is the model's answers.

Nothing of the turn grammar is assumed: the tokens that open and close a turn, the header of a
model turn and what a generation prompt puts before the answer are found by rendering probes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config.source import read_json
from .conversation import Conversation, Turn, model_turns, without_thought
from .keys import walk

_TOOL_RESPONSE = ("<|tool_response>", "<tool_response|>")
_CALL_END = "<tool_call|>"
_CHANNEL = ("<|channel>", "<channel|>")
# What a model writes itself. In its turns these stay tokens; all other special tokens, and in
# other turns these too, are taken as the text that somebody typed.
_GRAMMAR = (*_CHANNEL, "<|tool_call>", _CALL_END, *_TOOL_RESPONSE, '<|"|>')
_QUESTION = [{"role": "user", "content": "question"}]
# Arguments of `apply_chat_template` that are not the template's.
_RENDERING = ("messages", "tools", "add_generation_prompt", "tokenize", "chat_template")


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

    def __init__(
        self,
        tokenizer: Any,
        special_tokens: Sequence[str],
        *,
        thinking: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ):
        self._tokenizer = tokenizer
        self._check_arguments(arguments or {})
        self._arguments = {"enable_thinking": thinking} | dict(arguments or {})
        if thinking and not self._arguments["enable_thinking"]:
            raise ValueError("'chat_template_kwargs': enable_thinking is off, and thinking on")
        self._special = _any_of(special_tokens)
        self._special_in_answer = _any_of([t for t in special_tokens if t not in _GRAMMAR])
        self._in_grammar = _any_of([t for t in special_tokens if t in _GRAMMAR])
        self._prefixes: dict[str, list[Segment]] = {}
        self._learn_turns()

    def _learn_turns(self) -> None:
        before, pieces = self._opening({})
        answered = self.render([*_QUESTION, {"role": "assistant", "content": "answer"}])
        closing = [
            piece.text
            for piece in _split(answered.rpartition("answer")[2], self._special)
            if piece.special
        ]
        well_formed = (
            before is not None
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
        self.header = "".join(pieces[1].text.partition("\n")[:2])
        self.prefix = self._prefix({})

    def _opening(self, arguments: Mapping[str, Any]) -> tuple[str | None, list[Segment]]:
        """A question, and what the generation prompt puts behind it; None if it changes both."""
        before = self.render(_QUESTION, arguments=arguments)
        prompt = self.render(_QUESTION, add_generation_prompt=True, arguments=arguments)
        pieces = list(_split(prompt.removeprefix(before), self._special))
        return (before if prompt.startswith(before) else None), pieces

    def _prefix(self, arguments: Mapping[str, Any]) -> list[Segment]:
        """What stands between a model turn's header and an answer under these arguments."""
        key = repr(sorted(arguments.items()))
        if key not in self._prefixes:
            _, pieces = self._opening(arguments)
            rest = pieces[1].text.partition("\n")[2]
            self._prefixes[key] = [Segment(rest, False)] * bool(rest) + pieces[2:]
        return self._prefixes[key]

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """What the template makes of `messages`."""
        import jinja2

        settings = self._arguments | dict(arguments or {})
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **settings,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def segments(
        self, conversation: Conversation, *, add_generation_prompt: bool = False
    ) -> list[Segment]:
        """The rendered conversation in pieces; supervised are the trained answers and their end.

        Where the generation prompt has a prefix, it stands before each trained answer too,
        unsupervised, because that is what the answer will follow when it is generated. Thoughts
        are put before the answers by this method, whatever the template does with them.

        Raises:
            ValueError: also where something of a trained turn is not in what the template writes.
        """
        self._check_arguments(conversation.arguments)
        turns = model_turns(conversation)
        given = [without_thought(message) for message in conversation.messages]
        if any(message["role"] == "tool" for message in given) and not self._knows_tool_turns:
            given = _with_results_inside(given)
        (messages, tools), restore = self._hide(given, conversation.tools)
        rendered = self.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            arguments=conversation.arguments,
        )
        pieces = [
            piece if piece.special else piece._replace(text=restore(piece.text))
            for piece in _split(rendered, self._special)
        ]
        if tools is not None and not self._writes_tools:
            raise ValueError("the chat template writes no definitions of tools; remove 'tools'")
        _check_results(conversation, "".join(piece.text for piece in pieces))
        if add_generation_prompt and not any(turn.thoughts for turn in turns):
            return pieces
        prefix = self._prefix(conversation.arguments)
        return self._supervise(pieces, turns, prefix, prompt=add_generation_prompt)

    def answer(self, message: Mapping[str, Any]) -> list[Segment]:
        """An answer by itself, all of it supervised, with the token that ends its turn."""
        text = message["content"].rstrip().removesuffix(self.turn_end)
        pieces = [*_split(text, self._in_grammar), Segment(self.turn_end, True)]
        if message.get("reasoning_content"):
            pieces = [*_thought(message["reasoning_content"]), *pieces]
        return _learnt(pieces)

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Refuses arguments that the template does not look at."""
        template = str(self._tokenizer.chat_template)
        for name in arguments:
            if name in _RENDERING or not re.search(rf"\b{re.escape(name)}\b", template):
                raise ValueError(
                    f"'chat_template_kwargs': the chat template has no argument {name!r}; remove it"
                )

    def check_templated(self, text: str) -> None:
        """Refuses a text in the template's form that no answer can go on with.

        Raises:
            ValueError: also where it has no sign of what the template was told to write.
        """
        last = text.rpartition(self.turn_start)[2]
        if not last.startswith(self.header) or self.turn_end in last:
            raise ValueError(
                "the prompt follows the chat template and does not end where an answer begins; "
                f"expected {self.turn_start + self.header!r} at its end"
            )
        lost = [name for name in self._arguments if name != "enable_thinking"]
        written = set(self._special.findall(text))
        if self._arguments["enable_thinking"] and not self._signs <= written:
            lost = ["enable_thinking", *lost]
        if lost:
            raise ValueError(
                f"the prompt already follows the chat template, so that {', '.join(lost)} (data."
                "thinking, data.chat_template_kwargs) cannot be put into it; give its messages"
            )

    def tells_to_think(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the template gets `enable_thinking`, of a row's `arguments` or of all."""
        return bool((self._arguments | dict(arguments))["enable_thinking"])

    @functools.cached_property
    def _signs(self) -> set[str]:
        """Special tokens that a prompt has where the model is told to think, and else not."""
        on, off = (
            set(self._special.findall(self.render(_QUESTION, arguments={"enable_thinking": value})))
            for value in (True, False)
        )
        return on - off

    @functools.cached_property
    def _writes_tools(self) -> bool:
        """Whether the template writes definitions of tools."""
        name, nothing = "tool_of_a_probe", {"type": "object", "properties": {}}
        function = {"name": name, "description": "", "parameters": nothing}
        return name in self.render(_QUESTION, tools=[{"type": "function", "function": function}])

    @functools.cached_property
    def _knows_tool_turns(self) -> bool:
        """Whether the template takes what a tool answered as a message, or inside the call's."""
        call = {"type": "function", "function": {"name": "probe", "arguments": {}}}
        asked = [*_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            rendered = self.render([*asked, {"role": "tool", "name": "probe", "content": "result"}])
        except ValueError:
            return False
        before, found, _ = rendered.partition("result")
        return bool(found) and _TOOL_RESPONSE[0] in before

    def _hide(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[tuple[Any, Any], Any]:
        """Replaces special tokens that stand in texts by marks; `restore` puts them back."""
        used = set().union(*_strings(messages), *_strings(tools))
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        hidden: list[str] = []

        def hide(value: Any, special: re.Pattern) -> Any:
            def replace(match: re.Match) -> str:
                hidden.append(match[0])
                return f"{mark}{len(hidden) - 1}{mark}"

            if isinstance(value, str):
                return special.sub(replace, value)
            if isinstance(value, Mapping):
                return {key: hide(part, special) for key, part in value.items()}
            return [hide(part, special) for part in value] if isinstance(value, list) else value

        def restore(text: str) -> str:
            return re.sub(f"{mark}(\\d+){mark}", lambda match: hidden[int(match[1])], text)

        result = []
        for message in messages:
            answer = message["role"] == "assistant"
            # Calls and results are data: what looks like a token in them is not one.
            special = {"content": self._special_in_answer} if answer else {}
            result.append(
                {
                    key: value if key == "role" else hide(value, special.get(key, self._special))
                    for key, value in message.items()
                }
            )
        return (result, hide(tools, self._special)), restore

    def _supervise(
        self, pieces: list[Segment], turns: list[Turn], prefix: list[Segment], *, prompt: bool
    ) -> list[Segment]:
        starts = [
            index
            for index, (piece, following) in enumerate(zip(pieces, pieces[1:], strict=False))
            if piece == Segment(self.turn_start, True)
            and not following.special
            and following.text.startswith(self.header)
        ]
        if prompt:
            starts = starts[: len(turns)]  # Behind them is the turn that is asked for.
        elif len(starts) != len(turns):
            turns = [single for turn in turns for single in turn.singles()]
        if len(starts) != len(turns):
            raise ValueError(
                f"the chat template writes {len(starts)} model turns for {len(turns)} assistant "
                "messages, so that the ones to train on cannot be told"
            )
        result, done = [], 0
        for number, (start, turn) in enumerate(zip(starts, turns, strict=True)):
            end = self._end(pieces, start)
            result += pieces[done : start + 1]
            result.append(Segment(self.header, False))
            content = pieces[start + 1].text[len(self.header) :]
            body = [Segment(content, False)] * bool(content) + pieces[start + 2 : end]
            result += self._answer(body, turn, prefix)
            if turn.trained:
                _check_written(turn, number, body)
            done = end
        return result + pieces[done:]

    def _end(self, pieces: list[Segment], start: int) -> int:
        """Where a model turn ends, behind its last piece: a call may leave it open."""
        edges = (Segment(self.turn_end, True), Segment(self.turn_start, True))
        end = next((i for i in range(start + 1, len(pieces)) if pieces[i] in edges), len(pieces))
        if end < len(pieces) and pieces[end] == edges[0]:
            return end + 1
        if pieces[end - 1].special and pieces[end - 1].text in _TOOL_RESPONSE:
            return end
        raise ValueError(f"the chat template leaves a model turn open: no {self.turn_end} follows")

    def _answer(self, body: list[Segment], turn: Turn, prefix: list[Segment]) -> list[Segment]:
        """A model turn without its header: the prefix and, if it is trained, what is learnt."""
        if not turn.trained:
            return _with_thoughts(body, turn)
        if prefix and body[: len(prefix)] == prefix:
            body = body[len(prefix) :]
        elif prefix and body[0] == prefix[0]:
            prefix = []  # The turn has a thought of its own.
        if not "".join(p.text for p in body if p != Segment(self.turn_end, True)).strip():
            raise ValueError(
                "an assistant turn holds nothing besides its thoughts; give it an answer or remove "
                "it"
            )
        if turn.thoughts.get(0):
            prefix = []
        return [*prefix, *_learnt(_with_thoughts(body, turn))]


def _check_written(turn: Turn, number: int, body: list[Segment]) -> None:
    """Compares what went into a learnt turn with what came out of the template."""
    written = "".join(piece.text for piece in body)
    own = "".join(piece.text for piece in _learnt(body) if piece.supervised)
    missing = turn.missing_from(written, own)
    if missing is not None:
        raise ValueError(
            f"turn {number} of the model: the chat template does not write {missing!r:.80} there, "
            "so that it would not be learnt; remove it, or put it where the template has it"
        )
    missing = turn.misplaced_in(written)
    if missing is not None:
        raise ValueError(
            f"turn {number} of the model: the chat template writes {missing!r:.80}, which stands "
            "beside a call, behind the tool's answer; remove it or make it a thought"
        )


def _learnt(body: list[Segment]) -> list[Segment]:
    """All of a turn but what tools answered: that stands in it and is not the model's.

    The token that opens an answer is the model's where it ends its calls, not between two answers.
    """
    result, quoted, called = [], False, False
    for piece in body:
        opens = piece == Segment(_TOOL_RESPONSE[0], True)
        result.append(piece._replace(supervised=not quoted and (called or not opens)))
        if piece.special and piece.text in _TOOL_RESPONSE:
            quoted, called = opens, False
        called = called or piece == Segment(_CALL_END, True)
    return result


def _thought(text: str) -> list[Segment]:
    return [
        Segment(_CHANNEL[0], True),
        Segment(f"thought\n{text}\n", False),
        Segment(_CHANNEL[1], True),
    ]


def _with_thoughts(body: list[Segment], turn: Turn) -> list[Segment]:
    """The turn with each message's thought before what it says or calls."""
    result = list(body)
    for index, text in sorted(turn.thoughts.items(), reverse=True):
        place = turn.place_of(index, body)
        result[place:place] = _thought(text)
    return result


def _with_results_inside(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What tools answered in the message of the call, as Gemma 4's first template takes it.

    The text that the model goes on with stands in that message too.
    """
    result: list[dict[str, Any]] = []
    for message in messages:
        last = result[-1] if result else {}
        if message["role"] == "tool":
            response = {"name": message["name"], "response": message["content"]}
            result[-1] = last | {"tool_responses": [*last.get("tool_responses", []), response]}
        elif "tool_responses" in last and "tool_calls" not in message and not last["content"]:
            result[-1] = last | {"content": message["content"]}
        else:
            result.append(message)
    return result


def _check_results(conversation: Conversation, rendered: str) -> None:
    """Refuses a template that leaves out what tools answered."""
    for index, message in enumerate(conversation.messages):
        if message["role"] == "tool":
            missing = [s for s in _strings(message["content"]) if s.strip() not in rendered]
            if missing:
                raise ValueError(
                    f"message {index}: the chat template does not write what the tool answered, "
                    f"{missing[0]!r:.80}"
                )


def _strings(value: Any) -> list[str]:
    """Every string in it; of parts their texts."""
    skipped = {"type", "role"}
    return [s for path, s in walk(value) if isinstance(s, str) and skipped.isdisjoint(path)]


def _any_of(tokens: Sequence[str]) -> re.Pattern:
    # The longest first, should one begin another; without any it matches nothing.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _split(text: str, special: re.Pattern) -> Iterator[Segment]:
    """Special tokens and the text between them."""
    end = 0
    for match in special.finditer(text):
        if match.start() > end:
            yield Segment(text[end : match.start()], False)
        yield Segment(match[0], True)
        end = match.end()
    if end < len(text):
        yield Segment(text[end:], False)


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


# For every `from_pretrained` of transformers; left out, some of them ask on the terminal.
NO_CODE = {"trust_remote_code": False}
_ENDS = ("bos_token", "eos_token")
_SMALL = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.json",
)


def load_tokenizer(directory: Path) -> Any:
    """The directory's own tokenizer, with its chat template.

    Raises:
        ValueError: naming the file that is missing, damaged, or asks for code of its own.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"{directory}: there is no tokenizer.json; copy the tokenizer files of the "
            "checkpoint here"
        )
    # transformers goes on without some of these, or without naming them.
    described = {
        name: read_json(directory / name) for name in _SMALL if (directory / name).is_file()
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **NO_CODE)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers' panics are no Exceptions.
        if (directory / "tokenizer.json").is_file():
            read_json(directory / "tokenizer.json")
        if isinstance(error, UnicodeDecodeError):  # All JSON was text.
            raise ValueError(f"{directory}: chat_template.jinja is not UTF-8 ({error})") from error
        if "auto_map" in described.get("tokenizer_config.json", {}):
            raise ValueError(
                f"{directory / 'tokenizer_config.json'}: auto_map asks for code of its own, which "
                "is never run here; use the tokenizer files of the released checkpoint"
            ) from error
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(
            f"{directory}: the tokenizer cannot be loaded ({reason}); copy the tokenizer files of "
            "the released checkpoint here"
        ) from error
    missing = [name for name in _ENDS if getattr(tokenizer, f"{name}_id") is None]
    if missing:
        file = directory / "tokenizer_config.json"
        none = f"found no {' and no '.join(missing)}" if file.is_file() else "there is no such file"
        raise ValueError(
            f"{file}: expected {' and '.join(_ENDS)}, {none}; copy that of the released "
            "checkpoint here"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"{directory}: it has no chat template, as the pre-trained checkpoints have none; "
            "use the instruction-tuned directory (its name ends in -it), or copy its "
            "chat_template.jinja here"
        )
    return tokenizer


def stop_ids_of(directory: Path, rows: int) -> list[int] | None:
    """The ids of generation_config.json that end an answer; None where it has none.

    Raises:
        ValueError: naming the file, for what are no ids or have none of the embedding's `rows`.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    found = read_json(path).get("eos_token_id")
    if found is None:
        return None
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(type(one) is int and one >= 0 for one in ids):
        raise ValueError(f"{path}: eos_token_id is {found!r:.80}, expected an id or a list of ids")
    if max(ids) >= rows:
        raise ValueError(
            f"{path}: eos_token_id is {found!r:.80}, and {max(ids)} is beyond the vocabulary: the "
            f"embedding has {rows} rows"
        )
    return ids
