# SPDX-License-Identifier: Apache-2.0
"""Tunix's `lora_config` sections, read as ours.

The names of projections themselves (`q_einsum`, `kv_einsum`, ...) are understood by `apply_lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ..lora import LoraConfig

_FIELDS = {"module_path": "targets", "rank": "rank", "alpha": "alpha", "tile_size": "tile_size"}
_QTYPE = "weight_qtype"


def lora_config(section: Mapping[str, Any]) -> LoraConfig:
    """`LoraConfig` of a `lora_config` section of a Tunix run configuration.

    Args:
        section: `module_path`, `rank` and `alpha`; `weight_qtype` and `tile_size` for QLoRA.

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
    fields = {ours: section[theirs] for theirs, ours in _FIELDS.items() if theirs in section}
    qtype = section.get(_QTYPE)
    if qtype is not None and qtype != "nf4":
        try:
            qtype = jnp.dtype(qtype).name
        except TypeError as error:
            raise ValueError(f"lora_config: {_QTYPE} {qtype!r} is no dtype") from error
    return LoraConfig(**fields, quantize=qtype)
