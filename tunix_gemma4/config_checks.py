# SPDX-License-Identifier: Apache-2.0
"""Refusing configurations that contradict themselves or ask for what is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ModelConfig

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
        expected = DEFAULT_ROPE[layer_type]["rope_type"]
        if rope is None or rope.get("rope_type") != expected or "rope_theta" not in rope:
            raise ValueError(
                f"rope_parameters[{layer_type!r}]: expected rope_type {expected!r} with a "
                f"rope_theta, found {rope!r}"
            )


def _validate_sizes(config: ModelConfig) -> None:
    for spec in config.layers:
        if config.num_attention_heads % spec.num_kv_heads:
            raise ValueError(
                f"num_attention_heads: {config.num_attention_heads} is not divisible by the "
                f"{spec.num_kv_heads} key/value heads of layer {spec.index} ({spec.kind})"
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
    if not config.text_only and config.vision_config is None:
        raise ValueError("text_only=False: this config has no vision_config; use text_only=True")
    if config.vision_config is not None:
        config.vision_config.validate()


def refuse_unsupported_text(text: Mapping[str, Any]) -> None:
    """Raises for settings whose maths this package does not have."""
    supported = {
        "attention_bias": (False, None),
        "attention_dropout": (0.0, None),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "tie_word_embeddings": (True,),
    }
    for name, values in supported.items():
        if name in text and text[name] not in values:
            raise ValueError(f"text_config.{name}: found {text[name]!r}; supported: {values[0]!r}")
