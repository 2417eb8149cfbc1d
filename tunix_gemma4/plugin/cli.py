# SPDX-License-Identifier: Apache-2.0
"""Tunix's command lines on Gemma 4, unmodified: what they refuse, lack or look up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
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
from .lora_names import lora_config as read_section

BASE_CONFIG = "base_config.yaml"
# Of the sources of models, those that a Gemma 4 comes from here and that the host would refuse.
_SOURCES = ("huggingface", "gcs")


def wrap_load_config_from_yaml(original: Callable) -> Callable:
    """Our `base_config.yaml` where the host looks for one that its wheel lacks."""

    @functools.wraps(original)
    def load_config_from_yaml(self, config_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        if Path(config_path).name == BASE_CONFIG and not Path(config_path).exists():
            own = resources.files(__package__).joinpath(BASE_CONFIG)
            return OmegaConf.create(own.read_text("utf-8"))
        return original(self, config_path, *args, **kwargs)

    return load_config_from_yaml


def wrap_validate_tokenizer(original: Callable) -> Callable:
    """A tokenizer without a path is the model's own."""

    @functools.wraps(original)
    def validate_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        section = self.config["tokenizer_config"]
        if section["tokenizer_type"] == "huggingface":
            where = section["tokenizer_path"] or _model_place(self.config["model_config"])
            directory = gemma4_directory(where)
            # The host knows local directories by their leading slash.
            section["tokenizer_path"] = str(directory.resolve()) if directory else where
        return original(self, *args, **kwargs)

    return validate_tokenizer


def wrap_check_supported_workflow(original: Callable) -> Callable:
    """Gemma 4 comes from the hub and from directories; the host takes it for a first Gemma."""

    @functools.wraps(original)
    def check_supported_workflow(self, *args: Any, **kwargs: Any) -> None:
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

    return check_supported_workflow


def _model_place(section: Mapping[str, Any]) -> str:
    """The hub id or path that a `model_config` section names."""
    local = section["model_source"] in ("gcs", "internal")
    return (section.get("model_path") if local else section.get("model_id")) or ""


def wrap_create_model(original: Callable) -> Callable:
    """Fields of `ModelConfig` in the `model_config` section reach the model."""

    @functools.wraps(original)
    def create_model(model_config: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        fields = {name: model_config[name] for name in CLI_FIELDS & set(model_config)}
        with more_fields(fields):
            return original(model_config, *args, **kwargs)

    return create_model


def wrap_apply_lora_to_model(original: Callable) -> Callable:
    """Adapters by `apply_lora`: a pattern in Tunix's spelling that reaches nothing is refused."""

    @functools.wraps(original)
    def apply_lora_to_model(base_model: Any, mesh: Any, lora_config: Mapping[str, Any], **kwargs):
        if not isinstance(base_model, Gemma4Model):
            return original(base_model, mesh, lora_config, **kwargs)
        model = apply_lora(base_model, read_section(dict(lora_config)))
        return model if mesh is None else shard_model(model, mesh)

    return apply_lora_to_model


def wrap_allocate_named_mesh_device_slices(original: Callable) -> Callable:
    """Devices in their order where they have no coordinates: the host hands out TPUs alone."""

    @functools.wraps(original)
    def allocate_named_mesh_device_slices(
        mesh_requirements: Sequence[tuple[str, int]],
        devices: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, list[Any]]:
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

    return allocate_named_mesh_device_slices
