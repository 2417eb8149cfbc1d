# SPDX-License-Identifier: Apache-2.0
"""What vLLM's and SGLang's JAX engines call our variables. Experimental.

A table has the form in which Tunix reads them to exchange weights: our dotted name, `*` for a
number, to the engine's name and its sharding, which matters only for stacked layers; there are
none. The names follow from ours by rule. vLLM's are those of google-tunix 0.1.7's own table and,
for vision, of tpu-inference; SGLang's are those of sglang-jax. None of it has been run on the
engines.

`plugin/engines.py` brings the arrays into vLLM's shapes.
"""

from __future__ import annotations

import re
from typing import Any

Axes = dict[str, tuple[int, ...]]

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_EXPERT_NORMS = tuple(
    f"{place}_feedforward_layernorm_{number}"
    for place, number in (("post", 1), ("post", 2), ("pre", 2))
)
_PER_LAYER = ("per_layer_input_gate", "per_layer_projection")
_TEXT = (
    "embed_tokens.embedding",
    "embed_tokens_per_layer.embedding",
    "per_layer_model_projection.kernel",
    "per_layer_projection_norm.weight",
    "norm.weight",
    *(f"layers.*.{name}.kernel" for name in (*_ATTENTION, *_MLP, *_PER_LAYER, "router.proj")),
    *(f"layers.*.{name}.weight" for name in (*_NORMS, *_EXPERT_NORMS, "post_per_layer_input_norm")),
    "layers.*.router.scale",
    "layers.*.router.per_expert_scale",
    "layers.*.experts.gate_up_proj",
    "layers.*.experts.down_proj",
)
_VISION = (
    "patch_embedder.input_proj.kernel",
    "patch_embedder.position_embedding_table",
    *(f"encoder.layers.*.{name}.linear.kernel" for name in (*_ATTENTION, *_MLP)),
    *(f"encoder.layers.*.{name}.weight" for name in _NORMS),
)
# Every variable of every size.
NAMES = (
    *(f"language_model.{name}" for name in _TEXT),
    *(f"vision_tower.{name}" for name in _VISION),
    "embed_vision.embedding_projection.kernel",
)

# Tunix cuts the experts of this name into vLLM's parts of tensor parallelism, and pads them.
VLLM_EXPERTS = "layers.*.moe.gating_einsum"
# Never trained, so no variables of ours; vLLM's engine holds them as parameters.
VLLM_BUFFERS = {
    "language_model.layers.*.layer_scalar": "model.layers.*.layer_scalar",
    "vision_tower.std_bias": "vision_tower.std_bias",
    "vision_tower.std_scale": "vision_tower.std_scale",
}


def vllm_name(name: str) -> str:
    """What vLLM's Gemma 4 calls the variable `name`."""
    prefix, _, rest = name.partition(".")
    if prefix == "language_model":
        rest = {
            "layers.*.experts.gate_up_proj": "layers.*.experts.kernel_gating_upproj_EDF",
            "layers.*.experts.down_proj": "layers.*.experts.kernel_down_proj_EFD",
        }.get(rest, rest)
        name = f"model.{rest}"
    name = name.replace("vision_tower.encoder.", "vision_tower.").replace(".linear.", ".")
    return re.sub(r"\.(kernel|embedding)$", ".weight", name)


def sglang_name(name: str) -> str:
    """What SGLang's Gemma 4 calls the variable `name`."""
    name = name.replace("language_model.", "model.", 1)
    name = name.replace("vision_tower.encoder.", "visual.").replace("vision_tower.", "visual.")
    name = name.replace("embed_vision.", "visual.projector.").replace(".linear.", ".")
    return re.sub(r"(?<!router\.proj)\.kernel$", ".weight", name)


def _vllm() -> dict[str, Any]:
    names = {name: (vllm_name(name), ()) for name in NAMES}
    names[VLLM_EXPERTS] = names.pop("language_model.layers.*.experts.gate_up_proj")
    names |= {ours: (theirs, ()) for ours, theirs in VLLM_BUFFERS.items()}
    return {
        "to_hf_mappings": names,
        # Adapters are merged before they are sent.
        "lora_to_hf_mappings": {},
        "to_hf_transpose_keys": {"vision_tower.patch_embedder.position_embedding_table": (1, 0, 2)},
    }


def _sglang() -> dict[str, Any]:
    adapters = {
        f"language_model.layers.*.{name}.kernel_lora_{side}": f"model.layers.*.{name}.{theirs}"
        for name in (*_ATTENTION, *_MLP)
        for side, theirs in (("a", "A_buffer"), ("b", "B_buffer"))
    }
    return {
        "to_hf_mappings": {name: (sglang_name(name), ()) for name in NAMES},
        "lora_to_hf_mappings": {ours: (theirs, ()) for ours, theirs in adapters.items()},
        # [in, rank] to [1, rank, in]. A regular expression: Tunix would apply one with a star
        # before it adds the first axis.
        "lora_to_hf_transpose_keys": {r"language_model\.layers\.\d+\..+_lora_[ab]": (0, 2, 1)},
        "to_hf_transpose_keys": {},
    }


BACKEND_MAPPINGS = {"vllm_jax": _vllm(), "sglang_jax": _sglang()}


class BackendNames:
    """The methods through which Tunix asks a model for its tables."""

    # Tunix looks for BACKEND_MAPPINGS in the package around this module. It is said here because a
    # class that Qwix has changed no longer knows its own module.
    BACKEND_PACKAGE_PATH = __name__

    @classmethod
    def mapping_for(cls, backend: str | None = None) -> dict[str, Any]:
        """All tables of one engine.

        Raises:
            ValueError: for an engine that is not known.
        """
        backend = backend or "vllm_jax"
        if backend not in BACKEND_MAPPINGS:
            known = ", ".join(BACKEND_MAPPINGS)
            raise ValueError(f"backend: expected one of {known}, found {backend!r}")
        return BACKEND_MAPPINGS[backend]

    @classmethod
    def to_hf_mappings(cls, backend: str | None = None) -> dict[str, tuple[str, tuple]]:
        """The engine's name of every variable."""
        return cls.mapping_for(backend)["to_hf_mappings"]

    @classmethod
    def lora_to_hf_mappings(cls, backend: str | None = None) -> dict[str, tuple[str, tuple]]:
        """The engine's name of every adapter; none where adapters are merged."""
        return cls.mapping_for(backend)["lora_to_hf_mappings"]

    @classmethod
    def to_hf_transpose_keys(cls, backend: str | None = None) -> Axes:
        """Axes of variables that the engine orders in another way."""
        return dict(cls.mapping_for(backend)["to_hf_transpose_keys"])

    @classmethod
    def lora_to_hf_transpose_keys(cls, backend: str | None = None) -> Axes | None:
        """Axes of adapters that the engine orders in another way."""
        return cls.mapping_for(backend).get("lora_to_hf_transpose_keys")

    @classmethod
    def to_hf_hook_fns(cls, backend: str | None = None) -> None:
        """No variable needs a function of its own."""
        cls.mapping_for(backend)
