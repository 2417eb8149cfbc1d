# SPDX-License-Identifier: Apache-2.0
"""Reading JSON, and from a `config.json`, of whatever version of transformers, to our fields.

Source: the config classes of `gemma4` and `gemma4_unified` in transformers 5.12 and 5.24.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, *, finite: bool = False) -> Any:
    """What JSON holds.

    With `finite`, NaN, Infinity and numbers beyond float64, which the format does not have, are
    refused.

    Raises:
        ValueError: `json.JSONDecodeError` where it is no JSON; otherwise naming a key that stands
            in one object twice, or the number.
    """
    number = _finite if finite else None
    return json.loads(text, object_pairs_hook=_once, parse_float=number, parse_constant=number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand there once; readers differ in which of two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands in one object twice")
    return found


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """What is wrong within is said of `what`: a ValueError begins with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _finite(written: str) -> float:
    number = float(written)
    if not math.isfinite(number):
        raise ValueError(f"{written:.80} is no finite number")
    return number


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it cannot be read, is no JSON, holds something else than an object, or a key
            twice.
    """
    try:
        content = parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


# By model type that is supported: what a config class of transformers takes for an absent field,
# where it is not the field's default of `ModelConfig`, which is that of `gemma4`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4": {},
    "gemma4_unified": {
        "max_position_embeddings": 262_144,
        "sliding_window": 1024,
        "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0,
    },
}
_PER_LAYER = ("head_dim", "num_key_value_heads")


def read_source(where: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """The parsed `config.json` and, unless a mapping was given, its path."""
    if isinstance(where, Mapping):
        return copy.deepcopy(dict(where)), None
    path = Path(where)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file() and (path.parent / "adapter_config.json").is_file():
        raise ValueError(
            f"{path.parent}: this is an adapter (adapter_config.json), not a checkpoint. Give the "
            "directory of its base model instead, and the adapter beside it: --adapter of "
            "generate, or load_adapter"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a directory with a config.json, or one")
    return read_json(path), path


def section(source: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A part of the file that is an object, or absent."""
    value = source.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected an object, found {value!r}")
    return None if value is None else dict(value)


def dtype_of(source: Mapping[str, Any]) -> tuple[str, Any]:
    """The dtype that the file names, and the key that it stands under; float32 if none."""
    text = section(source, "text_config") or {}
    places = (("dtype", source), ("torch_dtype", source), ("text_config.dtype", text))
    given = ((key, part.get(key.rpartition(".")[2])) for key, part in places)
    return next(((key, value) for key, value in given if value is not None), ("dtype", "float32"))


def refuse_quantized(source: Mapping[str, Any], directory: Path | None) -> None:
    """Raises ValueError for a directory whose weights are quantised, with the way out."""
    text = section(source, "text_config") or {}
    found = None
    for key in ("quantization_config", "quantization", "compression_config"):
        value = source.get(key) or text.get(key)
        if value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            method = method or ("mlx" if key == "quantization" else None)
            found = found or (f"{key} ({method})" if method else key)
    if found is None and directory is not None:
        # ModelOpt (NVFP4, FP8) and older GPTQ tools write a file of their own.
        names = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
        found = next((name for name in names if (directory / name).is_file()), None)
    if found is not None:
        raise ValueError(
            f"{found}: the weights are quantised, and only floating-point ones are read. Use the "
            "directory they were made from, or dequantise this one first (transformers: "
            "model.dequantize(), then save_pretrained); LoRA on a base in few bits is "
            "lora.quantize here"
        )


def settle_layers(fields: dict[str, Any], text: Mapping[str, Any], types: list[str]) -> None:
    """Turns `per_layer_config`, of transformers from 5.15 on, into the fields of earlier ones.

    Changes `fields`, those of `ModelConfig` with their defaults, in place. `text` is the file's
    `text_config`. Raises ValueError for layers that differ in what this model has one value of per
    type of layer.
    """
    overrides = text.get("per_layer_config")
    if overrides is None:
        return
    own = _layer_overrides(overrides, fields, text, len(types))
    settled = {
        kind: {name: _only_value(name, kind, types, own, fields[name]) for name in _PER_LAYER}
        for kind in dict.fromkeys(types)
    }
    fields |= settled.get("sliding_attention", {})
    full = settled.get("full_attention", {})
    found = {"global_head_dim": full.get("head_dim")}
    if fields["attention_k_eq_v"]:
        found["num_global_key_value_heads"] = full.get("num_key_value_heads")
    elif full and full["num_key_value_heads"] != fields["num_key_value_heads"]:
        raise ValueError(
            "per_layer_config: full_attention layers with num_key_value_heads of their own "
            f"({full['num_key_value_heads']}, elsewhere {fields['num_key_value_heads']}) are "
            "supported with attention_k_eq_v only"
        )
    for name, value in found.items():
        if text.get(name, value) != value:
            raise ValueError(
                f"per_layer_config: it gives {name} {value}, and {name} is {text[name]!r}; "
                "remove the one that is wrong"
            )
        fields[name] = value


def _layer_overrides(
    overrides: Any, fields: Mapping[str, Any], text: Mapping[str, Any], count: int
) -> dict[int, dict[str, Any]]:
    """What `per_layer_config` says of each layer, by index."""
    if not isinstance(overrides, Mapping):
        raise ValueError(f"per_layer_config: expected an object, found {overrides!r}")
    result: dict[int, dict[str, Any]] = {}
    for key, values in overrides.items():
        name = f"per_layer_config[{key!r}]"
        index = int(key) if str(key).isdecimal() else -1
        if not 0 <= index < count or index in result:
            raise ValueError(f"{name}: expected each layer once, by a number below {count}")
        if not isinstance(values, Mapping):
            raise ValueError(f"{name}: expected an object, found {values!r}")
        for field, value in values.items():
            general = fields.get(field, text.get(field))
            if field not in _PER_LAYER and value and value != general:
                raise ValueError(
                    f"{name}.{field}: found {value!r}; what may differ from layer to layer here "
                    f"is {' and '.join(_PER_LAYER)}"
                )
            if field in _PER_LAYER and (type(value) is not int or value < 1):
                raise ValueError(f"{name}.{field}: expected a positive integer, found {value!r}")
        result[index] = dict(values)
    return result


def _only_value(
    name: str, kind: str, types: list[str], own: dict[int, dict[str, Any]], general: int
) -> int:
    values = {
        index: own.get(index, {}).get(name, general)
        for index, layer_type in enumerate(types)
        if layer_type == kind
    }
    if len(set(values.values())) > 1:
        raise ValueError(
            f"per_layer_config: {name} of the {kind} layers: expected one value, found {values}"
        )
    return next(iter(values.values()))
