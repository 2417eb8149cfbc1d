# SPDX-License-Identifier: Apache-2.0
"""One message in the words of any tool, made one: role, parts, loss switch, thought, calls.

Calls, results and definitions of tools are objects, or JSON of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..config.source import naming, parse_json
from . import keys
from .keys import first_of, is_blank, is_empty, is_list, is_null, one_of

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "model", "gpt", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
}
# Roles whose content is a call in JSON.
_CALLING = ("function_call", "tool_call")
_TEXTS = ("text", "input_text", "output_text")
_TEXT_KEYS = ("text", "content", "value")
# Types of parts that are thoughts, and where their texts stand.
THINKING_PARTS = ("thinking", "reasoning")
_OF_IMAGES = (*keys.IMAGE_KEYS, "type", "media_type")
_THINKING_KEYS = (*THINKING_PARTS, *_TEXT_KEYS)
# What else parts of Anthropic's tools have.
_OF_TOOL_PARTS = {"tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id", "content")}
# Words for the arguments of a call, and what else a call has.
_ARGUMENTS = ("arguments", "parameters", "input")
_OF_CALLS = ("name", "id", "type", "index")
# Words that others may have for what a tool answered.
_OUTPUTS = ("output", "result", "response", "text")
_SWITCHES = ("weight", "train", "loss", "loss_scale")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_END = re.compile(r"(?:\s*(?:<turn\|>|<eos>))+\s*\Z")
_CHANNEL = re.compile(r"\s*<\|channel>thought\n?(.*?)<channel\|>", re.DOTALL)
_READ = {
    *("role", "from", "content", "value", "tool_calls", "function_call", "tool_responses"),
    *(*_SWITCHES, *_THOUGHTS),
}
_READ_OF_TOOLS = _READ | {"name", "tool_call_id"}
_REFUSED = {
    "train_detail": "parts of a text cannot be trained on by themselves; remove it",
    "refusal": "a refusal is not supported; give it as the message's content",
    "audio": "only text and images are supported",
    "images": "give them in image parts, or in a list 'images' beside the messages",
    **dict.fromkeys(
        keys.SYSTEMS, "give it in a message of the role system, or beside the messages"
    ),
    **dict.fromkeys(keys.TOOLS, "give them beside the messages"),
}


@dataclasses.dataclass
class Message:
    """What a message says, whatever the tool."""

    role: str  # system, user, assistant or tool
    content: Any  # a string or parts; an image part keeps its image. A tool's may be an object.
    trained: bool | None = None  # what its loss switch says; None: it has none
    thought: str = ""  # what an assistant thinks before it
    # Of tools, `{"type", "function": {"name", "arguments"}}`, perhaps with an `id`.
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    name: str | None = None  # of the tool that answers
    call_id: str | None = None  # of the call that it answers
    unread: tuple[str, ...] = ()  # keys that mean nothing here


def parts_of(content: Any) -> list[dict[str, Any]]:
    """The parts of a content, of which a string is one; none of what a tool answered as object."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if is_list(content) else []


def texts_of(content: Any) -> list[str]:
    """What a content says, part by part, without its images."""
    return [part["text"] for part in parts_of(content) if part["type"] == "text"]


def text_of(content: Any) -> str:
    """The same as one string."""
    return "".join(texts_of(content))


def read_messages(given: Any, name: str) -> list[Message]:
    """The messages under the key `name`, those of tools standing behind the calls they answer."""
    if not is_list(given):
        raise ValueError(f"{name!r}: expected a list of messages, found {type(given).__name__}")
    messages: list[Message] = []
    for index, message in enumerate(given):
        with naming(f"message {index}"):
            messages += map(_without_end, _read(message))
    _name_results(messages)
    return messages


def answer_of_text(text: str) -> Message:
    """An answer that is a string."""
    return _without_end(Message("assistant", text))


def _without_end(message: Message) -> Message:
    """An answer without the end of its turn, which is learnt once, as the template writes it."""
    if message.role != "assistant":
        return message
    if isinstance(message.content, str):
        return dataclasses.replace(message, content=_END.sub("", message.content))
    if is_list(message.content) and message.content and "text" in message.content[-1]:
        *parts, last = message.content
        parts.append({**last, "text": _END.sub("", last["text"])})
        return dataclasses.replace(message, content=parts)
    return message


def _read(given: Any) -> Iterator[Message]:
    if not isinstance(given, Mapping):
        raise ValueError(f"expected an object with 'role' and 'content', found {given!r:.80}")
    said = _role(given)
    for key, why in _REFUSED.items():
        if not is_empty(given.get(key)):
            raise ValueError(f"{key!r}: {why}")
    role = ROLES[said]
    key = one_of(given, ("content", "value"))
    message = Message(role, None if key is None else given[key], _switch(given, role))
    read = (_READ_OF_TOOLS if role == "tool" else _READ) | set(_REFUSED)
    message.unread = tuple(key for key in given if key not in read and not is_empty(given[key]))
    if role != "assistant":
        own = [key for key in ("tool_calls", "function_call", *_THOUGHTS) if _is_given(given, key)]
        if own:
            raise ValueError(f"{own[0]!r} stands in a {said} message; only assistants have it")
    if role == "tool":
        yield _result(message, given)
        return
    if said in _CALLING:
        message.calls, message.content = read_calls(message.content, said), ""
        if not message.calls:
            raise ValueError(f"{said}: expected a call as JSON, found nothing")
    if role == "assistant":
        message.calls += read_calls(given.get("tool_calls"), "tool_calls")
        message.calls += read_calls(given.get("function_call"), "function_call")
    if message.content is None and (message.calls or any(_is_given(given, k) for k in _THOUGHTS)):
        message.content = ""
    results = [*_split_parts(message), *_native_results(given)]
    if role == "assistant":
        _think(message, given)
        yield message
        yield from results
    else:
        is_said = message.content or not results
        if not is_said:
            results[0].unread += message.unread
        yield from results
        if is_said:
            yield message


def _role(given: Mapping[str, Any]) -> str:
    """The word for who speaks."""
    said = [given[key] for key in ("role", "from") if not is_empty(given.get(key))] or [None]
    for word in said:
        if not isinstance(word, str) or word not in ROLES:
            raise ValueError(f"there is no role {word!r:.80}; expected one of {', '.join(ROLES)}")
    if len({ROLES[word] for word in said}) > 1:
        raise ValueError(f"'role' and 'from' contradict each other: {said[0]!r}, {said[1]!r}")
    return said[0]


def _is_given(given: Mapping[str, Any], key: str) -> bool:
    return not is_empty(given.get(key))


def split_thought(text: str) -> tuple[str, str]:
    """A thought at the beginning of what a model has said, "" if there is none, and the rest."""
    said = []
    while match := _CHANNEL.match(text):
        said.append(match[1].strip("\n"))
        text = text[match.end() :]
    return "\n".join(said), text


# ---- Loss switches and thoughts.


def _flag(given: Mapping[str, Any], names: Sequence[str]) -> bool | None:
    """What switches say: 0, false: not to be learnt; 1, true: to be learnt."""
    found = {key: given[key] for key in names if not is_blank(given.get(key))}
    for key, value in found.items():
        if isinstance(value, str) or value not in (0, 1):
            raise ValueError(
                f"{key!r}: expected 0 or 1 (false or true), found {value!r:.80}; other weights are "
                "not supported"
            )
    if len({bool(value) for value in found.values()}) > 1:
        raise ValueError(f"{', '.join(map(repr, found))} contradict each other; give one of them")
    return bool(next(iter(found.values()))) if found else None


def _switch(given: Mapping[str, Any], role: str) -> bool | None:
    flag = _flag(given, _SWITCHES)
    if role != "assistant":
        # In ms-swift, whose word it is, "loss" has no effect outside assistant messages.
        if flag and _flag(given, [key for key in _SWITCHES if key != "loss"]):
            raise ValueError(f"it is to be trained on, but only assistant messages are, not {role}")
        return None
    return flag


def _think(message: Message, given: Mapping[str, Any]) -> None:
    """Takes thoughts out of the content and the keys that may hold them."""
    thoughts = [message.thought] if message.thought else []
    for key in _THOUGHTS:
        if _is_given(given, key):
            thoughts.append(text_in(given[key], repr(key)))
    content = parts_of(message.content)
    first = content[0].get("text", "") if content else ""
    said, rest = split_thought(first)
    if rest.lstrip().startswith("<|channel>") and "<channel|>" not in rest:
        raise ValueError("its thought is left open: write <channel|> between it and the answer")
    if rest != first:
        thoughts.append(said)
        is_text = isinstance(message.content, str)
        message.content = rest if is_text else parts_of(rest) * bool(rest) + content[1:]
    thoughts = list(dict.fromkeys(thought.strip("\n") for thought in thoughts if thought.strip()))
    if len(thoughts) > 1:
        raise ValueError(
            "it has two thoughts that differ, in "
            f"{', '.join(map(repr, _THOUGHTS))} or in the content; give one"
        )
    message.thought = thoughts[0] if thoughts else ""


# ---- Parts.


def _split_parts(message: Message) -> list[Message]:
    """Reads the parts of a message; thoughts and calls leave it, results become messages."""
    if isinstance(message.content, str):
        return []
    if not is_list(message.content):
        raise ValueError(
            "expected its content to be a string or a list of parts, found "
            f"{type(message.content).__name__}"
        )
    parts, results, flags, thoughts, calls = [], [], [], [], []
    for part in message.content:
        kind = part.get("type") if isinstance(part, Mapping) else "text"
        message.unread += _unread(part)
        flag = _flag(part, _SWITCHES) if isinstance(part, Mapping) else None
        if flag is not None or kind not in (*_OF_TOOL_PARTS, *THINKING_PARTS):
            flags.append(flag)
        if kind == "tool_result" and message.role == "user":
            if parts:
                raise ValueError("a tool_result stands behind a text; put it before")
            result = Message("tool", part.get("content"), call_id=part.get("tool_use_id"))
            results.append(_result(result, {key: part.get(key) for key in _OUTPUTS}))
        elif kind == "tool_use" and message.role == "assistant":
            _refuse_second(part, _TEXT_KEYS)
            call = {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
            calls += read_calls([call], "tool_use")
        elif kind in THINKING_PARTS and message.role == "assistant":
            key = one_of(part, _THINKING_KEYS)
            if key is None:
                raise ValueError(f"a {kind} part needs a string 'thinking', found {part!r:.80}")
            thought = text_in(part[key], repr(key))
            if thought.strip() and (parts or calls):
                raise ValueError(
                    "a thought stands behind what it says or calls; a turn has one thought, "
                    "before its text"
                )
            thoughts.append(thought.strip("\n"))
        else:
            read = _part(part)
            if calls and (read["type"] != "text" or read["text"].strip()):
                raise ValueError(f"a part of {read['type']} stands behind a call; put it before")
            parts.append(read)
    message.calls += calls
    message.thought = "\n".join(thought for thought in thoughts if thought.strip())
    said = {flag for flag in flags if flag is not None}
    if said and (len(set(flags)) > 1 or message.trained not in (None, *said)):
        raise ValueError("its parts differ in their loss switches; only whole messages are learnt")
    if said and message.role == "assistant":
        message.trained = said.pop()
    message.content = parts
    return results


def text_in(value: Any, what: str) -> str:
    """A text that is given as a string or as a list of parts of text."""
    if is_list(value) and all(isinstance(part, Mapping) for part in value):
        parts = [_part(part) for part in value]
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
    if not isinstance(value, str):
        raise ValueError(
            f"{what}: expected a string, found {type(value).__name__}; parts of text are taken too"
        )
    return value


def _unread(part: Any) -> tuple[str, ...]:
    """Keys of a part that mean nothing here, such as an image's `detail`."""
    if not isinstance(part, Mapping):
        return ()
    if part.get("type") in _OF_TOOL_PARTS:
        read = {"type", *_SWITCHES, *_OF_TOOL_PARTS[part["type"]]}
        return tuple(key for key in part if key not in read and not is_empty(part[key]))
    names = keys.IMAGE_KEYS if part.get("type") in keys.IMAGE_PARTS else _THINKING_KEYS
    used = first_of(part, names)
    # Data sets of Hugging Face keep the path of an image beside its bytes.
    read = {"type", *_SWITCHES, used, *(("path",) if used == "bytes" else ())}
    if names is keys.IMAGE_KEYS and is_blank(part.get(used)):
        read.add("index")
    inner = part.get(used) if names is keys.IMAGE_KEYS else None
    inner = inner if isinstance(inner, Mapping) else {}
    return tuple(
        [key for key in part if key not in read and not is_empty(part[key])]
        + [key for key in inner if key not in _OF_IMAGES and not is_empty(inner[key])]
    )


def _refuse_second(part: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses what a part of another type says under `names`; tables fill those with nulls."""
    key = first_of(part, names)
    if key is not None and not is_empty(part[key]):
        raise ValueError(f"its {part['type']} part has {key!r}; give that a part of its own")


def _part(part: Any) -> dict[str, Any]:
    """One part; an image has `image`, or perhaps the `index` of one beside the messages."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"expected each part to be an object, found {part!r:.80}")
    kind = part.get("type")
    if kind in _TEXTS:
        key = one_of(part, _TEXT_KEYS)
        _refuse_second(part, ("image", "image_url", *THINKING_PARTS))
        if key is None or not isinstance(part[key], str):
            raise ValueError(f"a text part needs a string 'text', found {part!r:.80}")
        return {"type": "text", "text": part[key]}
    if kind in keys.IMAGE_PARTS:
        _refuse_second(part, _TEXT_KEYS)
        key = first_of(part, keys.IMAGE_KEYS)
        if key is None or is_blank(part[key]):
            index = part.get("index")
            return {"type": "image"} | ({} if is_blank(index) else {"index": index})
        with naming(repr(key)):
            return {"type": "image", "image": keys.image_in(part[key])}
    if kind in ("audio", "audio_url", "input_audio", "video", "video_url"):
        raise ValueError(f"{kind!r} parts are not supported; supported: text and image")
    raise ValueError(
        f"unknown part type {kind!r:.80}; expected 'text' or 'image', or of an assistant "
        "'thinking' or 'tool_use', of a user 'tool_result'"
    )


# ---- What tools answered.


def _result(message: Message, given: Mapping[str, Any]) -> Message:
    """What a tool answered: text, parts or an object."""
    message.name = given["name"] if _is_given(given, "name") else None
    if _is_given(given, "tool_call_id"):
        message.call_id = given["tool_call_id"]
    if is_null(message.content):
        other = first_of(given, _OUTPUTS)
        if other is not None and not is_empty(given[other]):
            raise ValueError(f"what a tool answered has no 'content', and {other!r}; rename that")
        message.content = ""
    if is_list(message.content):
        message.unread += tuple(key for part in message.content for key in _unread(part))
        message.content = [_part(part) for part in message.content]
    elif isinstance(message.content, Mapping):
        message.content = without_none(message.content)
    elif not isinstance(message.content, str):
        raise ValueError(
            "expected what a tool answered to be a string, parts or an object, found "
            f"{type(message.content).__name__}"
        )
    return message


def _native_results(given: Mapping[str, Any]) -> Iterator[Message]:
    """Results that stand in the message of their calls, as Gemma 4's first template has them."""
    responses: Any = given.get("tool_responses")
    responses = [] if is_empty(responses) else responses
    for response in responses if is_list(responses) else [responses]:
        if not isinstance(response, Mapping) or "response" not in response:
            raise ValueError(
                f"'tool_responses': expected 'name' and 'response', found {response!r:.80}"
            )
        yield _result(Message("tool", response["response"]), {"name": response.get("name")})


def _name_results(messages: list[Message]) -> None:
    """Gives each result the name of the tool that was called, by its id or in their order."""
    calls: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        goes_on = message.role == "assistant" and index and messages[index - 1].role == "assistant"
        if message.role != "tool" and not goes_on:
            _refuse_open(calls, f"message {index}")
        if message.role != "tool":
            calls = calls + message.calls
        elif not calls:
            raise ValueError(f"message {index}: it answers a call, and none precedes it")
        else:
            place = _answered(calls, message)
            if place is None:
                called = ", ".join(f"{c['function']['name']} ({c.get('id')})" for c in calls)
                raise ValueError(
                    f"message {index}: it answers the call {message.name or ''} "
                    f"({message.call_id}), and those without an answer before it are: {called}"
                )
            message.name = calls.pop(place)["function"]["name"]
    if messages and messages[-1].role == "tool":
        _refuse_open(calls, "the end")


def _refuse_open(calls: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuses calls that no tool has answered where the conversation goes on."""
    if calls:
        call = calls[0]
        raise ValueError(
            f"{where}: the call {call['function']['name']} ({call.get('id')}) before it has no "
            "answer; add a message of its tool, one for each call, or remove the call"
        )


def _answered(calls: Sequence[Mapping[str, Any]], result: Message) -> int | None:
    """Which call a result answers: by its id and name, as far as both have them; None: none."""
    for place, call in enumerate(calls):
        same_id = result.call_id is None or call.get("id", result.call_id) == result.call_id
        if same_id and result.name in (None, call["function"]["name"]):
            return place
    return None


# ---- Messages that follow each other.


def join(messages: Sequence[Message]) -> list[Message]:
    """Assistant messages that follow each other made one turn, a newline between their texts."""
    result: list[Message] = []
    for index, message in enumerate(messages):
        last = result[-1] if result else None
        if last is None or not last.role == message.role == "assistant":
            result.append(dataclasses.replace(message))
            continue
        if (last.trained is False) != (message.trained is False):
            raise ValueError(
                f"message {index}: it follows an assistant message, and one of the two is to be "
                "learnt and one is not; they are one turn: give both the same loss switch"
            )
        if message.thought and last.content:
            raise ValueError(
                f"message {index}: it has a thought and follows an assistant message that has "
                "spoken; a turn has one thought, before its text"
            )
        last.thought = "\n".join(filter(None, (last.thought, message.thought)))
        last.content = _joined(last.content, message.content)
        last.calls = last.calls + message.calls
        last.unread += message.unread
    return result


def _joined(one: Any, other: Any) -> Any:
    if not one or not other:
        return one or other
    if isinstance(one, str) and isinstance(other, str):
        return f"{one.rstrip()}\n{other.lstrip()}"
    one, other = parts_of(one), parts_of(other)
    if one[-1]["type"] == other[0]["type"] == "text":
        text = _joined(one.pop()["text"], other[0]["text"])
        other[0] = {"type": "text", "text": text}
    return one + other


# ---- Calls and definitions of tools.


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, finite=True)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: expected JSON, found {value!r:.80} ({error})") from error


def read_calls(given: Any, what: str) -> list[dict[str, Any]]:
    """Calls of tools, whose arguments are an object or JSON of one."""
    if is_empty(given) or is_empty(read := _parsed(given, what)):
        return []
    result = []
    for written in read if is_list(read) else [read]:
        call = _parsed(written, what)
        function = call.get("function") if isinstance(call, Mapping) else None
        function = call if function is None else function
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{what}: expected calls with a 'name', found {call!r:.80}")
        key = one_of(function, _ARGUMENTS)
        others = [name for name in function if name not in (*_ARGUMENTS, *_OF_CALLS)]
        if key is None and any(not is_empty(function[name]) for name in others):
            raise ValueError(f"{what}: a call has no 'arguments', and has {others}; rename them")
        given_arguments = None if key is None or is_empty(function[key]) else function[key]
        arguments = _parsed(given_arguments, f"{what}: {key!r}")
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, Mapping):
            raise ValueError(
                f"{what}: expected 'arguments' to be an object or JSON of one, found "
                f"{arguments!r:.80}"
            )
        # JSON in a string has nulls of its own.
        if not any(isinstance(v, str) for v in (given, written, given_arguments)):
            arguments = without_none(arguments)
        for _, value in keys.walk(arguments):  # JSON cannot hold them.
            if isinstance(value, float | np.floating) and np.isinf(value):
                raise ValueError(f"{what}: {key!r}: expected finite numbers, found {value!r}")
        identity = {} if is_empty(call.get("id")) else {"id": call["id"]}
        function = {"name": function["name"], "arguments": dict(arguments)}
        result.append(identity | {"type": "function", "function": function})
    return result


def read_tools(given: Any, what: str) -> list[dict[str, Any]] | None:
    """Definitions of tools, as OpenAI and transformers write them; None for none.

    Args:
        given: a list of definitions, objects or JSON, or JSON of the list; bare functions and
            Anthropic's `input_schema` are taken too.
        what: the key's name, for errors.
    """
    given = _parsed(given, repr(what))
    if is_empty(given):
        return None
    result = []
    for tool in given if is_list(given) else [given]:
        tool = without_none(_parsed(tool, repr(what)))
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{what!r}: expected definitions with a 'name', found {tool!r:.80}")
        function = {key: value for key, value in function.items() if key != "type"} | {
            "description": function.get("description", "")
        }
        parameters = function.pop("input_schema", function.get("parameters"))
        if parameters is not None:
            function["parameters"] = _parsed(parameters, f"{what!r}: 'parameters'")
        result.append({"type": "function", "function": function})
    return result


def without_none(value: Any) -> Any:
    """An object without its nulls, at every depth: tables give every object the keys of all."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: without_none(part) for key, part in value.items() if not is_null(part)}
    return [without_none(part) for part in value] if is_list(value) else value
