# SPDX-License-Identifier: Apache-2.0
"""The pieces of a model's configuration, and refusing values that are none or not supported."""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any, Literal

Kind = Literal["sliding", "full"]


class RematConfig(enum.Enum):
    """What is recomputed in the backward pass. The values are Tunix's."""

    NONE = 1
    BLOCK = 2  # the attention of every layer
    DECODER = 3  # every decoder layer

    @classmethod
    def parse(cls, value: RematConfig | int | str, name: str = "remat_config") -> RematConfig:
        """Accepts a member, Tunix's integers, or a name in any case.

        Any enumeration with the same member names works, so that Tunix's own may be passed.
        `name` is for messages.
        """
        if isinstance(value, enum.Enum):
            value = value.name
        try:
            return cls[value.upper()] if isinstance(value, str) else cls(value)
        except (KeyError, ValueError):
            names = ", ".join(f"{member.name.lower()} ({member.value})" for member in cls)
            raise ValueError(f"{name}: expected one of {names}, found {value!r}") from None


class AttentionType(enum.Enum):
    """The kinds of attention by Tunix's names and values."""

    GLOBAL = 1
    LOCAL_SLIDING = 2


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One decoder layer, settled.

    Attributes:
        index: position in the stack.
        kind: "sliding" or "full" attention.
        head_dim: size of a head, H.
        num_kv_heads: key/value heads, K.
        window: tokens a query sees, itself included; None where there is no window.
        rope_theta: wavelength base of the rotary embedding.
        rope_fraction: share of the head that rotates.
        rope_factor: divisor of the rotary frequencies.
        mlp_dim: width of the dense MLP, F; doubled where K/V are reused by double-wide models.
        k_eq_v: values are the raw key projection; the layer has no `v_proj`.
        kv_from: layer whose keys and values this one reads; its own index if it computes them.
        moe: the layer has experts beside its dense MLP.
    """

    index: int
    kind: Kind
    head_dim: int
    num_kv_heads: int
    window: int | None
    rope_theta: float
    rope_fraction: float
    rope_factor: float
    mlp_dim: int
    k_eq_v: bool
    kv_from: int
    moe: bool

    @property
    def shares_kv(self) -> bool:
        """Whether the layer reads another layer's keys and values."""
        return self.kv_from != self.index


@dataclasses.dataclass(slots=True)
class VisionConfig:
    """The vision tower of E2B, E4B, 26B-A4B and 31B. Field names are HF's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    pooling_kernel_size: int = 3
    patch_size: int = 16
    position_embedding_size: int = 10_240
    use_clipped_linears: bool = False
    standardize: bool = False

    @property
    def rope_theta(self) -> float:
        """Wavelength base of the two-dimensional rotary embedding."""
        return float((self.rope_parameters or {}).get("rope_theta", 100.0))

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: `3 * patch_size ** 2`."""
        return 3 * self.patch_size**2

    def validate(self) -> None:
        """Raises ValueError for sizes that no tower can have."""
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                "vision_config.num_key_value_heads: expected num_attention_heads "
                f"({self.num_attention_heads}), found {self.num_key_value_heads}; "
                "grouped vision attention is not supported"
            )
        rope, where = self.rope_parameters or {}, "vision_config.rope_parameters"
        if rope.get("rope_type", "default") != "default":
            found = rope["rope_type"]
            raise ValueError(f"{where}.rope_type: found {found!r}; supported: 'default', 'axial'")
        theta = rope.get("rope_theta", 100.0)
        if not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
            raise ValueError(f"{where}.rope_theta: expected a positive number, found {theta!r}")
        size = self.head_dim
        if size % 4:
            raise ValueError(f"vision_config.head_dim: expected a multiple of 4, found {size}")


ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "splash", "triton")
KINDS: dict[str, Kind] = {"sliding_attention": "sliding", "full_attention": "full"}
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
# What is of one class: that, and what it is called.
_PLAIN = {"bool": (bool, "true or false"), "str": (str, "a string"), "dict": (Mapping, "an object")}


def check_fields(cls: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ValueError for a value that is not of its field's type, or out of range.

    What the annotations of the dataclass `cls` say is checked, of the fields that have `values`.
    Names in messages begin with `prefix`.
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
        values: Any = value if several else [value]
        if all(_is(numbers.Integral, x) and low <= x <= high for x in values):
            return None
        return f"a whole number from {low} to {high}" + (", or several" * (annotation != "int"))
    if annotation == "float":
        positive = _is(numbers.Real, value) and 0 < value < math.inf
        return None if positive else "a positive number"
    if annotation == "list[str]":
        of_strings = isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value)
        return None if of_strings else "a list of strings"
    kind, wanted = _PLAIN.get(annotation, (object, None))
    return None if isinstance(value, kind) else wanted


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def require_one_of(name: str, value: Any, supported: Collection[Any]) -> None:
    """Raises ValueError for a value that is none of those supported."""
    if value not in supported:
        words = ", ".join(map(repr, supported))
        raise ValueError(f"{name}: found {value!r}; supported: {words}")


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
            if settings.get(name, values[0]) not in values:
                require_one_of(f"{where}.{name}", settings[name], values[:1])
