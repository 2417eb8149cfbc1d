# SPDX-License-Identifier: Apache-2.0
"""Which projections a LoRA target names: ours, Hugging Face's or Tunix's names."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from flax import nnx

from ..checkpoint.names import SCORE
from ..model.gemma4 import require_single_layers

_SEVEN = r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
_LANGUAGE = rf"language_model\.layers\.\d+\.{_SEVEN}"
_VISION = rf"vision_tower\.encoder\.layers\.\d+\.{_SEVEN}\.linear"
_PRESETS = {"language": _LANGUAGE, "vision": _VISION, "all": f"{_LANGUAGE}|{_VISION}"}

# Tunix's name of a projection, by ours. Where keys double as values Tunix calls them `k_einsum`;
# `kv_einsum` reaches those too, since a recipe that names it means every key and value.
_TUNIX = {
    "self_attn.q_proj": ("attn/q_einsum",),
    "self_attn.k_proj": ("attn/kv_einsum",),
    "self_attn.v_proj": ("attn/kv_einsum",),
    "self_attn.o_proj": ("attn/attn_vec_einsum",),
}
_TUNIX_K_EQ_V = ("attn/kv_einsum", "attn/k_einsum")


def linears(model: nnx.Module) -> dict[str, nnx.Linear]:
    """Every projection that can carry an adapter, by dotted name, in the order of the layers.

    The router is left out: it decides in float32 and is no place for a low-rank nudge. Experts
    are no `nnx.Linear`.
    """
    found = {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear) and "router" not in path
    }
    return {name: found[name] for name in sorted(found, key=natural_key)}


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    parts = name.split(".")
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def resolve(model: nnx.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the projections that `targets` means.

    A regular expression has to match all of a name: the dotted one (`language_model.layers.0.
    self_attn.q_proj`, with or without HF's leading `model.`), the same with slashes, or its last
    word alone (`q_proj`; for vision too, where the name ends in `.linear`). One that contains
    `einsum` is read as Tunix's and matches Tunix's names of the text decoder. Of a list each entry
    is the end of a name, as in PEFT.

    Raises:
        ValueError: for a pattern that is invalid or reaches experts, and for one of which any
            alternative, or entry, reaches nothing.
    """
    require_single_layers(model)
    names = list(linears(model))
    if isinstance(targets, str) and targets in _PRESETS:
        found = [name for name in names if re.fullmatch(_PRESETS[targets], name)]
        if not found:
            raise ValueError(
                f"targets={targets!r}: this model has no such projections; it was built without "
                f"vision (text_only=True, or a config that has none).\n{_what_could_match(names)}"
            )
        return found
    reached: set[str] = set()
    for entry, pattern in check_targets(targets).items():
        _refuse_experts(model, entry, pattern)
        of_tunix = is_tunix_pattern(entry)
        words = (_tunix_names(name, names) if of_tunix else _own_names(name) for name in names)
        spellings = dict(zip(names, words, strict=True))
        require_reached(f"targets={entry!r}", pattern.pattern, spellings)
        reached |= {name for name in names if any(map(pattern.fullmatch, spellings[name]))}
    return [name for name in names if name in reached]


def check_targets(targets: str | Sequence[str]) -> dict[str, re.Pattern]:
    """Each entry of `targets`, and what it matches.

    Raises:
        ValueError: for what is no regular expression and no list of names.
    """
    if targets in ("all-linear", ["all-linear"], ("all-linear",)):  # PEFT's word.
        raise ValueError(f"targets: write 'all', or 'language' without vision; found {targets!r}")
    if isinstance(targets, str):
        try:
            return {targets: re.compile(targets)}
        except re.error as error:
            raise ValueError(f"targets={targets!r}: not a regular expression ({error})") from error
    entries = list(targets) if isinstance(targets, list | tuple) else []
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise ValueError(
            f"targets: expected a name, a regular expression or a list of names, found {targets!r}"
        )
    for entry in entries:
        if entry in _PRESETS or not re.fullmatch(r"[\w./]+", entry):
            raise ValueError(
                f"targets: entries of a list are ends of names, found {entry!r}; a regular "
                f"expression or one of {', '.join(_PRESETS)} stands alone: targets={entry!r}"
            )
    # Projections of the vision tower have one more word in their names.
    ends = {entry: rf"(?:.*[./])?{re.escape(entry)}(?:\.linear)?" for entry in entries}
    return {entry: re.compile(end) for entry, end in ends.items()}


def is_tunix_pattern(pattern: str) -> bool:
    """Whether a pattern names projections as Tunix does."""
    return "einsum" in pattern


def require_reached(what: str, pattern: str, spellings: dict[str, list[str]]) -> None:
    """Raises ValueError where `pattern`, or an alternative in it, reaches none of the projections.

    It has to match all of one of a projection's `spellings`; messages call it `what`.
    """
    words = [word for several in spellings.values() for word in several]

    def reaches(expression: str) -> bool:
        try:
            return any(map(re.compile(expression).fullmatch, words))
        except re.error:  # A part may refer to a group that stands in another.
            return True

    hint = "\nOne with 'einsum' is read in Tunix's names of the text decoder alone."
    hint = _what_could_match(list(spellings)) + (hint if is_tunix_pattern(pattern) else "")
    if not reaches(pattern):
        raise ValueError(f"{what} matches no projection of this model.\n{hint}")
    idle = [part for part, alone in alternatives(pattern) if not reaches(alone)]
    if idle:
        parts = ", ".join(map(repr, dict.fromkeys(idle)))
        wrong = f"{parts} matches no projection of this model; leave it out or correct it"
        raise ValueError(f"{what}: {wrong}.\n{hint}")


class _Group(NamedTuple):
    """What stands between parentheses, or the whole of a regular expression.

    Attributes:
        start, end: its bounds, without the parentheses and what opens them.
        bars: where alternatives part.
        parent: the group around it.
        whole: its alternatives only mean something together: it is repeated, or looks around.
    """

    start: int
    end: int
    bars: list[int]
    parent: _Group | None
    whole: bool

    def ranges(self) -> list[tuple[int, int]]:
        starts = [self.start, *(bar + 1 for bar in self.bars)]
        return list(zip(starts, [*self.bars, self.end], strict=True))


def alternatives(pattern: str) -> Iterator[tuple[str, str]]:
    """Each alternative of a regular expression, and the expression with no other in its place."""
    found = re.match(r"(?:\(\?[aiLmsux]+\))*", pattern)
    flags = found[0] if found else ""
    if "x" in flags:  # Comments might hold anything.
        return
    for group in _groups(pattern, len(flags)):
        if not group.bars or group.whole:
            continue
        for start, end in group.ranges():
            text, child = pattern[start:end], group
            while child.parent is not None:
                around = child.parent.ranges()
                left, right = next(bounds for bounds in around if bounds[1] >= child.end)
                text = pattern[left : child.start] + text + pattern[child.end : right]
                child = child.parent
            yield pattern[start:end], flags + text


def _groups(pattern: str, start: int) -> list[_Group]:
    """The groups of a valid regular expression, the outermost first."""
    skipped = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|\(\?P=\w+\)", re.DOTALL)
    opening = re.compile(r"\((\?(?:P<\w+>|[aiLmsux-]*:|>|<?[=!]|\(\w+\)))?")
    open_, closed = [(start, [], False)], []
    position = start
    while position < len(pattern):
        if found := skipped.match(pattern, position):
            position = found.end()
            continue
        letter = pattern[position]
        if letter == "(" and (found := opening.match(pattern, position)):
            kind = found.group(1) or ""
            open_.append((found.end(), [], kind.endswith(("=", "!")) or kind.startswith("?(")))
            position = found.end()
            continue
        if letter == "|":
            open_[-1][1].append(position)
        elif letter == ")":
            looks = open_.pop()
            repeated = pattern[position + 1 : position + 2] in ("*", "+", "{")
            closed.append((len(open_), *looks[:2], position, looks[2] or repeated))
        position += 1
    closed.append((0, *open_[0][:2], len(pattern), False))
    result: list[_Group] = []
    for depth, begin, bars, end, whole in sorted(closed):
        around = [group for group in result if group.start <= begin and end <= group.end]
        parent = around[-1] if around and depth else None
        whole = whole or (parent is not None and parent.whole)
        result.append(_Group(begin, end, bars, parent, whole))
    return result


def with_head(model: nnx.Module, names: list[str]) -> list[str]:
    """`names` and, if `model` scores tokens, its head."""
    return list(dict.fromkeys([*names, SCORE])) if hasattr(model, SCORE) else names


def _own_names(name: str) -> list[str]:
    words = name.split(".")
    last = words[-2] if words[-1] == "linear" else words[-1]
    full = f"model.{name}"
    return [name, full, name.replace(".", "/"), full.replace(".", "/"), last]


def _tunix_names(name: str, names: list[str]) -> list[str]:
    match = re.fullmatch(r"language_model\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return []
    index, own = match.groups()
    k_eq_v = name.endswith(".k_proj") and name.replace(".k_proj", ".v_proj") not in names
    tails = _TUNIX_K_EQ_V if k_eq_v else _TUNIX.get(own, (own.replace(".", "/"),))
    paths = [f"layers/{index}/{tail}" for tail in tails]
    return [*paths, *(tail.split("/")[-1] for tail in tails)]


def _refuse_experts(model: nnx.Module, targets: str, pattern: re.Pattern) -> None:
    modules = [".".join(map(str, path)) for path, _ in nnx.iter_modules(model)]
    experts = [_own_names(name) for name in modules if name.endswith(".experts")]
    reached = any(pattern.fullmatch(word) for words in experts for word in words)
    if reached or (experts and "experts" in targets):
        raise ValueError(
            f"targets={targets!r} reaches the experts (language_model.layers.*.experts), which "
            "cannot carry adapters: their [E, D, F] kernels are no projections. "
            "Name projections one by one, for example 'q_proj|v_proj', or use "
            f"targets='language'.\n{_what_could_match(list(linears(model)))}"
        )


def grouped(names: Iterable[str]) -> dict[str, int]:
    """How many names there are of each kind, layer numbers replaced by `*`."""
    return collections.Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)


def _what_could_match(names: list[str]) -> str:
    lines = [f"  {name} ({count})" for name, count in grouped(names).items()]
    return "\n".join(["It could match:", *lines])


def as_regex(names: Iterable[str]) -> str:
    """A regular expression that fully matches these names and no others.

    Layers that have the same modules share a branch, so that it stays readable.
    """
    layers: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    single = []
    for name in names:
        if match := re.fullmatch(r"(.*\.layers)\.(\d+)\.(.*)", name):
            prefix, index, tail = match.groups()
            layers[prefix, tail].append(index)
        else:
            single.append(re.escape(name))
    branches: dict[tuple[str, tuple[str, ...]], list[str]] = collections.defaultdict(list)
    for (prefix, tail), indices in layers.items():
        branches[prefix, tuple(indices)].append(tail)
    joined = [
        rf"{re.escape(prefix)}\.(?:{'|'.join(indices)})\.(?:{'|'.join(map(re.escape, tails))})"
        for (prefix, indices), tails in branches.items()
    ]
    return "|".join([*joined, *single])
