# SPDX-License-Identifier: Apache-2.0
"""Tunix's command lines on Gemma 4, unmodified: what they refuse, lack or look up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
from omegaconf import OmegaConf
from tunix.utils.mesh import device_mesh_coords

from ..lora import apply_lora
from ..model.gemma4 import Gemma4Model
from ..sharding import shard_model
from .automodel import CLI_FIELDS, gemma4_directory, is_gemma4_name, more_fields
from .hooks import around
from .lora import lora_config as read_section

BASE_CONFIG = "base_config.yaml"
# Of the sources of models, those that a Gemma 4 comes from here and that the host would refuse.
_SOURCES = ("huggingface", "gcs")


@around
def wrap_load_config_from_yaml(original, self, config_path: str | Path, *args: Any, **kwargs: Any):
    """base_config.yaml, which the wheel lacks."""
    if Path(config_path).name == BASE_CONFIG and not Path(config_path).exists():
        own = resources.files(__name__.rpartition(".")[0]).joinpath(BASE_CONFIG)
        return OmegaConf.create(own.read_text("utf-8"))
    return original(self, config_path, *args, **kwargs)


@around
def wrap_validate_tokenizer(original, self, *args: Any, **kwargs: Any) -> None:
    """Without a path the tokenizer is the model's own."""
    section = self.config["tokenizer_config"]
    if section["tokenizer_type"] == "huggingface":
        where = section["tokenizer_path"] or _model_place(self.config["model_config"])
        directory = gemma4_directory(where)
        # The host knows local directories by their leading slash.
        section["tokenizer_path"] = str(directory.resolve()) if directory else where
    return original(self, *args, **kwargs)


@around
def wrap_check_supported_workflow(original, self, *args: Any, **kwargs: Any) -> None:
    """The command lines take Gemma 4 from the hub and from directories.

    The host takes it for a first Gemma.
    """
    section = self.config["model_config"]
    name, place = section["model_name"], _model_place(section)
    named = is_gemma4_name(name)
    if gemma4_directory(place) is not None and not named:
        raise ValueError(
            f"model_config.model_name: {name!r} is no Gemma 4, but {place} holds one; set it "
            "to a name such as gemma-4-e2b-it (the directory's config.json decides the size)"
        )
    if named and section["model_source"] in _SOURCES:
        return None
    return original(self, *args, **kwargs)


def _model_place(section: Mapping[str, Any]) -> str:
    """The hub id or path that a `model_config` section names."""
    local = section["model_source"] in ("gcs", "internal")
    return (section.get("model_path") if local else section.get("model_id")) or ""


@around
def wrap_create_model(original, model_config: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """text_only and dtype of the model_config section reach the model."""
    fields = {name: model_config[name] for name in CLI_FIELDS & set(model_config)}
    with more_fields(fields):
        return original(model_config, *args, **kwargs)


@around
def wrap_apply_lora_to_model(original, base_model, mesh, lora_config: Mapping, **kwargs) -> Any:
    """The lora_config section reaches our projections, or is refused."""
    if not isinstance(base_model, Gemma4Model):
        return original(base_model, mesh, lora_config, **kwargs)
    model = apply_lora(base_model, read_section(dict(lora_config)))
    return model if mesh is None else shard_model(model, mesh)


@around
def wrap_allocate(
    original, mesh_requirements: Sequence[tuple[str, int]], devices=None, **kwargs
) -> dict[str, list[Any]]:
    """grpo_main runs on devices without coordinates too: GPUs and CPUs.

    They are handed out in their order.
    """
    pool = list(jax.devices() if devices is None else devices)
    if any(device_mesh_coords(device) is not None for device in pool):
        return original(mesh_requirements, devices, **kwargs)
    needed = sum(count for _, count in mesh_requirements)
    if needed > len(pool):
        meshes = ", ".join(f"{name} {count}" for name, count in mesh_requirements)
        raise ValueError(
            f"mesh: {needed} devices are needed ({meshes}) and there are {len(pool)}; roles "
            "share devices with mesh: null and same_mesh_as: actor"
        )
    return {name: [pool.pop(0) for _ in range(count)] for name, count in mesh_requirements}
