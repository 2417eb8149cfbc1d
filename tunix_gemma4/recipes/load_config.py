# SPDX-License-Identifier: Apache-2.0
"""Reads a dataclass of settings from YAML with dotted overrides, and answers mistakes.

config = load_config(RunConfig, "e2b_lora_image", ["model=gemma-4-E2B-it", "lora.rank=32"])
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from .settings import TrainSettings
from .shipped import command_of, find_recipe

Settings = TypeVar("Settings", bound=TrainSettings)

# What other trainers call our fields; difflib alone would not find these. One that a recipe does
# not have is passed over.
_SYNONYMS = {
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "model_name_or_path": "model",
    "dataset_name": "data.path",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "max_soft_tokens": "data.max_soft_tokens",
    "lora_r": "lora.rank",
    "r": "rank",
    "lora_alpha": "lora.alpha",
    "lora_target_modules": "lora.targets",
    "target_modules": "targets",
    "load_in_4bit": "lora.quantize",
    "load_in_8bit": "lora.quantize",
    "bf16": "dtype",
    "gradient_checkpointing": "remat",
    "lr": "learning_rate",
    "num_epochs": "num_train_epochs",
    "overwrite_output_dir": "output_dir",
    "max_new_tokens": "max_completion_length",
    "total_generation_steps": "max_completion_length",
    "reward_funcs": "reward_functions",
    "reward_fns": "reward_functions",
    "importance_sampling_level": "loss_type",
    "loss_algo": "loss_type",
    "kl_coef": "beta",
    "epsilon_low": "epsilon",
    "group_size": "num_generations",
    "gradient_accumulation_steps": "train_micro_batch_size",
}


def load_config(
    kind: type[Settings],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    command: str | None = None,
) -> Settings:
    """Reads a YAML file and applies overrides such as `data.max_length=1024`.

    Args:
        kind: the dataclass, with a method `validate`.
        path: of the file, or the name of a shipped recipe; see `shipped.find_recipe`.
        overrides: each key=value.
        command: that is to run it, for shipped recipes of another.

    Raises:
        ValueError: an unknown key, with the nearest known one; a value of the wrong type; a key
            without a value that needs one; no such file.
    """
    path = find_recipe(path)
    own = command_of(path)
    if command is not None and own not in (None, command):
        raise ValueError(f"{path.stem} is a recipe of `{own}`, and this is `{command}`")
    config = OmegaConf.structured(kind)
    try:
        given = OmegaConf.load(path)
    except Exception as error:  # YAML's own errors have no common class that omegaconf exports.
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(given, DictConfig):
        raise ValueError(f"{path}: expected keys and values, found a list")
    config = _merge(kind, config, given, str(path))
    config = _merge(kind, config, _parsed(overrides), "the command line")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(
            f"{path}: {', '.join(missing)} must be given, in the file or as {missing[0]}=..."
        )
    result = OmegaConf.to_object(config)
    try:
        result.validate()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return result


def to_yaml(config: TrainSettings) -> str:
    """All settings, as `load_config` reads them."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def sections(kind: type) -> dict[str, type]:
    """The dataclasses among the fields of `kind`, by name."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: choice
        for field in dataclasses.fields(kind)
        for choice in (hints[field.name], *typing.get_args(hints[field.name]))
        if dataclasses.is_dataclass(choice)
    }


def _merge(kind: type, config: DictConfig, given: DictConfig, source: str) -> DictConfig:
    try:
        return OmegaConf.merge(config, given)
    except ConfigKeyError as error:
        raise ValueError(f"{source}: {_unknown(kind, error.full_key)}") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{source}: {key}{reason}") from error


def _parsed(overrides: Sequence[str]) -> DictConfig:
    """The overrides as one tree."""
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise ValueError(f"{override!r}: expected key=value, such as learning_rate=1e-4")
        try:
            OmegaConf.from_dotlist([override])
        except Exception as error:  # As above.
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{override!r}: its value is not readable as YAML: {reason}"
            ) from error
    return OmegaConf.from_dotlist(list(overrides))


def _unknown(kind: type, key: str) -> str:
    """`key` is unknown; the nearest key that is known."""
    known = list(_keys(kind))
    last = key.split(".")[-1]
    nearest = _SYNONYMS.get(key) or _SYNONYMS.get(last)
    if nearest is None or nearest not in known:
        # A key may be right but stand at the wrong level.
        at_other_level = [name for name in known if name.split(".")[-1] == last]
        section = key.removesuffix(last)
        within = [name for name in known if name == section + name.split(".")[-1]]
        ends = difflib.get_close_matches(last, [name.split(".")[-1] for name in within], n=1)
        close = at_other_level or [section + end for end in ends]
        close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        # The section itself is no help.
        nearest = close[0] if close and not key.startswith(f"{close[0]}.") else None
        known = within or known
    hint = f"did you mean {nearest!r}?" if nearest else f"known are {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    inner = sections(kind)
    for field in dataclasses.fields(kind):
        yield prefix + field.name
        if field.name in inner:
            yield from _keys(inner[field.name], f"{prefix}{field.name}.")
