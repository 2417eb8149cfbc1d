# SPDX-License-Identifier: Apache-2.0
"""Reads a dataclass of settings from YAML with dotted overrides, and answers mistakes.

config = load_config(RunConfig, "e2b_lora_image", ["model=gemma-4-E2B-it", "lora.rank=32"])
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml.constructor import ConstructorError

from .common import TrainSettings
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
    for given, texts, source in (_file(path), _assigned(overrides)):
        if not isinstance(given, dict):
            raise ValueError(f"{source}: expected keys and values, found {given!r:.80}")
        config = _merge(kind, config, _literal(kind, given, texts, source), source)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(
            f"{path}: {', '.join(missing)} must be given, in the file or as {missing[0]}=..."
        )
    try:
        for name in sections(kind):  # One that checks itself does not know what it is called here.
            _made(config[name], f"{name}.")
        result = _made(config)
        result.validate()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return result


def _made(config: DictConfig | None, prefix: str = "") -> Any:
    """The dataclass that `config` is of."""
    try:
        return OmegaConf.to_object(config) if config is not None else None
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def to_yaml(config: TrainSettings) -> str:
    """All settings, as `load_config` reads them."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def read_yaml(text: str) -> Any:
    """What YAML 1.2 says; raises yaml.YAMLError, also for a key that is there twice."""
    return yaml.load(text, _Loader)


def sections(kind: type) -> dict[str, type]:
    """The dataclasses among the fields of `kind`, by name."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: choice
        for field in dataclasses.fields(kind)
        for choice in (hints[field.name], *typing.get_args(hints[field.name]))
        if dataclasses.is_dataclass(choice)
    }


def _merge(kind: type, config: DictConfig, given: dict, source: str) -> DictConfig:
    try:
        return OmegaConf.merge(config, given)
    except ConfigKeyError as error:
        raise ValueError(f"{source}: {_unknown(kind, error.full_key)}") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{source}: {key}{reason}") from error


# ---- YAML 1.2. In 1.1, which PyYAML and OmegaConf read, `yes` is true, 010 is 8 and 1:30 is 90.


class _Texts(yaml.SafeLoader):
    """Numbers are the texts that stand there."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in found:
                raise ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            found.add(key.value)
        return super().construct_mapping(node, deep)


class _Loader(_Texts):
    """All of version 1.2's core schema."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


_WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "merge": (r"<<", ["<"]),
}
_NUMBERS = {
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _loader, _scalars in ((_Texts, _WORDS), (_Loader, _WORDS | _NUMBERS)):
    for _name, (_form, _first) in _scalars.items():
        _loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_form})$"), _first
        )


def _file(path: Path) -> tuple[Any, Any, str]:
    """A file's tree, the same with texts for numbers, and its name."""
    try:
        text = path.read_text("utf-8-sig")
        given, texts = read_yaml(text), yaml.load(text, _Texts)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    return ({}, {}, str(path)) if given is None else (given, texts, str(path))


def _assigned(overrides: Sequence[str]) -> tuple[dict, dict, str]:
    """The like of overrides. The text of one is whole, whatever YAML would make of it."""
    given: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ValueError(f"{override!r}: expected key=value, such as learning_rate=1e-4")
        is_plain = text.lstrip()[:1] not in tuple("[{\"'")
        try:
            values = read_yaml(text), yaml.load(text, _Texts)
        except yaml.YAMLError as error:
            if not is_plain:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{override!r}: its value is not readable as YAML: {reason}"
                ) from error
            values = text, text
        # `a: b` and `a #b` are texts where one is wanted; null and switches are not.
        is_word = values[1] is None or isinstance(values[1], bool)
        whole = text.strip() if is_plain and not is_word else values[1]
        for tree, value in ((given, values[0]), (texts, _Whole(values[1], whole))):
            for part in parts[:-1]:
                tree[part] = tree = tree[part] if isinstance(tree.get(part), dict) else {}
            tree[parts[-1]] = value
    return given, texts, "the command line"


class _Whole(typing.NamedTuple):
    """A value of the command line: parsed, and for a field that is a text."""

    parsed: Any
    text: Any


def _literal(hint: Any, given: Any, texts: Any, source: str, key: str = "") -> Any:
    """`given` with every text as it stands there, for OmegaConf, which would interpolate.

    Args:
        hint: the field's type.
        given: its value.
        texts: the same with texts for numbers.
        source, key: for messages.

    Raises:
        ValueError: for what is no text where one is wanted, or no keys and values.
    """
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = {*typing.get_args(hint)} - {type(None)} if is_union else {hint}
    of_list = next((one for one in choices if typing.get_origin(one) is list), None)
    if isinstance(texts, _Whole):
        texts = texts.text if choices == {str} else texts.parsed
    kind = next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)
    if isinstance(given, dict):
        hints = typing.get_type_hints(kind) if kind is not None else {}
        beside = texts if isinstance(texts, dict) else {}
        result = {
            name: _literal(
                hints.get(name, Any), value, beside.get(name), source, f"{key}.{name}".lstrip(".")
            )
            for name, value in given.items()
        }
        if choices != {str}:
            return result
    where = f"{source}: {key}: "
    of_keys = kind is not None or any(typing.get_origin(one) is dict for one in choices)
    if given is not None and of_keys:
        raise ValueError(f"{where}expected keys and values, found {given!r:.80}")
    if isinstance(given, list) and choices != {str}:
        (inner,) = typing.get_args(of_list) if of_list else (Any,)
        return [_literal(inner, *both, source, key) for both in zip(given, texts, strict=True)]
    if given is not None and choices == {of_list}:
        raise ValueError(f"{where}expected a list, found {given!r:.80}")
    if choices == {str} and given is not None:
        if isinstance(texts, bool | dict | list):
            found = json.dumps(given, default=str)
            raise ValueError(f"{where}expected a text, found {found:.80}; quote it if it is one")
        given = texts
    if given == "???":
        raise ValueError(f"{where}'???' stands for a value that is missing; give one")
    return _escaped(given) if isinstance(given, str) else given


def _escaped(text: str) -> str:
    r"""What OmegaConf reads as `text`: `${` is written `\${` there, backslashes before it twice."""
    return re.sub(r"(\\*)\$\{", lambda found: f"{found[1]}{found[1]}\\${{", text)


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
