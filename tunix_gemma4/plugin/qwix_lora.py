# SPDX-License-Identifier: Apache-2.0
"""`qwix.apply_lora_to_model` with Tunix's names of projections, as its notebooks call it."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import qwix
from flax import nnx

from ..lora.targets import as_regex, is_tunix_pattern, linears, require_reached, resolve
from ..model.gemma4 import Gemma4Model


def wrap_apply_lora_to_model(original: Callable) -> Callable:
    """A Gemma 4's projections under Tunix's names too; a pattern that reaches nothing is refused.

    The adapters are Qwix's own either way.
    """

    @functools.wraps(original)
    def apply_lora_to_model(model: Any, provider: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(model, Gemma4Model) and isinstance(provider, qwix.LoraProvider)):
            return original(model, provider, *args, **kwargs)
        rules = provider._rules  # Qwix offers no other way to them.
        translated = copy.copy(provider)
        translated._rules = [_in_our_names(model, rule) for rule in rules]
        result = original(model, translated, *args, **kwargs)
        spellings = _adapted(result)
        for rule in rules:
            if isinstance(rule, qwix.LoraRule) and not is_tunix_pattern(rule.module_path):
                what = f"module_path={rule.module_path!r}"
                require_reached(what, rule.module_path, spellings)
        return result

    return apply_lora_to_model


def _in_our_names(model: Gemma4Model, rule: Any) -> Any:
    if not is_tunix_pattern(rule.module_path):
        return rule
    names = resolve(model, rule.module_path)
    return dataclasses.replace(rule, module_path=as_regex(names).replace(r"\.", "/"))


def _adapted(model: Gemma4Model) -> dict[str, list[str]]:
    """Of every projection, by dotted name, its path as Qwix spells it, if it carries an adapter."""
    state = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    reached = {".".join(map(str, path[:-1])) for path, _ in state}
    names = dict.fromkeys([*linears(model), *sorted(reached)])
    return {name: [name.replace(".", "/")] if name in reached else [] for name in names}
