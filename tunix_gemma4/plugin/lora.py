# SPDX-License-Identifier: Apache-2.0
"""Adapters as Tunix asks for them: `lora_config` sections, and Qwix as its notebooks call it.

The names of projections themselves (`q_einsum`, `kv_einsum`, ...) are understood by `apply_lora`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import qwix
from flax import nnx

from ..lora import LoraConfig
from ..lora.targets import as_regex, is_tunix_pattern, linears, require_reached, resolve
from ..model.gemma4 import Gemma4Model
from .hooks import around

_FIELDS = {"module_path": "targets", "rank": "rank", "alpha": "alpha", "tile_size": "tile_size"}
_QTYPE = "weight_qtype"


def lora_config(section: Mapping[str, Any]) -> LoraConfig:
    """`LoraConfig` of a `lora_config` section of a Tunix run configuration.

    It has `module_path`, `rank` and `alpha`, and for QLoRA `weight_qtype` and `tile_size`.

    Raises:
        ValueError: for keys or values that have no counterpart.
    """
    unknown = section.keys() - _FIELDS.keys() - {_QTYPE}
    if unknown:
        raise ValueError(
            f"lora_config: unknown {', '.join(sorted(unknown))}; known are "
            f"{', '.join([*_FIELDS, _QTYPE])}"
        )
    missing = {"module_path", "rank", "alpha"} - section.keys()
    if missing:
        raise ValueError(f"lora_config: {', '.join(sorted(missing))} missing")
    fields: dict[str, Any] = {
        ours: section[theirs] for theirs, ours in _FIELDS.items() if theirs in section
    }
    qtype = section.get(_QTYPE)
    if qtype is not None and qtype != "nf4":
        try:
            qtype = jnp.dtype(qtype).name
        except TypeError as error:
            raise ValueError(f"lora_config: {_QTYPE} {qtype!r} is no dtype") from error
    fields["quantize"] = qtype
    return LoraConfig(**fields)


@around
def wrap_apply_lora_to_model(original, model: Any, provider: Any, *args: Any, **kwargs: Any) -> Any:
    """Tunix's names of projections reach ours; a pattern that reaches nothing is refused.

    The adapters are Qwix's own either way.
    """
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
