# SPDX-License-Identifier: Apache-2.0
"""Tiny Gemma 4 models: a whole directory in Hugging Face's format, in a second and a megabyte.

Five presets have the structure of the released sizes (per-layer embeddings and shared K/V, experts,
keys that double as values, ...) with everything small. `demo` is a plain one that learns quickly.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from .tokenizer import token_ids, write_json, write_tokenizer

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_BLOCK_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")

# What all have in common and what each has of its own. Sharing layers read from a layer of either
# kind, whose sources E4B's pattern puts apart; the table of positions holds the longest side of an
# image at the smallest budget, 3 * 70 patches.
_TINY: dict[str, Any] = json.loads(
    resources.files("tunix_gemma4").joinpath("presets/tiny.json").read_text("utf-8")
)
PRESETS = tuple(_TINY["sizes"])


def tiny_hf_config(
    preset: str = "e2b", *, pooling_kernel_size: int | None = None, audio: bool = False
) -> dict[str, Any]:
    """The `config.json` of a tiny model.

    Args:
        preset: one of `PRESETS`.
        pooling_kernel_size: patches along one side of a soft token; the preset's if None.
            Transformers 5.12.1 inverts its padding mask at 1.
        audio: with an audio tower; only E2B and E4B have one.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, found {preset!r}")
    if audio and preset not in ("e2b", "e4b"):
        raise ValueError(f"audio=True: only e2b and e4b have an audio tower, not {preset!r}")
    ids = token_ids()
    model_type = "gemma4_unified" if preset == "12b" else "gemma4"
    own = _TINY["sizes"][preset]
    text = _TINY["text"] | own["text"] | {"model_type": f"{model_type}_text"}
    text |= {"num_hidden_layers": len(text["layer_types"]), "dtype": "float32"}
    text |= {f"{name}_token_id": ids[f"<{name}>"] for name in ("pad", "eos", "bos")}
    vision = None
    if "vision" in own:
        vision = _TINY["vision"] | own["vision"]
        vision["pooling_kernel_size"] = pooling_kernel_size or vision["pooling_kernel_size"]
    unified = "Unified" if preset == "12b" else ""
    return {
        "architectures": [f"Gemma4{unified}ForConditionalGeneration"],
        "model_type": model_type,
        "dtype": "float32",
        "text_config": text,
        "vision_config": vision,
        "audio_config": _TINY["audio"] if audio else None,
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "audio_token_id": ids["<|audio|>"],
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "boa_token_id": ids["<|audio>"],
        "eoa_token_index": ids["<audio|>"],
        "eos_token_id": [ids["<eos>"], ids["<turn|>"]],
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    }


def tiny_config(
    preset: str = "e2b",
    *,
    text_only: bool | None = None,
    pooling_kernel_size: int | None = None,
    **fields: Any,
) -> ModelConfig:
    """A tiny float32 `ModelConfig`: the one of `build_tiny_checkpoint`'s directory.

    `text_only=None` means with images wherever the preset has a vision tower (all but 12b);
    `fields` override those of `ModelConfig`. For the others see `tiny_hf_config`.
    """
    config = tiny_hf_config(preset, pooling_kernel_size=pooling_kernel_size)
    if text_only is None:
        text_only = config["vision_config"] is None
    return ModelConfig.from_hf(config, text_only=text_only, **fields)


def build_tiny_checkpoint(
    directory: str | Path,
    *,
    preset: str = "e2b",
    seed: int = 0,
    audio: bool = False,
    pooling_kernel_size: int | None = None,
) -> Path:
    """Writes a tiny Gemma 4 directory in Hugging Face's format and returns its path.

    Every value is random, the norms, scalars and clip bounds too, but for `demo`, whose norms and
    scalars are neutral because it is there to be trained.

    Args:
        directory: made if it does not exist.
        preset: one of `PRESETS`; 12b has no vision tower.
        seed: of the weights.
        audio: with an audio tower (e2b, e4b), which this package carries along but never runs.
        pooling_kernel_size: see `tiny_hf_config`.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_hf_config(preset, pooling_kernel_size=pooling_kernel_size, audio=audio)
    write_json(directory / "config.json", config)
    tensors = {
        name: random_tensor(name, shape, seed=seed, plain=preset == "demo")
        for name, shape in tensor_shapes(config).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory, empty_thought=preset in ("12b", "26b_a4b", "31b"))
    write_json(directory / "generation_config.json", _generation_config())
    write_json(directory / "processor_config.json", _processor_config(config))
    return directory


def _generation_config() -> dict[str, Any]:
    ids = token_ids()
    return {
        "bos_token_id": ids["<bos>"],
        "pad_token_id": ids["<pad>"],
        "eos_token_id": [ids["<eos>"], ids["<turn|>"], ids["<|tool_response>"]],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }


def _processor_config(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5.12 writes for `Gemma4Processor`; defaults of audio and video left out."""
    result = dict(_TINY["processor"])
    vision = config["vision_config"]
    if vision is not None:
        sizes = {name: vision[name] for name in ("patch_size", "pooling_kernel_size")}
        pixels = sizes | _TINY["pixels"]
        result["image_processor"] = {"image_processor_type": "Gemma4ImageProcessor"} | pixels
        video = {"video_processor_type": "Gemma4VideoProcessor", "do_normalize": True}
        result["video_processor"] = pixels | video | {"num_frames": 32}
    return result


# ---- Names and shapes of tensors, and random values. Written from the checkpoint format and not
# from our modules, so that a tiny directory checks the loader instead of echoing it. Source: the
# state dict of transformers 5.12.


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
        # HF keeps the inputs of an output last, and convolutions have a kernel as well.
        fan_in = np.prod(shape[1:]) if len(shape) == 4 else shape[-1]
        value = rng.standard_normal(shape) / np.sqrt(fan_in)
    return np.asarray(value, np.float32)  # Of a scalar too, which safetensors from 0.8 on asks for.


def _text(c: dict[str, Any], prefix: str) -> Shapes:
    width, layers = c["hidden_size"], c["num_hidden_layers"]
    per_layer = c["hidden_size_per_layer_input"]
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
