# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor is called `base_model.model.` + module + `.lora_A.weight` [rank, in] or `.lora_B.weight`
[out, rank], module being its name in the transformers model. Ours are the transposes.

Source: PEFT 0.21 `LoraConfig`, `get_peft_model_state_dict`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from ..checkpoint import files
from ..checkpoint.check import require_finite
from ..checkpoint.names import SCORE, module_name
from ..config.source import read_json
from ..model.gemma4 import Gemma4Model, require_single_layers
from .adapters import LoraConfig, LoraLinear, adapted, add_adapters, describe
from .targets import as_regex, linears

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WRITER = {"writer": "tunix_gemma4"}
Tensors = dict[str, files.StoredTensor]

# Settings of PEFT that do not change what a trained adapter computes, whatever their value.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip
# Modules that PEFT adapts and this package does not, by a part of their name, and why.
_NOT_CARRIED = {
    "router": (
        r"\.router\.",
        "it decides in float32 which experts run, and no adapter moves it here; train with "
        "exclude_modules='.*router.*'",
    ),
    "audio": (
        r"\.(audio_tower|embed_audio)\.",
        "the audio tower is not supported; train with exclude_modules='.*audio.*'",
    ),
    "experts": (r"\.experts\.", "their kernels are no projections; train without them"),
    "head or embedding": (
        r"(^|\.)(lm_head|embed_tokens\w*)\.",
        "the embedding is the head here and neither is trained beside an adapter; train without "
        "modules_to_save and with targets that leave both out, or train all weights",
    ),
}
_TIED = ("lm_head", "embed_tokens")
# Other initialisations (PiSSA, OLoRA, ...) also change the base weights.
_INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", None)


def save_adapter(
    model: Gemma4Model, directory: str | Path, *, base_model_name_or_path: str | None = None
) -> None:
    """Writes what `peft.PeftModel.from_pretrained` loads, and the base's tokenizer beside it.

    The directory appears whole or not at all; one that an earlier call wrote is replaced, and what
    others have put into that, such as a model card, stays.

    Args:
        model: from `apply_lora` or `load_adapter`; it may be quantised.
        directory: where to.
        base_model_name_or_path: what the adapter belongs to; None takes the directory that the
            model was loaded from. Tokenizer, processor, chat template and generation config are
            copied from that one.

    Raises:
        ValueError: if there are no adapters, or `directory` exists and was not written here.
        NonFiniteError: if adapters hold NaN or infinity, by name.
    """
    require_single_layers(model)
    directory = Path(directory)
    modules = adapted(model)
    if not modules:
        raise ValueError("the model has no adapters to save; apply_lora adds them")
    _check_target(directory)
    matrices = {name: variable[...] for name, variable in _matrices(modules).items()}
    require_finite(matrices, str(directory))
    tensors = {}
    for name, array in matrices.items():
        if not array.is_fully_addressable:
            array = multihost_utils.process_allgather(array, tiled=True)
        tensors[name] = np.ascontiguousarray(np.asarray(array, np.float32).T)
    trained = len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    if jax.process_index() != 0:
        return  # Every process took part in gathering; one writes.
    source = model.config.source_directory
    settings = _settings(modules, base_model_name_or_path or source)
    with files.replacing(directory) as new:
        (new / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        save_file(tensors, new / TENSORS, {"format": "pt"} | _WRITER)
        if source is not None:
            files.copy_companions(Path(source), new)
        written = len(files.read_header(new / TENSORS)[0])
        if written != trained:
            raise RuntimeError(f"{written} tensors were written of {trained} trained; not saved")


def _matrices(modules: dict[str, LoraLinear]) -> dict[str, nnx.LoRAParam]:
    """A and B of each, by the names of their tensors."""
    matrices = {}
    for name, module in modules.items():
        a, b = _tensor_names(name)
        matrices |= {a: module.kernel_lora_a, b: module.kernel_lora_b}
    return matrices


def _tensor_names(name: str) -> tuple[str, str]:
    full = f"{_PREFIX}{module_name((name, 'kernel'))}"
    return f"{full}.lora_A.weight", f"{full}.lora_B.weight"


def _settings(modules: dict[str, LoraLinear], base: str | None) -> dict[str, Any]:
    config = next(iter(modules.values())).lora
    alpha = float(config.alpha)
    return {
        "peft_type": "LORA",
        # PEFT would train the head of a task that it knows in another way.
        "task_type": None if SCORE in modules else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.use_rslora,
        "bias": "none",
        "target_modules": as_regex(module_name((name, "kernel")) for name in modules),
    }


def _check_target(directory: Path) -> None:
    """Refuses a directory that has something in it and no adapter of `save_adapter`."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    file = directory / TENSORS
    if not file.is_file() or not _WRITER.items() <= files.read_header(file)[1].items():
        raise ValueError(
            f"{directory}: exists and is no adapter that save_adapter wrote; choose another "
            "directory, or remove it yourself"
        )


# ---- Reading.


def load_adapter(model: Gemma4Model, directory: str | Path) -> Gemma4Model:
    """A copy of `model` with an adapter that PEFT or `save_adapter` wrote.

    Dropout that the adapter was trained with is ignored: there is none here.

    Args:
        model: if it has no adapters, it gets them; if it has, they must be on the same projections
            and of the same rank and scale. For a quantised base, call `apply_lora` first.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        ValueError: for files that are absent or damaged, settings that are not supported, and
            tensors that are missing, unexpected or misshapen, all of them in one message.
    """
    require_single_layers(model)
    directory = Path(directory)
    config = check_adapter(directory)
    tensors = _read_tensors(model, directory)
    present = adapted(model)
    own = next(iter(present.values())).lora if present else config
    if (own.rank, own.scale) != (config.rank, config.scale):
        raise ValueError(
            f"{directory}: rank {config.rank} and scale {config.scale:g}; the model's adapters "
            f"have rank {own.rank} and scale {own.scale:g}. Load it into a model without adapters"
        )
    names = list(present) or _adapted_by(tensors, read_json(directory / CONFIG), model)
    _check_tensors(model, names, tensors, config.rank, directory)
    if present:
        model = nnx.clone(model)
    else:
        config = dataclasses.replace(config, targets=as_regex(names))
        model = add_adapters(model, names, config, nnx.Rngs(0))
        logging.info("%s", describe(model))
    spoilt = []
    for name, variable in _matrices(adapted(model)).items():
        matrix = tensors[name].view().astype(np.float32).T
        if not np.isfinite(matrix).all():
            spoilt.append(name)
        variable[...] = jax.device_put(matrix, variable.get_raw_value().sharding)
    if spoilt:
        raise ValueError(f"{directory / TENSORS}: NaN or infinity in {files.listing(spoilt)}")
    return model


def _adapted_by(tensors: Tensors, settings: dict[str, Any], model: nnx.Module) -> list[str]:
    """The projections that have tensors, or should have by the settings that they came with."""
    projections = list(linears(model))
    found = [name for name in projections if tensors.keys() & set(_tensor_names(name))]
    # One that was trained without a tower says nothing of it.
    towers = {name.split(".")[0] for name in found}
    return [
        name
        for name in projections
        if name in found or (name.split(".")[0] in towers and _is_targeted(name, settings))
    ]


def _is_targeted(name: str, settings: dict[str, Any]) -> bool:
    """Whether PEFT adapts a projection under `settings`; False where that cannot be told.

    Source: PEFT 0.21 `check_target_module_exists`.
    """
    full = module_name((name, "kernel"))
    # A model class without vision has no `language_model` in its names.
    keys = (full, full.replace("model.language_model.", "model.", 1))
    layers: Any = settings.get("layers_to_transform")

    def means(wanted: Any, key: str) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(wanted, key) is not None
        return any(key == word or key.endswith(f".{word}") for word in wanted or ())

    def is_in_layers(key: str) -> bool:
        patterns = settings.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if found := re.match(rf".*\.{pattern}\.(\d+)\.", key):
                return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
        return False

    try:
        return any(
            means(settings.get("target_modules"), key)
            and not means(settings.get("exclude_modules"), key)
            and (layers is None or is_in_layers(key))
            for key in keys
        )
    except (re.error, TypeError):  # It is none that PEFT has written.
        return False


def check_adapter(directory: str | Path) -> LoraConfig:
    """Rank and scale of an adapter, before its base is loaded.

    Raises:
        ValueError: for files that are absent or damaged, every setting under which the adapter
            would compute otherwise, and tensors that no model here can carry.
    """
    directory = Path(directory)
    config, names = _read_config(directory), _read_file(directory)
    lines = []
    for what, (pattern, reason) in _NOT_CARRIED.items():
        found = [name for name in names if re.search(pattern, name)]
        if found:
            lines.append(f"{what} ({len(found)} tensors, such as {found[0]}): {reason}")
    if lines:
        raise ValueError("\n".join([f"{directory / TENSORS}: what cannot be carried:", *lines]))
    return config


def _read_config(directory: Path) -> LoraConfig:
    file = directory / CONFIG
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected an adapter directory as PEFT writes it")
    settings = read_json(file)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type: found {kind!r}; supported: 'LORA'")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{file}: r: expected a whole number of at least 1, found {rank!r}")
    is_switch = isinstance(alpha, bool)
    if is_switch or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"{file}: lora_alpha: expected a positive number, found {alpha!r}")
    saved = settings.get("modules_to_save")
    saved = saved if isinstance(saved, list) else ()
    tied = [str(name) for name in saved if str(name).split(".")[-1] in _TIED]
    if tied:
        reason = _NOT_CARRIED["head or embedding"][1]
        raise ValueError(f"{file}: modules_to_save: found {', '.join(tied)}: {reason}")
    # PEFT writes every setting it has; those it does not use are None, False or empty.
    unsupported = {
        key: value
        for key, value in settings.items()
        if key not in _HARMLESS and value and (key, value) != ("bias", "none")
    }
    init = settings.get("init_lora_weights")
    if init not in _INITS_THAT_KEEP_THE_BASE:
        unsupported["init_lora_weights"] = init
    rslora = settings.get("use_rslora")
    if rslora not in (True, False, None):
        unsupported["use_rslora"] = rslora
    if unsupported:
        raise ValueError(
            f"{file}: unsupported settings {unsupported}; supported are plain LoRA adapters of "
            "one rank and alpha, without biases or other trained modules"
        )
    return LoraConfig(rank=rank, alpha=alpha, use_rslora=bool(rslora))


def _read_file(directory: Path) -> Tensors:
    file = directory / TENSORS
    if not file.is_file():
        raise ValueError(
            f"{file}: no such file; an adapter saved as adapter_model.bin has to be saved again "
            "by PEFT with safe_serialization=True"
        )
    return files.read_header(file)[0]


def _read_tensors(model: Gemma4Model, directory: Path) -> Tensors:
    """The adapter's tensors, by the names that we write."""
    tensors, skipped = {}, []
    for name, tensor in _read_file(directory).items():
        # A model class without vision has no `language_model` in its names.
        bare = rf"^{re.escape(_PREFIX)}model\.(layers|per_layer_model_projection)\."
        name = re.sub(bare, rf"{_PREFIX}model.language_model.\1.", name)
        if name in tensors:
            raise ValueError(f"{directory / TENSORS}: {name} is there under two spellings")
        if _is_never_computed(model, name):
            skipped.append(name)
        else:
            tensors[name] = tensor
    if skipped:
        message = "%s: skipped keys and values of layers that reuse others': %s"
        logging.info(message, directory, skipped)
    return tensors


def _is_never_computed(model: Gemma4Model, name: str) -> bool:
    """Whether `name` adapts a `k_proj` or `v_proj` that some model classes keep but never run."""
    match = re.search(r"\.language_model\.layers\.(\d+)\.self_attn\.[kv]_proj\.", name)
    layers = model.config.layers
    return bool(match) and int(match[1]) < len(layers) and layers[int(match[1])].shares_kv


def _check_tensors(
    model: nnx.Module, names: list[str], tensors: Tensors, rank: int, directory: Path
) -> None:
    """Raises unless the tensors are those of `names`, in their shapes, and no others."""
    projections, expected = linears(model), {}
    for name in names:
        linear = projections[name]
        a, b = _tensor_names(name)
        expected |= {a: (rank, linear.in_features), b: (linear.out_features, rank)}
    complaints = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "misshapen": [
            f"{name}: expected shape {shape}, found {tensors[name].shape}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "not floating point": [name for name, t in tensors.items() if t.dtype not in files.FLOATS],
    }
    lines = [f"{what}: {files.listing(found)}" for what, found in complaints.items() if found]
    if not expected and not lines:
        lines = ["it holds no tensors"]
    if lines:
        vision = any("vision" in name for name in complaints["unexpected"])
        hint = " Load the model with text_only=False?" if vision else ""
        raise ValueError("\n".join([f"{directory} does not fit this model.{hint}", *lines]))
