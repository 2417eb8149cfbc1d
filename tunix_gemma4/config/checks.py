# SPDX-License-Identifier: Apache-2.0
"""Refusing configurations that contradict themselves or ask for what is not supported."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "splash", "triton")
KINDS = {"sliding_attention": "sliding", "full_attention": "full"}
DEFAULT_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}

# Smallest value of whole numbers that may be less than 1, and largest of those that loops run to.
_AT_LEAST_0 = {
    "num_kv_shared_layers", "hidden_size_per_layer_input", "global_head_dim",
    "num_global_key_value_heads", "num_experts", "top_k_experts", "moe_intermediate_size",
    "position_embedding_size",
}  # fmt: skip
_MOST_LAYERS = 10_000
_LARGEST = 2**31 - 1


def check_fields(cls: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ValueError for a value that is not of its field's type, or out of range.

    Args:
        cls: the dataclass; what its annotations say is what is checked.
        values: of some of its fields.
        prefix: of the names in messages.
    """
    annotations = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, value in values.items():
        annotation = annotations.get(name, "Any")
        if value is None and annotation.endswith("| None"):
            continue
        wanted = complaint(name, annotation.removesuffix(" | None"), value)
        if wanted is not None:
            null = " or null" if annotation.endswith("| None") else ""
            raise ValueError(f"{prefix}{name}: expected {wanted}{null}, found {value!r}")


def complaint(name: str, annotation: str, value: Any) -> str | None:
    """What was expected in place of `value`, or None."""
    if annotation in ("int", "int | list[int]"):
        low = 0 if name in _AT_LEAST_0 or name.endswith("_token_id") else 1
        high = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
        several = annotation != "int" and isinstance(value, (list, tuple)) and len(value) > 0
        if all(_is_whole(x) and low <= x <= high for x in (value if several else [value])):
            return None
        return f"a whole number from {low} to {high}" + (", or several" * (annotation != "int"))
    if annotation == "float":
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return None if number and 0 < value < math.inf else "a positive number"
    if annotation == "bool":
        return None if isinstance(value, bool) else "true or false"
    if annotation == "str":
        return None if isinstance(value, str) else "a string"
    if annotation == "list[str]":
        of_strings = isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value)
        return None if of_strings else "a list of strings"
    if annotation == "dict":
        return None if isinstance(value, Mapping) else "an object"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def refuse_unsupported(
    model_type: str, text: Mapping[str, Any], vision: Mapping[str, Any] | None
) -> None:
    """Raises for settings whose maths this package does not have."""
    plain = {
        "attention_bias": (False, None),
        "attention_dropout": (0.0, None),
        "hidden_activation": ("gelu_pytorch_tanh",),
    }
    sections = {"text_config": (text, plain)}
    if model_type == "gemma4":
        sections["vision_config"] = (vision or {}, plain)
    else:
        # transformers' class has neither: what it writes of them is what it was given.
        absent = {"hidden_size_per_layer_input": (0, None), "enable_moe_block": (False, None)}
        sections["text_config"] = (text, plain | absent)
    for where, (settings, supported) in sections.items():
        for name, values in supported.items():
            if name in settings and settings[name] not in values:
                raise ValueError(
                    f"{where}.{name}: found {settings[name]!r}; supported: {values[0]!r}"
                )
