# SPDX-License-Identifier: Apache-2.0
"""The pieces of a model's configuration: remat, one decoder layer, the vision tower."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Literal


class RematConfig(enum.Enum):
    """What is recomputed in the backward pass. The values are Tunix's."""

    NONE = 1
    BLOCK = 2  # the attention of every layer
    DECODER = 3  # every decoder layer

    @classmethod
    def parse(cls, value: RematConfig | int | str) -> RematConfig:
        """Accepts a member, Tunix's integers, or a name in any case.

        Any enumeration with the same member names works, so that Tunix's own may be passed.
        """
        if isinstance(value, enum.Enum):
            value = value.name
        try:
            return cls[value.upper()] if isinstance(value, str) else cls(value)
        except (KeyError, ValueError):
            names = ", ".join(f"{member.name.lower()} ({member.value})" for member in cls)
            raise ValueError(f"remat_config: expected one of {names}, found {value!r}") from None


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
    kind: Literal["sliding", "full"]
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
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default":
            raise ValueError(
                f"vision_config.rope_parameters.rope_type: found {rope_type!r}; supported: "
                "'default', 'axial'"
            )
        theta = (self.rope_parameters or {}).get("rope_theta", 100.0)
        if not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
            raise ValueError(
                "vision_config.rope_parameters.rope_theta: expected a positive number, found "
                f"{theta!r}"
            )
        if self.head_dim % 4:
            raise ValueError(
                f"vision_config.head_dim: expected a multiple of 4, found {self.head_dim}"
            )
