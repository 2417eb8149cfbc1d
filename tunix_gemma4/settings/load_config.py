# SPDX-License-Identifier: Apache-2.0
"""Composes a dataclass of settings from recipes and overrides, and answers mistakes.

config = load_config(RunConfig, ["lora-image", "e2b"], ["model=gemma-4-E2B-it", "lora.rank=32"])
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import itertools
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from absl import logging
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml.constructor import ConstructorError

from .common import TrainSettings

# configs/ of a clone, by a link; a folder of its own once installed from a wheel.
_ROOT = Path(__file__).parents[1] / "configs"
# Of it, in the order in which recipes are given; the first two are called as the commands.
FOLDERS = ("sft", "grpo", "sizes", "hardware")
_COMMANDS = FOLDERS[:2]
_PLACE = {"sft": 0, "grpo": 0, "sizes": 1, "hardware": 2}
_SHOWN = 5
# Of a file: settings for some companions alone.
_WITH = "with"

Recipes = str | Path | Sequence[str | Path]
Settings = TypeVar("Settings", bound=TrainSettings)

# What other trainers call our fields; difflib alone would not find these. One that a recipe does
# not have is passed over.
_SYNONYMS = {
    theirs: ours
    for ours, names in {
        "batch_size": "per_device_train_batch_size per_device_eval_batch_size train_batch_size",
        "model": "model_name_or_path",
        "data.path": "dataset_name",
        "data.max_length": "max_seq_length max_length",
        "data.max_soft_tokens": "max_soft_tokens",
        "lora.rank": "lora_r",
        "rank": "r",
        "lora.alpha": "lora_alpha",
        "lora.targets": "lora_target_modules module_path",
        "targets": "target_modules",
        "lora.quantize": "load_in_4bit load_in_8bit weight_qtype",
        "dtype": "bf16",
        "remat": "gradient_checkpointing",
        "learning_rate": "lr",
        "num_train_epochs": "num_epochs",
        "output_dir": "overwrite_output_dir",
        "max_completion_length": "max_new_tokens total_generation_steps",
        "reward_functions": "reward_funcs reward_fns",
        "loss_type": "importance_sampling_level loss_algo",
        "beta": "kl_coef",
        "epsilon": "epsilon_low",
        "num_generations": "group_size",
        "train_micro_batch_size": "gradient_accumulation_steps",
    }.items()
    for theirs in names.split()
}
# What adapters of other trainers have, and ours do not.
_ABSENT = ("dropout", "lora_dropout", "bias", "use_dora", "modules_to_save")


def load_config(
    kind: type[Settings],
    recipes: Recipes,
    overrides: Sequence[str] = (),
    *,
    command: str | None = None,
) -> Settings:
    """Reads recipes from left to right, what is behind before what is in front, then overrides.

    A file's section `with` holds settings for some companions alone: `grpo 31b: {...}` is applied,
    behind the rest of the file, where both are among the command and the names of the recipes;
    `*` stands for any letters. A text in place of settings refuses them together, and says why.
    Where `output_dir` is not given it is made of the names, if one is that of a shipped recipe.

    Args:
        kind: the dataclass, with a method `validate`.
        recipes: a path or the name of a shipped recipe, or several; see `find_recipe`.
        overrides: each key=value, such as `data.max_length=1024`.
        command: that is to run it, "sft" or "grpo"; None: that of the recipes.

    Raises:
        ValueError: an unknown key, with the nearest known one; a value of the wrong type; a key
            without a value that needs one; no such file; recipes that do not go together.
    """
    paths = find_recipes(recipes)
    said = " ".join(path.stem if path in _shipped() else str(path) for path in paths)
    command = command or command_of(paths)
    config = OmegaConf.structured(kind)
    sources: dict[str, str] = {}
    for given, texts, source in (*_layers(paths, command), _assigned(overrides)):
        config = _merge(kind, config, _literal(kind, given, texts, source), source)
        sources |= dict.fromkeys(_flat(given), source)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(
            f"{said}: {', '.join(missing)} must be given, in the file or as {missing[0]}=..."
        )
    try:
        for name in sections(kind):  # One that checks itself does not know what it is called here.
            _made(config[name], f"{name}.")
        result = _made(config)
        result.validate()
    except ValueError as error:
        (key,) = re.findall(r"^[\w.]*", str(error))
        raise ValueError(f"{sources.get(key, said)}: {error}") from error
    return result


def _made(config: Any, prefix: str = "") -> Any:
    """The dataclass that `config` is of."""
    try:
        return OmegaConf.to_object(config) if config is not None else None
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def compose(recipes: Recipes) -> dict[str, Any]:
    """What recipes say together, of whichever dataclass; see `load_config`."""
    paths = find_recipes(recipes)
    result: dict[str, Any] = {}
    for given, _, _ in _layers(paths, command_of(paths)):
        result = _over(result, given)
    return result


# ---- Which files are meant.


def recipe_names() -> list[str]:
    """Every shipped recipe, such as "sft/lora-image", in the order in which they are given."""
    return [f"{path.parent.name}/{path.stem}" for path in _shipped()]


def recipe_list() -> str:
    """The shipped recipes, with the first line of each."""
    lines = []
    for folder, paths in itertools.groupby(_shipped(), lambda path: path.parent.name):
        lines.append(f"{folder}:")
        lines += [f"  {path.stem:<13}{_header(path)[0].lstrip('# ')}" for path in paths]
    return "\n".join(lines)


def recipe_text(recipes: Recipes) -> str:
    """What recipes say together as YAML, under the comments that open them; one as it stands."""
    paths = find_recipes(recipes)
    names = " ".join(path.stem for path in paths)
    note = [
        f"# {names}, and what they say with each other; nothing more is said with this",
        "# file, so that a machine is to be named before printing.",
    ]
    if len(paths) == 1:
        return "\n".join([*note, paths[0].read_text("utf-8")])
    lines = [*note, *(line for path in paths for line in _header(path))]
    return "\n".join([*dict.fromkeys(lines), _dump(compose(paths))])


def _header(path: Path) -> list[str]:
    lines = path.read_text("utf-8").splitlines()
    return list(itertools.takewhile(lambda line: line.startswith("#"), lines))


def find_recipes(recipes: Recipes) -> list[Path]:
    """The YAML files that are meant; see `find_recipe`.

    Raises:
        ValueError: there is no such file, or two that are meant in place of each other.
    """
    words = [recipes] if isinstance(recipes, str | Path) else list(recipes)
    if not words or not all(str(word).strip() for word in words):
        found = f"expected a recipe or a YAML file, found {words}"
        raise ValueError(f"{found}; `tunix-gemma4 recipes` lists them")
    paths = [find_recipe(word) for word in words]
    for folder in FOLDERS:
        same = [path.stem for path in paths if path in _shipped() and path.parent.name == folder]
        if len(same) > 1:
            wrong = f"expected one of {folder}, found {len(same)}"
            wrong = "given twice" if len({*same}) == 1 else wrong
            raise ValueError(f"{', '.join(same)}: {wrong}")
    return paths


def find_recipe(where: str | Path) -> Path:
    """The YAML file that is meant.

    Args:
        where: a path; or the name of a shipped recipe, with or without its folder and ".yaml",
            such as "configs/sft/lora-image.yaml", "sft/lora-image" or "lora-image". A file in the
            current folder comes first.

    Raises:
        ValueError: there is neither, with the nearest names.
    """
    given = Path(where)
    with_suffix = given if given.suffix in (".yaml", ".yml") else Path(f"{given}.yaml")
    if with_suffix.is_file():
        shipped = next((path for path in _shipped() if path.samefile(with_suffix)), None)
        if shipped is None and str(where) in [path.stem for path in _shipped()]:
            logging.warning(
                "%s: the file %s is read, not the recipe", where, with_suffix.absolute()
            )
        return shipped or with_suffix
    asked = with_suffix.with_suffix("").as_posix().removeprefix("configs/").replace("_", "-")
    for path in _shipped():
        if asked in (path.stem, f"{path.parent.name}/{path.stem}"):
            return path
    if given.is_file():
        return given
    if given.is_dir():
        raise ValueError(f"{where}: expected a YAML file, found a folder")
    words = _words_in(asked) if Path(asked).parent.name in ("", *_COMMANDS) else None
    if words is not None:
        raise ValueError(
            f"{where}: recipes are composed, write {' '.join(words)}; a run of a former recipe "
            f"of that name, if there is one, goes on with output_dir=outputs/{with_suffix.stem}"
        )
    raise ValueError(
        f"{where}: there is no such file (current folder: {Path.cwd()}) and no recipe of that "
        f"name; {_near(asked)}. `tunix-gemma4 recipes` lists all; settings are key=value"
    )


def command_of(paths: Sequence[Path]) -> str | None:
    """The command of the first shipped recipe that has one; None: files of one's own, sizes."""
    folders = [path.parent.name for path in paths if path in _shipped()]
    return next((folder for folder in folders if folder in _COMMANDS), None)


@functools.cache
def _shipped() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((_ROOT / folder).glob("*.yaml"))]


def _words_in(asked: str) -> list[str] | None:
    """The recipes of which a name is made, as former ones were; None: it is of none, or of one."""
    rest = re.sub(r"[^0-9a-z]", "", asked.split("/")[-1].lower())
    words = []
    for path in sorted(_shipped(), key=lambda path: -len(path.stem)):
        if path.stem.replace("-", "") in rest:
            rest = rest.replace(path.stem.replace("-", ""), " ", 1)
            words.append(path)
    whole = len(words) > 1 and not rest.strip()
    return [path.stem for path in _shipped() if path in words] if whole else None


def _near(asked: str) -> str:
    """The names that come nearest to what was asked for."""
    names, word = [path.stem for path in _shipped()], asked.split("/")[-1].lower()
    close = [word] if word in names else difflib.get_close_matches(word, names, _SHOWN, 0.4)
    if not close:
        return f"there are {len(names)}, such as {', '.join(names[:_SHOWN])}"
    return f"near {'is' if len(close) == 1 else 'are'} {', '.join(close)}"


# ---- What they say, as layers: a tree, the same with texts for numbers, where it stands.

_Layer = tuple[dict, dict, str]


def _layers(paths: Sequence[Path], command: str | None) -> Iterator[_Layer]:
    """Those of files, lowest first; raises ValueError for names that do not go together."""
    for path in paths:
        own = command_of([path])
        if own not in (None, command):
            raise ValueError(f"{path.stem} is a recipe of `{own}`, and this is `{command}`")
    named = [path for path in paths if path in _shipped()]
    # In another order a task would undo what the size and the machine say of it.
    in_order = sorted(named, key=lambda path: _PLACE[path.parent.name])
    if named != in_order:
        raise ValueError(
            f"{' '.join(path.stem for path in named)}: expected a task, a size and a machine in "
            f"this order: {' '.join(path.stem for path in in_order)}"
        )
    # What is left to the defaults trains every parameter, which nobody may want who named a size.
    if named == list(paths) and command_of(paths) is None:
        wanted = _COMMANDS if command is None else (command,)
        tasks = [path.stem for path in _shipped() if path.parent.name in wanted]
        given = " ".join(path.stem for path in named)
        raise ValueError(f"{given}: expected a task before it, one of {', '.join(tasks)}")
    shipped = {path.stem for path in named}
    if shipped:
        place = f"outputs/{'_'.join(path.stem for path in paths)}"
        yield {"output_dir": place}, {"output_dir": place}, "the recipes' names"
    for path in paths:
        given, texts, source = _file(path)
        blocks, beside = given.pop(_WITH, None), texts.pop(_WITH, None) or {}
        yield given, texts, source
        if not isinstance(blocks, dict | None):
            raise ValueError(f"{source}: with: expected keys and values, found {blocks!r:.80}")
        for words, block in (blocks or {}).items():
            if words is None or not str(words).strip():
                raise ValueError(f"{source}: with: expected names of recipes, found {words!r}")
            where = f"{source}: with {words}"
            if not isinstance(block, dict | str) or block == "":
                expected = "keys and values, or a text that says why they do not go together"
                raise ValueError(f"{where}: expected {expected}, found {block!r:.80}")
            if not _applies(str(words), shipped | {command or ""}, where):
                continue
            if not isinstance(block, dict):
                raise ValueError(f"{where}: {block}")
            yield block, beside[words], where


def _applies(words: str, names: set[str], where: str) -> bool:
    """Whether each of `words` is among `names`; one that could not be is an error."""
    for word in words.split():
        if not fnmatch.filter([*_COMMANDS, *(path.stem for path in _shipped())], word):
            raise ValueError(f"{where}: there is no recipe {word!r}; {_near(word)}")
    return all(fnmatch.filter(names, word) for word in words.split())


def _flat(tree: dict, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a tree, those of sections too."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def _over(below: dict, above: dict) -> dict:
    """Both trees; where they differ, the one above."""
    both = {
        key: _over(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | both


# ---- From a tree to the dataclass.


def to_yaml(config: TrainSettings) -> str:
    """All settings, as `load_config` reads them."""
    return _dump(dataclasses.asdict(config))


def _dump(tree: dict) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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
        if isinstance(choice, type) and dataclasses.is_dataclass(choice)
    }


def _merge(kind: type, config: Any, given: dict, source: str) -> Any:
    try:
        return OmegaConf.merge(config, given)
    except ConfigKeyError as error:
        raise ValueError(f"{source}: {_unknown(kind, str(error.full_key))}") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = str(error.full_key or "").partition("[")[0]  # That of a list, for an item of it.
        hint, found = _at(kind, given, key)
        if hint is not None:
            reason = f"expected {_words(hint)}, found {json.dumps(found, default=str):.80}"
        raise ValueError(": ".join(filter(None, (source, key, reason)))) from error


def _at(kind: Any, given: Any, key: str) -> tuple[Any, Any]:
    """The type of a dotted key and what was given for it; a pair of None where there is none."""
    hint = kind
    for name in key.split("."):
        kind = next(
            (one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None
        )
        if kind is None or not isinstance(given, dict) or name not in given:
            return None, None
        hint, given = typing.get_type_hints(kind).get(name), given[name]
    return hint, given


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _words(hint: Any) -> str:
    """A type as a message says it."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    names |= {list: "a list", dict: "keys and values", type(None): "null"}
    choices = typing.get_args(hint) if _is_union(hint) else (hint,)
    found = (names.get(typing.get_origin(one) or one, "keys and values") for one in choices)
    return " or ".join(dict.fromkeys(found))


# ---- YAML 1.2. In 1.1, which PyYAML and OmegaConf read, `yes` is true, 010 is 8 and 1:30 is 90.


class _Texts(yaml.SafeLoader):
    """Numbers are the texts that stand there."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and str(key.value) in found:
                raise ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            found.add(str(key.value))  # That of a list is no text.
        return super().construct_mapping(node, deep)


class _Loader(_Texts):
    """All of version 1.2's core schema."""


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


class _Dumper(yaml.SafeDumper):
    """Quotes what version 1.1 or 1.2 would not read as a text."""


_Texts.yaml_implicit_resolvers, _Loader.yaml_implicit_resolvers = {}, {}
for _loader, _scalars in ((_Texts, _WORDS), (_Loader, _WORDS | _NUMBERS), (_Dumper, _NUMBERS)):
    for _name, (_form, _first) in _scalars.items():
        _loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_form})$"), _first
        )


def _file(path: Path) -> _Layer:
    """A file's layer."""
    try:
        text = path.read_text("utf-8-sig")
        given, texts = read_yaml(text), yaml.load(text, _Texts)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(given, dict | None):
        raise ValueError(f"{path}: expected keys and values, found {given!r:.80}")
    return given or {}, texts or {}, str(path)


def _assigned(overrides: Sequence[str]) -> _Layer:
    """That of overrides. The text of one is whole, whatever YAML would make of it."""
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
                    f"{override!r}: its value is not readable as YAML: {reason}; a text that "
                    f"begins with {text.lstrip()[0]} stands in quotes, those of the shell around it"
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

    `hint` is the field's type, and `texts` are its value with texts for numbers. Messages name
    `source` and `key`.

    Raises:
        ValueError: for what is no text where one is wanted, or no keys and values.
    """
    is_union = _is_union(hint)
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
        fields = dataclasses.fields(kind)[:3] if kind is not None else ()
        words = [f"{key}.{field.name}=..." for field in fields] + [
            f"{key}=null for none"
        ] * is_union
        where += f"expected keys and values, found {given!r:.80}; as KEY=VALUE: "
        raise ValueError(where + ", ".join(words))
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
    section, _, last = key.rpartition(".")
    if key in known and section:
        return f"unknown key {key!r}; sections nest in a file: `{section}: {{{last}: ...}}`"
    if last in _ABSENT:
        return f"unknown key {key!r}; adapters have no {last.removeprefix('lora_')}, leave it out"
    nearest = _SYNONYMS.get(key) or _SYNONYMS.get(last)
    if nearest is None or nearest not in known:
        # A key may be right but stand at the wrong level.
        at_other_level = [name for name in known if name.split(".")[-1] == last]
        section = key.removesuffix(last)
        within = [name for name in known if name == section + name.split(".")[-1]]
        ends = difflib.get_close_matches(last, [name.split(".")[-1] for name in within], n=1)
        close = at_other_level or [section + end for end in ends]
        if section and not close:  # Its own name counts, and a section may be misspelt.
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
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
