# SPDX-License-Identifier: Apache-2.0
"""The names that Tunix's own Gemma 4 has for the fields of a configuration.

Each reads and writes a field of ours, or refuses a value that has no counterpart. The order of
assignments is the caller's, so what contradicts itself is found when a model is built.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from absl import logging

from .parts import DEFAULT_ROPE, AttentionType

# Where a name of Tunix's is another name of a field of ours, and no more.
SAME = {
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "embed_dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "moe_dense_hidden_dim": "intermediate_size",
    "final_logit_softcap": "final_logit_softcapping",
    "sliding_window_size": "sliding_window",
    "per_layer_input_dim": "hidden_size_per_layer_input",
    "global_key_size": "global_head_dim",
    "k_eq_v_global": "attention_k_eq_v",
    "enable_moe": "enable_moe_block",
    "num_experts_per_tok": "top_k_experts",
    "expert_dim": "moe_intermediate_size",
}
# The others, in an order in which each finds settled what it depends on.
DERIVED = (
    *("num_layers", "num_embed", "attention_pattern", "frac_shared_layers", "num_global_kv_heads"),
    *("override_kv_shared_ffw_hidden", "local_base_frequency", "global_base_frequency"),
    *("local_rope_proportion", "global_rope_proportion"),
    *("local_scale_factor", "global_scale_factor"),
)
# A configuration that gives all of these, and not ours, is Tunix's, whose defaults then hold.
_REQUIRED = frozenset(
    {"num_layers", "num_embed", "embed_dim", "hidden_dim", "num_heads", "head_dim", "num_kv_heads"}
)
_DEFAULTS = {"final_logit_softcap": 30.0, "per_layer_input_dim": 0, "attention_pattern": None}
# Names of Tunix's main branch that have no field of that form here.
_ELSEWHERE = {
    "vision_encoder": "the vision tower is vision_config, a tunix_gemma4.VisionConfig",
    "audio_encoder": "there is no audio tower",
}
_Kind = TypeVar("_Kind", bound=type)
_SLIDING, _FULL = "sliding_attention", "full_attention"
_KINDS = {AttentionType.LOCAL_SLIDING: _SLIDING, AttentionType.GLOBAL: _FULL}


def _alias(field: str) -> property:
    """A read and write property that is another name of `field`."""
    return property(
        lambda self: getattr(self, field),
        lambda self, value: setattr(self, field, value),
        doc=f"Tunix's name of `{field}`.",
    )


def _of_rope(kind: str, key: str, default: float, only: float | None = None) -> property:
    """`key` of the rotary embedding of one kind of layer; `only` is all that it may be."""

    def read(self: Any) -> float:
        if only is not None:
            return only
        return self.rope_parameters.get(kind, DEFAULT_ROPE[kind]).get(key, default)

    def write(self: Any, value: float) -> None:
        where = f"rope_parameters[{kind!r}]"
        if only is not None and value != only:
            raise ValueError(
                f"{where}: rope_type 'default' of a config.json has no {key!r}, so it is {only}; "
                f"found {value!r}"
            )
        if key == "factor" and not value >= 1:
            raise ValueError(f"{where}: factor: expected at least 1, found {value!r}")
        if value != read(self):
            self.rope_parameters.setdefault(kind, dict(DEFAULT_ROPE[kind]))[key] = value

    return property(read, write)


class TunixNames:
    """Tunix's names as properties, and an end to assigning what does not exist."""

    # Of the fields that the properties read, those that none sets.
    num_key_value_heads: int
    attention_k_eq_v: bool
    intermediate_size: int

    def __setattr__(self, name: str, value: Any) -> None:
        known = _settable(type(self))
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            why = _ELSEWHERE.get(name) or (f"did you mean {near[0]}?" if near else "")
            message = f"ModelConfig has no field {name!r}: assigning it would change nothing"
            raise AttributeError(f"{message}; {why}" if why else message)
        if name == "shd_config" and value is not None:
            check_sharding(value)
        super().__setattr__(name, value)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers; assigning cuts the stack and its sharing to fit."""
        return self.num_hidden_layers

    @num_layers.setter
    def num_layers(self, value: int) -> None:
        if not 1 <= value <= self.num_hidden_layers:
            raise ValueError(
                f"num_layers: expected 1 to {self.num_hidden_layers} of the existing layers, "
                f"found {value}; build a new ModelConfig for a deeper model"
            )
        first_shared = self.num_hidden_layers - self.num_kv_shared_layers
        self.num_hidden_layers = value
        self.layer_types = self.layer_types[:value]
        self.num_kv_shared_layers = max(0, value - first_shared)

    @property
    def num_embed(self) -> int:
        """Rows of the embedding; assigning changes the per-layer embeddings' too, as in Tunix."""
        return self.vocab_size

    @num_embed.setter
    def num_embed(self, value: int) -> None:
        self.vocab_size = self.vocab_size_per_layer_input = value

    @property
    def attention_pattern(self) -> tuple[AttentionType, ...]:
        """`layer_types`; assigning repeats a pattern over the layers, None is five to one."""
        kinds = {word: kind for kind, word in _KINDS.items()}
        return tuple(kinds[word] for word in self.layer_types)

    @attention_pattern.setter
    def attention_pattern(self, value: Sequence[Any] | None) -> None:
        if value is None:
            value = [AttentionType.LOCAL_SLIDING] * 5 + [AttentionType.GLOBAL]
        # Members of Tunix's own enumeration have the same names.
        names: list[Any] = [getattr(kind, "name", kind) for kind in value]
        kinds = {kind.name: word for kind, word in _KINDS.items()}
        unknown = [name for name in names if name not in kinds]
        if unknown or not names:
            raise ValueError(
                f"attention_pattern: expected members of AttentionType ({', '.join(kinds)}), found "
                f"{unknown[0] if unknown else value!r}; strings are for layer_types"
            )
        count = self.num_hidden_layers
        self.layer_types = [kinds[names[index % len(names)]] for index in range(count)]

    @property
    def frac_shared_layers(self) -> float:
        """`num_kv_shared_layers` as a share of all layers."""
        return self.num_kv_shared_layers / self.num_hidden_layers

    @frac_shared_layers.setter
    def frac_shared_layers(self, value: float) -> None:
        if not 0 <= value < 1:
            raise ValueError(f"frac_shared_layers: expected from 0 to below 1, found {value!r}")
        count = self.num_hidden_layers
        # Tunix's rule, but for rounding: 20 / 35 of 35 layers are 20.
        self.num_kv_shared_layers = count - math.floor(count - value * count + 1e-6)

    @property
    def num_global_kv_heads(self) -> int | None:
        """`num_global_key_value_heads`, which full layers have where their keys are values."""
        return self.num_global_key_value_heads

    @num_global_kv_heads.setter
    def num_global_kv_heads(self, value: int | None) -> None:
        if value not in (None, self.num_key_value_heads) and not self.attention_k_eq_v:
            raise ValueError(
                f"num_global_kv_heads: found {value!r}, but full layers have heads of their own "
                "only with k_eq_v_global (attention_k_eq_v); set that first"
            )
        self.num_global_key_value_heads = value

    @property
    def override_kv_shared_ffw_hidden(self) -> int | None:
        """Width of the MLP in layers that share keys and values, if `use_double_wide_mlp`."""
        return 2 * self.intermediate_size if self.use_double_wide_mlp else None

    @override_kv_shared_ffw_hidden.setter
    def override_kv_shared_ffw_hidden(self, value: int | None) -> None:
        if value not in (None, self.intermediate_size, 2 * self.intermediate_size):
            raise ValueError(
                "override_kv_shared_ffw_hidden: expected None, hidden_dim or twice hidden_dim "
                f"({2 * self.intermediate_size}; here use_double_wide_mlp), found {value!r}"
            )
        self.use_double_wide_mlp = value == 2 * self.intermediate_size

    local_base_frequency = _of_rope(_SLIDING, "rope_theta", 10_000.0)
    global_base_frequency = _of_rope(_FULL, "rope_theta", 1_000_000.0)
    local_rope_proportion = _of_rope(_SLIDING, "partial_rotary_factor", 1.0, only=1.0)
    global_rope_proportion = _of_rope(_FULL, "partial_rotary_factor", 1.0)
    local_scale_factor = _of_rope(_SLIDING, "factor", 1.0, only=1.0)
    global_scale_factor = _of_rope(_FULL, "factor", 1.0)


for _name, _field in SAME.items():
    setattr(TunixNames, _name, _alias(_field))


@functools.cache
def _settable(kind: type) -> frozenset[str]:
    """Fields, and properties that can be written."""
    members = inspect.getmembers(kind, lambda member: isinstance(member, property))
    properties = {name for name, member in members if member.fset is not None}
    return frozenset({field.name for field in dataclasses.fields(kind)} | properties)


def takes_tunix_names(kind: _Kind) -> _Kind:
    """Lets the constructor of a configuration, and with it `dataclasses.replace`, take them too."""
    own = kind.__init__

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        if fields.keys() >= _REQUIRED and "hidden_size" not in fields:
            fields = _DEFAULTS | fields
        later = {name: fields.pop(name) for name in DERIVED if name in fields}
        for name in SAME.keys() & fields.keys():
            fields[SAME[name]] = fields.pop(name)
        if "vision_config" in fields:
            fields["tower_config"] = fields.pop("vision_config")
        if "num_layers" in later:
            fields.setdefault("num_hidden_layers", later["num_layers"])
        own(self, *args, **fields)
        for name, value in later.items():
            setattr(self, name, value)
        if later:
            self.validate()

    kind.__init__ = __init__
    return kind


def is_sharding(value: Any) -> bool:
    """Whether `value` is a `ShardingConfig` of one of Tunix's models."""
    default = getattr(type(value), "get_default_sharding", None)
    return dataclasses.is_dataclass(value) and callable(default)


def check_sharding(value: Any) -> None:
    """Takes Tunix's default shardings, which say what is done here anyway.

    Raises:
        ValueError: for another, whose axes would not be followed.
    """
    if is_sharding(value):
        default = type(value).get_default_sharding
        if value == default():
            return
        if value == default(True):
            logging.warning(
                "sharding_config: weights are sharded over fsdp here for sampling too; a mesh "
                "without that axis keeps them whole"
            )
            return
    raise ValueError(
        "sharding_config (shd_config): expected a ShardingConfig with Tunix's defaults, found "
        f"{value!r}. Where parameters lie follows from the axes of the mesh; see "
        "docs/how-to/shard.md"
    )
