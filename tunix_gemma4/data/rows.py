# SPDX-License-Identifier: Apache-2.0
"""The forms in which data sets write a row, made one: the only place that knows them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from . import keys
from .keys import first_of, is_empty, is_list, one_of
from .messages import (
    Message,
    answer_of_text,
    join,
    parts_of,
    read_messages,
    read_tools,
    text_in,
    text_of,
)

PROMPTS = "'prompt' or 'messages', or data.prompt_column to name the column of the prompts"
_FORMS = (
    "a list of messages, or an object with 'messages', with 'conversations' (from, value), or "
    "with 'prompt' and 'completion'"
)
# How the chat template begins a turn.
TURN = re.compile(r"<\|turn>\w+\n")
_BOS = re.compile(r"\s*(<bos>\s*)*")
# A string that the template has written already.
_TEMPLATED = re.compile(_BOS.pattern + r"<\|turn>(\w+)\n")
_ANSWER = "<|turn>model\n"
# Words of other tools for an image's place; the longest first, for one contains another.
_MARKS = (
    *("<|vision_start|><|image_pad|><|vision_end|>", "<start_of_image>", "<image_soft_token>"),
    *("<|image|>", "<|image_pad|>", "<image>"),
)
_MARK = re.compile("|".join(map(re.escape, _MARKS)))
# How strings begin that another template has written: with a special token, as all families write
# them, or with one of a few words in brackets; marks of images are neither.
_FOREIGN = re.compile(
    rf"\s*(<s>\s*)?(?!{_MARK.pattern})(<\|[^\s|<>]+\|>|<｜[^\s｜<>]+｜>|<\|turn>|<bos>"
    r"|<BOS_TOKEN>|<start_of_turn>|\[INST\]|\[SYSTEM_PROMPT\]|\[AVAILABLE_TOOLS\]|\[gMASK\])"
)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, and what it does not take."""

    # `role` (system, user, assistant or tool) and `content`, a string or a list of parts; image
    # parts carry no image. An assistant's may have `reasoning_content` and `tool_calls`, a tool's
    # has the `name` of its tool.
    messages: list[dict[str, Any]]
    images: list[Any]  # one for each image part, in order
    trained: list[bool]  # for each assistant message, whether it is to be learnt
    tools: list[dict[str, Any]] | None = None  # definitions for the template; None for none
    # Further arguments of the template, such as `enable_thinking`.
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    # A prompt that already follows the template, in place of the messages before the answer.
    text: str | None = None
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)  # what else the row has
    unread: tuple[str, ...] = ()  # names of keys in its messages that mean nothing here

    @property
    def given(self) -> str | list[dict[str, Any]]:
        """The prompt as reward functions get it."""
        return self.messages if self.text is None else self.text

    def before(self, end: int) -> Conversation:
        """Its first `end` messages with their images; a text keeps its own."""
        messages, images = self.messages[:end], self.images
        if self.text is None:
            parts = [part for message in messages for part in parts_of(message["content"])]
            images = images[: sum(part["type"] == "image" for part in parts)]
        answers = sum(message["role"] == "assistant" for message in messages)
        return dataclasses.replace(
            self, messages=messages, images=images, trained=self.trained[:answers]
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row says, whatever its form."""

    form: str  # the key under which its conversation stands
    messages: list[Message]  # the prompt with its history, or the whole conversation
    completion: list[Message] | None  # the answer where it stands by itself; None: it has none
    answer: str | None  # the key of that answer
    whole: bool  # whether answers in `messages` are learnt too
    text: str | None  # a prompt that already follows the template; `messages` is empty then
    images: list[Any] | None  # those beside the messages; None: the row has no such column
    tools: list[dict[str, Any]] | None  # this and what follows: see `Conversation`
    arguments: dict[str, Any]
    columns: dict[str, Any]

    def view(
        self, messages: Sequence[Message], trained: Sequence[bool], images: list[Any] | None = None
    ) -> Conversation:
        """A conversation of these messages; learnt are those of `trained` whose switch is not off.

        `images` stand beside them in place of the row's.
        """
        images = self.images if images is None else images
        messages = [
            dataclasses.replace(message, trained=learnt and message.trained is not False)
            for message, learnt in zip(messages, trained, strict=True)
        ]
        filled, found = _place_images(join(messages), images, self.text)
        return Conversation(
            [_plain(message) for message in filled],
            found,
            [bool(message.trained) for message in filled if message.role == "assistant"],
            self.tools,
            self.arguments,
            self.text,
            self.columns,
            tuple(dict.fromkeys(key for message in filled for key in message.unread)),
        )


# ---- Rows.


def read_row(
    row: Any,
    *,
    column: str | None = None,
    names: Collection[str] = (),
    answered: bool = False,
    asked: bool = False,
    expected: str = _FORMS,
) -> Row:
    """The one reading of a row of any form.

    Args:
        row: a list of messages, or an object in one of the forms of docs/how-to/data.md.
        column: that of the prompt; None: where the forms have it.
        names: keys that are columns too, whatever they mean.
        answered: answers stand elsewhere, so that words such as "question" are a prompt.
        asked: answers are columns, which may be anything.
        expected: what an error says of a row of no form.
    """
    if is_list(row):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"expected {expected}, found {type(row).__name__}")
    row = _unpacked(row)
    keys.refuse(row, names)
    form = form_of(row, answered=answered) if column is None else column
    if column is not None and keys.is_null(row.get(column)):
        raise ValueError(f"it has no column {column!r}, which data.prompt_column names")
    if form is None:
        _refuse_form(row, expected)
    tools = one_of(row, keys.TOOLS)
    consumed = {form, *keys.BESIDE, *keys.IMAGES}
    text, completion, answer = None, None, None
    if form in keys.CONVERSATIONS:
        messages = _listed(_pairs(row[form]), row, form)
    else:
        messages, text = _prompt(row, form)
        consumed |= {"input"} if form == "instruction" and isinstance(row[form], str) else set()
        if column is None and not answered:
            answer = first_of(row, keys.ANSWERS)
            completion = None if answer is None else _completion(row[answer], answer, asked)
    return Row(
        form,
        with_system(messages, row, text),
        completion,
        answer,
        form in keys.CONVERSATIONS or not is_empty(row.get("history")),
        text,
        _beside(row),
        None if tools is None else read_tools(row[tools], tools),
        _arguments(row),
        keys.columns(row, consumed, names),
    )


def _unpacked(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's preferences have prompt and tools one level down, in `input`."""
    inner = row.get("input")
    if isinstance(inner, Mapping) and is_list(inner.get("messages")):
        twice = [key for key in inner if key != "input" and not is_empty(row.get(key))]
        if twice:
            raise ValueError(f"{twice[0]!r} stands in 'input' and beside it; keep one of them")
        return {key: value for key, value in row.items() if key != "input"} | dict(inner)
    return row


def form_of(row: Mapping[str, Any], *, answered: bool) -> str | None:
    """The key under which the conversation stands."""
    names = (*keys.CONVERSATIONS, *keys.PROMPTS)
    if answered or first_of(row, keys.ANSWERS) is not None:
        names += keys.PROMPTS_WITH_ANSWER
    return first_of(row, names)


def _refuse_form(row: Mapping[str, Any], expected: str) -> NoReturn:
    hint = ""
    if first_of(row, keys.CHOSEN) is not None:
        hint = "; it is a row of preferences, which DPO and ORPO train on"
    elif isinstance(row.get("text"), str):
        hint = "; plain texts are not trained on: give 'messages', or 'prompt' and 'completion'"
    found = f"an object with {sorted(row)}" if expected == _FORMS else ", ".join(row)
    raise ValueError(f"expected {expected}; found {found}{hint}")


def _pairs(given: Any) -> Any:
    """ms-swift's turns `{"human", "assistant"}` as messages; others as they are.

    The first may have the `system` message; in others `read_messages` refuses it.
    """
    if not is_list(given) or not all(
        isinstance(turn, Mapping) and "human" in turn and "assistant" in turn for turn in given
    ):
        return given
    result = []
    for turn in given:
        if not result and isinstance(turn.get("system"), str) and turn["system"]:
            result.append({"role": "system", "content": turn["system"]})
            turn = {key: value for key, value in turn.items() if key != "system"}
        # Other keys are of the answer: what they are called there says whether they are read.
        rest = {key: value for key, value in turn.items() if key not in ("human", "assistant")}
        result.append({"role": "human", "content": turn["human"]})
        result.append(rest | {"role": "assistant", "content": turn["assistant"]})
    return result


def _prompt(row: Mapping[str, Any], form: str) -> tuple[list[Message], str | None]:
    """The messages before the answer, or the text that the template has written of them."""
    prompt = row[form]
    if is_list(prompt) or isinstance(prompt, Mapping):
        return _listed([prompt] if isinstance(prompt, Mapping) else prompt, row, form), None
    if not isinstance(prompt, str):
        raise ValueError(
            f"{form!r}: expected a string or a list of messages, found {type(prompt).__name__}"
        )
    if form == "instruction" and not is_empty(row.get("input")):
        if not isinstance(row["input"], str):
            raise ValueError(f"'input': expected a string, found {type(row['input']).__name__}")
        prompt = f"{prompt}\n{row['input']}" if prompt else row["input"]
    if not prompt.strip() and not _beside(row):
        raise ValueError(f"{form!r} is empty; give it a text, or remove the row")
    if _TEMPLATED.match(prompt):
        lost = [name for name in keys.BESIDE if not is_empty(row.get(name))]
        if lost:
            raise ValueError(
                f"{form!r} already follows the chat template, so that {', '.join(map(repr, lost))} "
                "cannot be put into it; give its messages"
            )
        return [], prompt
    if found := _FOREIGN.match(prompt):
        raise ValueError(
            f"{form!r} begins with {found[0].strip()!r}, as strings do that are written in another "
            "model's chat template; give its messages"
        )
    history = [] if is_empty(row.get("history")) else row["history"]
    if not is_list(history):
        raise ValueError(f"'history': expected a list of pairs, found {type(history).__name__}")
    messages = []
    for pair in history:
        if not is_list(pair) or len(pair) != 2 or not all(isinstance(s, str) for s in pair):
            raise ValueError(f"'history': expected pairs of two strings, found {pair!r:.80}")
        messages += [Message("user", pair[0]), answer_of_text(pair[1])]
    return [*messages, Message("user", prompt)], None


def without_bos(text: str) -> str:
    """A text that follows the template, from its first turn on."""
    return _BOS.sub("", text, count=1)


def templated_parts(text: str) -> tuple[str, str] | None:
    """Prompt and answer of a text that follows the template; None if it does not."""
    if not _TEMPLATED.match(text) or _ANSWER not in text:
        return None
    end = text.rindex(_ANSWER) + len(_ANSWER)
    return text[:end], text[end:]


def _listed(given: Any, row: Mapping[str, Any], form: str) -> list[Message]:
    if not is_empty(row.get("history")):
        raise ValueError(f"'history' stands beside the messages of {form!r}; put it into them")
    return read_messages(given, form)


def with_default_system(read: Row, system: str) -> list[Message]:
    """The messages of a row behind a system message for those that have none."""
    if read.text is not None:
        begins = _TEMPLATED.match(read.text)
        if begins is None or begins[2] != "system":
            raise ValueError(
                f"{read.form!r} already follows the chat template, so that data.system_prompt "
                "cannot be put into it; give its messages"
            )
        return read.messages
    has_one = not read.messages or read.messages[0].role == "system"
    return read.messages if has_one else [Message("system", system), *read.messages]


def _completion(given: Any, name: str, asked: bool) -> list[Message] | None:
    if isinstance(given, str):
        return [answer_of_text(given)]
    if isinstance(given, Mapping) and ("role" in given or "from" in given):
        given = [given]
    is_talk = is_list(given) and all(
        isinstance(m, Mapping) and ("role" in m or "from" in m) for m in given
    )
    if not is_list(given) or (asked and not is_talk):
        if name == "answer" or asked:
            return None  # A column, such as the number that a problem has for its solution.
        raise ValueError(f"{name!r}: expected a string or messages, found {type(given).__name__}")
    return read_messages(given, name)


def with_system(messages: list[Message], row: Mapping[str, Any], text: str | None) -> list[Message]:
    """The messages behind the system column's, if it has one."""
    name = one_of(row, keys.SYSTEMS)
    if name is None or text is not None or is_empty(row[name]):
        return messages
    system = text_in(row[name], repr(name))
    if messages and messages[0].role == "system":
        if text_of(messages[0].content).strip() == system.strip():
            return messages
        raise ValueError(
            f"the column {name!r} and the conversation's system message differ; keep one of them"
        )
    return [Message("system", system), *messages]


def _arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    given = row.get("chat_template_kwargs")
    if not is_empty(given) and not isinstance(given, Mapping):
        raise ValueError(
            f"'chat_template_kwargs': expected an object, found {type(given).__name__}"
        )
    given = dict(given) if isinstance(given, Mapping) else {}
    given = {key: value for key, value in given.items() if not keys.is_null(value)}
    thinking = row.get("enable_thinking")
    if not keys.is_blank(thinking):
        if not isinstance(thinking, bool):
            raise ValueError(f"'enable_thinking': expected true or false, found {thinking!r:.80}")
        if given.setdefault("enable_thinking", thinking) != thinking:
            raise ValueError("'enable_thinking' and 'chat_template_kwargs' contradict each other")
    return given


# ---- Images.


def _beside(row: Mapping[str, Any]) -> list[Any] | None:
    """The images of the row's columns `images` and `image`, each one or a list; None: no column."""
    named = [row[name] for name in keys.IMAGES if name in row]
    found: list[Any] = []
    for value in named:
        found += list(value) if is_list(value) else [value]
    found = [image for image in found if not keys.is_blank(image)]
    return found if named else None


def _place_images(
    messages: list[Message], beside: list[Any] | None, text: str | None
) -> tuple[list[Message], list[Any]]:
    """Messages whose image parts are empty, and the images of the parts in order."""
    if text is not None:
        return messages, list(beside or [])
    has_parts = bool(_image_parts(messages))
    if beside is not None and not has_parts:
        marked = [mark[0] for m in messages if (mark := _MARK.search(m.thought))]
        if marked:
            raise ValueError(
                f"a thought has the mark {marked[0]!r}, and holds no images; remove it"
            )
        messages = [_at_marks(message) for message in messages]
        if beside and not _image_parts(messages):
            messages = _put_first(messages, len(beside))
    beside = _in_order_of_parts(messages, beside or [])
    found, used = [], 0
    for part in _image_parts(messages):
        if "image" in part:
            found.append(part["image"])
            continue
        if used < len(beside):
            found.append(beside[used])
        elif has_parts and not beside:
            raise ValueError(
                'an image part without an image; give it in the part, as {"type": "image", '
                "\"image\": path}, or in a list 'images' beside the messages"
            )
        used += 1
    if used != len(beside):
        raise ValueError(
            f"{len(beside)} images are given beside the messages, which have {used} image parts "
            "without an image of their own, or marks; there must be one for each"
        )
    return messages, found


def _in_order_of_parts(messages: list[Message], beside: list[Any]) -> list[Any]:
    """The images beside the messages as their empty parts ask for them, by `index` or in order."""
    asked: list[Any] = [part.get("index") for part in _image_parts(messages) if "image" not in part]
    if not beside or all(index is None for index in asked):
        return beside
    # Tables with nulls may have made them floats.
    numbers = int | float | np.integer | np.floating
    whole = [i for i in asked if isinstance(i, numbers) and not isinstance(i, bool)]
    if len(whole) < len(asked) or set(whole) != set(range(len(beside))):
        raise ValueError(
            f"'index': {len(beside)} images are given beside the messages, and the image parts "
            f"ask for {asked!r:.80}; expected each of 0 to {len(beside) - 1}, or no 'index' at all"
        )
    return [beside[int(index)] for index in whole]


def _image_parts(messages: list[Message]) -> list[dict[str, Any]]:
    return [p for m in messages for p in parts_of(m.content) if p["type"] == "image"]


def _at_marks(message: Message) -> Message:
    """The message with an image part at each mark of its texts."""
    content = parts_of(message.content)
    if not any(_MARK.search(part.get("text", "")) for part in content):
        return message
    parts: list[dict[str, Any]] = []
    for part in content:
        for index, text in enumerate(_MARK.split(part["text"])):
            if index:
                parts.append({"type": "image"})
            if text.strip():
                parts.append({"type": "text", "text": text.strip()})
    return dataclasses.replace(message, content=parts)


def _put_first(messages: list[Message], count: int) -> list[Message]:
    """`count` image parts before the first user message's text."""
    for index, message in enumerate(messages):
        if message.role == "user":
            content = [{"type": "image"}] * count + parts_of(message.content)
            shown = dataclasses.replace(message, content=content)
            return [*messages[:index], shown, *messages[index + 1 :]]
    raise ValueError(f"{count} images are given and there is no user message to hold them")


def _plain(message: Message) -> dict[str, Any]:
    """As a chat template takes it."""
    content = message.content
    if is_list(content):
        content = [{"type": "image"} if part["type"] == "image" else part for part in content]
    result = {"role": message.role, "content": content}
    if message.thought:
        result["reasoning_content"] = message.thought
    if message.calls:
        result["tool_calls"] = message.calls
    if message.role == "tool":
        result["name"] = message.name
    return result
