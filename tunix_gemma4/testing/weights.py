# SPDX-License-Identifier: Apache-2.0
"""Tensor names and shapes of a Gemma 4 checkpoint, from its `config.json` alone, and random values.

Written from the checkpoint format and not from our modules, so that a tiny directory checks the
loader instead of echoing it. Source: the state dict of transformers 5.12.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_BLOCK_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers saves for `config`, but the tied head."""
    text = config["text_config"]
    shapes = dict(_text(text, "model.language_model"))
    for kind, tower in (("vision", _vision), ("audio", _audio)):
        settings = config.get(f"{kind}_config")
        if settings is not None:
            shapes |= tower(settings, f"model.{kind}_tower")
            width = settings["hidden_size" if kind == "vision" else "output_proj_dims"]
            name = f"model.embed_{kind}.embedding_projection.weight"
            shapes[name] = (text["hidden_size"], width)
    return shapes


def random_tensor(name: str, shape: tuple[int, ...], *, seed: int, plain: bool) -> np.ndarray:
    """A float32 tensor that depends on `seed` and `name` only.

    `plain` gives norms and scalars their neutral value, as one would start training from; else
    everything differs from it, so that a norm or bound that is ignored or swapped shows.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode("utf-8"))])
    leaf = name.rsplit(".", 1)[-1]
    if leaf in _BOUNDS:
        value = rng.uniform(0.8, 2.5, shape) * (-1.0 if leaf.endswith("min") else 1.0)
    elif leaf == "std_bias":
        value = np.zeros(shape) if plain else 0.3 * rng.standard_normal(shape)
    elif leaf in ("layer_scalar", "std_scale", "per_expert_scale"):
        value = np.ones(shape) if plain else rng.uniform(0.5, 1.5, shape)
    elif "norm" in name or leaf in ("scale", "per_dim_scale"):
        value = np.ones(shape) if plain else 1.0 + 0.2 * rng.standard_normal(shape)
    elif leaf == "bias" or leaf == "position_embedding_table":
        value = 0.3 * rng.standard_normal(shape)
    else:
        value = rng.standard_normal(shape) / np.sqrt(_fan_in(shape))
    return np.asarray(value, np.float32)  # Of a scalar too, which safetensors from 0.8 on asks for.


def _fan_in(shape: tuple[int, ...]) -> int:
    """Inputs of one output: HF keeps them last, convolutions have a kernel as well."""
    return int(np.prod(shape[1:])) if len(shape) == 4 else shape[-1]


def _text(c: dict[str, Any], prefix: str) -> Shapes:
    width, layers, per_layer = (
        c["hidden_size"],
        c["num_hidden_layers"],
        c["hidden_size_per_layer_input"],
    )
    yield f"{prefix}.embed_tokens.weight", (c["vocab_size"], width)
    yield f"{prefix}.norm.weight", (width,)
    if per_layer:
        table = (c["vocab_size_per_layer_input"], layers * per_layer)
        yield f"{prefix}.embed_tokens_per_layer.weight", table
        yield f"{prefix}.per_layer_model_projection.weight", (layers * per_layer, width)
        yield f"{prefix}.per_layer_projection_norm.weight", (per_layer,)
    for index, kind in enumerate(c["layer_types"]):
        layer = f"{prefix}.layers.{index}"
        shared = index >= layers - c["num_kv_shared_layers"]
        yield f"{layer}.layer_scalar", (1,)
        for norm in _BLOCK_NORMS:
            yield f"{layer}.{norm}.weight", (width,)
        yield from _text_attention(c, f"{layer}.self_attn", kind == "full_attention", shared)
        wide = c["intermediate_size"] * (2 if shared and c["use_double_wide_mlp"] else 1)
        yield from _mlp(f"{layer}.mlp", width, wide, "")
        if per_layer:
            yield f"{layer}.per_layer_input_gate.weight", (per_layer, width)
            yield f"{layer}.per_layer_projection.weight", (width, per_layer)
            yield f"{layer}.post_per_layer_input_norm.weight", (width,)
        if c["enable_moe_block"]:
            yield from _experts(c, layer)


def _text_attention(c: dict[str, Any], prefix: str, full: bool, shared: bool) -> Shapes:
    width, head = c["hidden_size"], c["global_head_dim"] if full else c["head_dim"]
    k_eq_v = full and c["attention_k_eq_v"]
    kv_heads = c["num_global_key_value_heads"] if k_eq_v else c["num_key_value_heads"]
    yield f"{prefix}.q_proj.weight", (c["num_attention_heads"] * head, width)
    yield f"{prefix}.o_proj.weight", (width, c["num_attention_heads"] * head)
    yield f"{prefix}.q_norm.weight", (head,)
    if not shared:
        yield f"{prefix}.k_proj.weight", (kv_heads * head, width)
        yield f"{prefix}.k_norm.weight", (head,)
        if not k_eq_v:
            yield f"{prefix}.v_proj.weight", (kv_heads * head, width)


def _mlp(prefix: str, width: int, wide: int, inner: str) -> Shapes:
    yield f"{prefix}.gate_proj{inner}.weight", (wide, width)
    yield f"{prefix}.up_proj{inner}.weight", (wide, width)
    yield f"{prefix}.down_proj{inner}.weight", (width, wide)


def _experts(c: dict[str, Any], layer: str) -> Shapes:
    width, experts, wide = c["hidden_size"], c["num_experts"], c["moe_intermediate_size"]
    yield f"{layer}.router.scale", (width,)
    yield f"{layer}.router.per_expert_scale", (experts,)
    yield f"{layer}.router.proj.weight", (experts, width)
    yield f"{layer}.experts.gate_up_proj", (experts, 2 * wide, width)
    yield f"{layer}.experts.down_proj", (experts, width, wide)
    for norm in ("pre_feedforward_layernorm_2", *(f"post_feedforward_layernorm_{i}" for i in "12")):
        yield f"{layer}.{norm}.weight", (width,)


def _vision(c: dict[str, Any], prefix: str) -> Shapes:
    width, heads = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
    table = (2, c["position_embedding_size"], width)
    yield f"{prefix}.patch_embedder.position_embedding_table", table
    yield f"{prefix}.patch_embedder.input_proj.weight", (width, 3 * c["patch_size"] ** 2)
    if c["standardize"]:
        yield f"{prefix}.std_bias", (width,)
        yield f"{prefix}.std_scale", (width,)
    for index in range(c["num_hidden_layers"]):
        layer = f"{prefix}.encoder.layers.{index}"
        for norm in _BLOCK_NORMS:
            yield f"{layer}.{norm}.weight", (width,)
        for name in "qk":
            yield f"{layer}.self_attn.{name}_norm.weight", (c["head_dim"],)
        for name in "qkv":
            yield f"{layer}.self_attn.{name}_proj.linear.weight", (heads, width)
        yield f"{layer}.self_attn.o_proj.linear.weight", (width, heads)
        yield from _mlp(f"{layer}.mlp", width, c["intermediate_size"], ".linear")
        if c["use_clipped_linears"]:
            clipped = [*(f"self_attn.{n}_proj" for n in "qkvo")]
            clipped += [*(f"mlp.{n}_proj" for n in ("gate", "up", "down"))]
            for name in clipped:
                yield from _bounds(f"{layer}.{name}")


def _bounds(module: str) -> Shapes:
    for bound in _BOUNDS:
        yield f"{module}.{bound}", ()


def _audio(c: dict[str, Any], prefix: str) -> Shapes:
    width, (first, second) = c["hidden_size"], c["subsampling_conv_channels"]
    front = f"{prefix}.subsample_conv_projection"
    for index, (out, into) in enumerate(((first, 1), (second, first))):
        yield f"{front}.layer{index}.conv.weight", (out, into, 3, 3)
        yield f"{front}.layer{index}.norm.weight", (out,)
    # transformers takes the number of channels for that of mel bands, both 128 when released.
    yield f"{front}.input_proj_linear.weight", (width, first // 4 * second)
    yield f"{prefix}.output_proj.weight", (c["output_proj_dims"], width)
    yield f"{prefix}.output_proj.bias", (c["output_proj_dims"],)
    for index in range(c["num_hidden_layers"]):
        layer = f"{prefix}.layers.{index}"
        clipped = {f"self_attn.{name}_proj": (width, width) for name in "qkv"}
        clipped["self_attn.post"] = (width, width)
        clipped["lconv1d.linear_start"] = (2 * width, width)
        clipped["lconv1d.linear_end"] = (width, width)
        norms = ["norm_pre_attn", "norm_post_attn", "norm_out"]
        norms += ["lconv1d.pre_layer_norm", "lconv1d.conv_norm"]
        for block in ("feed_forward1", "feed_forward2"):
            clipped[f"{block}.ffw_layer_1"] = (4 * width, width)
            clipped[f"{block}.ffw_layer_2"] = (width, 4 * width)
            norms += [f"{block}.pre_layer_norm", f"{block}.post_layer_norm"]
        for name, shape in clipped.items():
            yield f"{layer}.{name}.linear.weight", shape
            if c["use_clipped_linears"]:
                yield from _bounds(f"{layer}.{name}")
        for name in norms:
            yield f"{layer}.{name}.weight", (width,)
        yield f"{layer}.self_attn.relative_k_proj.weight", (width, width)
        yield f"{layer}.self_attn.per_dim_scale", (width // c["num_attention_heads"],)
        yield f"{layer}.lconv1d.depthwise_conv1d.weight", (width, 1, c["conv_kernel_size"])
