# SPDX-License-Identifier: Apache-2.0
"""Refusing configurations that contradict themselves or ask for what is not supported."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .source import dtype_of

if TYPE_CHECKING:
    from . import ModelConfig

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
        wanted = _complaint(name, annotation.removesuffix(" | None"), value)
        if wanted is not None:
            null = " or null" if annotation.endswith("| None") else ""
            raise ValueError(f"{prefix}{name}: expected {wanted}{null}, found {value!r}")


def _complaint(name: str, annotation: str, value: Any) -> str | None:
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


def validate(config: ModelConfig) -> None:
    """Raises ValueError for what is contradictory or unsupported, naming field and value."""
    count = config.num_hidden_layers
    if len(config.layer_types) != count:
        raise ValueError(
            f"layer_types: expected {count} entries (num_hidden_layers), "
            f"found {len(config.layer_types)}"
        )
    for index, layer_type in enumerate(config.layer_types):
        if layer_type not in KINDS:
            raise ValueError(
                f"layer_types[{index}]: found {layer_type!r}; supported: "
                + ", ".join(map(repr, KINDS))
            )
    if config.use_bidirectional_attention not in (None, "vision"):
        raise ValueError(
            "use_bidirectional_attention: found "
            f"{config.use_bidirectional_attention!r}; supported: None, 'vision'"
        )
    _validate_sharing(config)
    _validate_rope(config)
    _validate_sizes(config)
    config.remat  # noqa: B018  raises for an unknown spelling
    _validate_attention(config)


def _validate_attention(config: ModelConfig) -> None:
    if config.attention_implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"attention_implementation: found {config.attention_implementation!r}; supported: "
            + ", ".join(map(repr, ATTENTION_IMPLEMENTATIONS))
        )
    if config.use_flash_attention and config.attention_implementation == "xla":
        raise ValueError(
            "use_flash_attention: found True with attention_implementation='xla', which "
            "contradict each other; leave one of them at its default"
        )
    if config.flash_attention_block_size < 128:
        raise ValueError(
            "flash_attention_block_size: expected at least 128, found "
            f"{config.flash_attention_block_size}"
        )


def _validate_sharing(config: ModelConfig) -> None:
    shared, count = config.num_kv_shared_layers, config.num_hidden_layers
    if not 0 <= shared < count:
        raise ValueError(
            f"num_kv_shared_layers: expected 0 to {count - 1} (num_hidden_layers - 1), "
            f"found {shared}"
        )
    sources = config.layer_types[: count - shared]
    for index in range(count - shared, count):
        if config.layer_types[index] not in sources:
            raise ValueError(
                f"num_kv_shared_layers: with {shared} shared layers, layer {index} "
                f"({config.layer_types[index]}) has no unshared layer of its kind to read from"
            )


def _validate_rope(config: ModelConfig) -> None:
    for layer_type in sorted(set(config.layer_types)):
        rope = config.rope_parameters.get(layer_type)
        name = f"rope_parameters[{layer_type!r}]"
        expected = DEFAULT_ROPE[layer_type]["rope_type"]
        if (
            not isinstance(rope, Mapping)
            or rope.get("rope_type") != expected
            or "rope_theta" not in rope
        ):
            raise ValueError(
                f"{name}: expected rope_type {expected!r} with a rope_theta, found {rope!r}"
            )
        for key in ("rope_theta", "factor", "partial_rotary_factor"):
            wanted = _complaint(key, "float", rope.get(key, 1.0))
            if key == "partial_rotary_factor" and wanted is None and rope.get(key, 1.0) > 1:
                wanted = "at most 1"
            if wanted is not None:
                raise ValueError(f"{name}.{key}: expected {wanted}, found {rope[key]!r}")


def _validate_sizes(config: ModelConfig) -> None:
    for spec in config.layers:
        if config.num_attention_heads % spec.num_kv_heads:
            raise ValueError(
                f"num_attention_heads: {config.num_attention_heads} is not divisible by the "
                f"{spec.num_kv_heads} key/value heads of layer {spec.index} ({spec.kind})"
            )
        if spec.head_dim % 2:
            raise ValueError(
                f"head_dim: expected an even number, found {spec.head_dim} in layer {spec.index} "
                f"({spec.kind})"
            )
    if config.enable_moe_block:
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            if not getattr(config, name):
                raise ValueError(
                    f"{name}: enable_moe_block needs it, found {getattr(config, name)!r}"
                )
        if config.top_k_experts > config.num_experts:
            raise ValueError(
                f"top_k_experts: expected at most num_experts ({config.num_experts}), "
                f"found {config.top_k_experts}"
            )
    if not config.text_only and config.model_type == "gemma4_unified":
        raise ValueError(
            "text_only=False: model_type 'gemma4_unified' (Gemma 4 12B) is supported for text "
            "only so far; images are supported for model_type 'gemma4' (E2B, E4B, 26B-A4B, 31B)"
        )
    if not config.text_only and config.tower_config is None:
        raise ValueError("text_only=False: this config has no vision_config; use text_only=True")
    if config.tower_config is not None:
        config.tower_config.validate()


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


def refuse_float16(config: ModelConfig) -> None:
    """Raises ValueError for a model that would compute in it: its range is too small for Gemma."""
    if config.dtype.name != "float16":
        return
    key, found = dtype_of(config.source)
    directory, name = config.source_directory, str(found).removeprefix("torch.")
    where = f"{directory}/config.json: {key}" if directory and name == "float16" else "dtype"
    raise ValueError(
        f"{where}: a model computes in bfloat16 or float32, found float16. Set dtype to one of "
        "these, there or for the run; weights may be stored in float16"
    )


def refuse_ids_beyond(where: str, ids: Mapping[str, int], config: ModelConfig) -> None:
    """Raises ValueError for tokens that have no row in the embedding.

    Args:
        where: they come from, for the message.
        ids: by token.
        config: of the model that would look them up.
    """
    rows = config.rows_of_embedding
    beyond = {token: index for token, index in ids.items() if index >= rows}
    if beyond:
        token, index = max(beyond.items(), key=lambda item: item[1])
        raise ValueError(
            f"{where}: {len(beyond)} tokens have no row in the embedding, the last of them "
            f"{token!r} with id {index}: there are {rows} rows (vocab_size). Resize it first "
            "(transformers: model.resize_token_embeddings(len(tokenizer)), then save_pretrained), "
            "or take the tokens out of the tokenizer"
        )
