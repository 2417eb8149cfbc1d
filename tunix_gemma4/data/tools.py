# SPDX-License-Identifier: Apache-2.0
"""Calls and definitions of tools in the words of any tool, objects or JSON of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config.json_files import parse_json
from .keys import is_empty, is_list, is_null, one_of

# Words for the arguments of a call, and what else a call has.
_ARGUMENTS = ("arguments", "parameters", "input")
_OF_CALLS = ("name", "id", "type", "index")


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
        _refuse_infinite(arguments, f"{what}: {key!r}")
        # JSON in a string has nulls of its own.
        if not any(isinstance(v, str) for v in (given, written, given_arguments)):
            arguments = without_none(arguments)
        identity = {} if is_empty(call.get("id")) else {"id": call["id"]}
        function = {"name": function["name"], "arguments": dict(arguments)}
        result.append(identity | {"type": "function", "function": function})
    return result


def _refuse_infinite(value: Any, what: str) -> None:
    """Raises ValueError for an infinite number in an object, which JSON cannot hold."""
    if isinstance(value, float | np.floating) and np.isinf(value):
        raise ValueError(f"{what}: expected finite numbers, found {value!r}")
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | np.ndarray) or is_list(value):
        for part in inner:
            _refuse_infinite(part, what)


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
