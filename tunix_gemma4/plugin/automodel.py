# SPDX-License-Identifier: Apache-2.0
"""Tunix's `AutoModel` and what it looks up, led to this model.

A name that Tunix's own naming takes for a Gemma 4 is one. A directory is one by its `config.json`,
whatever it is called; the configuration is read from it, not guessed from the name.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib
import json
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from jax.sharding import Mesh
from tunix.models import automodel, naming

from ..checkpoint import load_checkpoint
from ..config import ModelConfig
from ..model.gemma4 import Gemma4ForConditionalGeneration
from .hooks import around, call_of

FAMILY = "gemma4"
_PACKAGE = __name__.partition(".")[0]
_FIELDS = frozenset(field.name for field in dataclasses.fields(ModelConfig))
# Of these, what a section of Tunix's command line may set that its own code does not hand on.
CLI_FIELDS = frozenset({"text_only", "dtype", "use_sliding_window_kv_cache"})
# What Tunix's command line says to every model and only others need.
_OF_OTHERS = frozenset({"intermediate_ckpt_dir", "rng_seed"})
_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
_Source = automodel.ModelSource

# Fields that a caller cannot hand through the host's functions in between.
_MORE_FIELDS: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar(
    "tunix_gemma4_more_fields", default=types.MappingProxyType({})
)


@contextlib.contextmanager
def more_fields(fields: Mapping[str, Any]) -> Iterator[None]:
    """Gives models that `AutoModel` makes meanwhile these fields of `ModelConfig` too."""
    token = _MORE_FIELDS.set(dict(fields))
    try:
        yield
    finally:
        _MORE_FIELDS.reset(token)


def is_gemma4_name(name: str) -> bool:
    """Whether Tunix's naming takes this model name or hub id, in any case, for a Gemma 4."""
    try:
        return naming.ModelNaming(model_id=name).model_family == FAMILY
    except ValueError:
        return False


def gemma4_directory(where: str | Path | None) -> Path | None:
    """`where` if it is a directory whose `config.json` is a Gemma 4's."""
    if not where:
        return None
    directory = Path(where).expanduser()
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(config, dict) and str(config.get("model_type")).startswith(FAMILY)
    return directory if is_ours else None


def probe() -> None:
    """Asks the host for a Gemma 4 by name, as its own code does.

    Raises:
        RuntimeError: if the answer is not this package's.
    """
    config = automodel.call_model_config("gemma-4-e2b-it")
    if not isinstance(config, ModelConfig):
        raise RuntimeError(
            "tunix.models.automodel.call_model_config('gemma-4-e2b-it') gives a "
            f"{type(config).__module__}.{type(config).__name__} although its hooks are in place: "
            "this google-tunix looks models up elsewhere. Install google-tunix>=0.1.7,<0.2"
        )


# ---- The hooks.


@around
def wrap_get_model_module(original, model_name: str, module_type: Any, *args, **kwargs):
    """Names of Gemma 4 lead to this model.

    What the host then looks for in it are `model`, `params` and `params_safetensors`.
    """
    if is_gemma4_name(model_name):
        return importlib.import_module(f"{_PACKAGE}.{module_type.value}")
    return original(model_name, module_type, *args, **kwargs)


@around
def wrap_download_model(original, model_id_or_path, model_download_path, model_source, *args, **kw):
    """Local directories need no hub, and the hub no download path."""
    if model_source in (_Source.HUGGINGFACE, _Source.INTERNAL):
        directory = gemma4_directory(model_id_or_path)
        if directory is not None:
            return str(directory)
    if model_source is _Source.HUGGINGFACE and is_gemma4_name(model_id_or_path):
        return _from_hub(model_id_or_path, model_download_path)
    return original(model_id_or_path, model_download_path, model_source, *args, **kw)


def _from_hub(model_id: str, download_path: str | None) -> str:
    path = Path(model_id).expanduser()
    if model_id.startswith(("/", ".", "~")) or model_id.count("/") != 1:
        state = "has no config.json of a Gemma 4" if path.is_dir() else "is no directory"
        raise ValueError(
            f"{model_id}: it {state}; expected a directory in Hugging Face's format, or a hub id "
            "such as google/gemma-4-E2B-it"
        )
    return huggingface_hub.snapshot_download(
        model_id, local_dir=download_path or None, allow_patterns=_FILES
    )


@around
def wrap_from_pretrained(original, *args: Any, **kwargs: Any) -> tuple[Any, str | None]:
    """Directories of any name are known by their config.json, which also gives the sizes."""
    call = call_of(original, *args, **kwargs).arguments
    directory = _directory(
        call["model_id"],
        call.get("model_source", _Source.HUGGINGFACE),
        call.get("model_path"),
        call.get("model_download_path"),
    )
    if directory is None:
        return original(*args, **kwargs)
    fields = {**_MORE_FIELDS.get(), **call.get("kwargs", {})}
    return _load(directory, call["mesh"], fields), str(directory)


def _directory(
    model_id: str,
    source: automodel.ModelSource,
    model_path: str | None,
    download_path: str | None,
) -> Path | None:
    """Where the Gemma 4 that is meant lies, fetched if need be; None for another family."""
    if source in (_Source.GCS, _Source.INTERNAL):
        return gemma4_directory(model_path)
    if source is not _Source.HUGGINGFACE:
        return None
    directory = gemma4_directory(model_id)
    if directory is None and is_gemma4_name(model_id):
        directory = Path(automodel.download_model(model_id, download_path, source))
    return directory


def _load(directory: Path, mesh: Mesh, fields: Mapping[str, Any]) -> Gemma4ForConditionalGeneration:
    """The model, with the configuration of its directory and the caller's `fields` over it."""
    unknown = fields.keys() - _FIELDS - _OF_OTHERS
    if unknown:
        raise ValueError(
            f"AutoModel.from_pretrained: {', '.join(sorted(unknown))} unknown; Gemma 4 takes the "
            "fields of tunix_gemma4.ModelConfig, such as text_only, dtype and remat_config"
        )
    given = {name: fields[name] for name in fields.keys() & _FIELDS if fields[name] is not None}
    dtype, param_dtype = given.pop("dtype", None), given.pop("param_dtype", None)
    config = ModelConfig.from_hf(directory, **given)
    return load_checkpoint(
        directory, mesh, config.text_only, dtype, param_dtype=param_dtype, config=config
    )
