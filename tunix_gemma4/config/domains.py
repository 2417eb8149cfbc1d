# SPDX-License-Identifier: Apache-2.0
"""What every number that a user may set can be: one table, whose conditions NaN fails."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Domain:
    """The numbers from `low` to `high`, as float32 has them, or whole ones.

    Attributes:
        low, high: bounds; infinity is never within.
        low_open, high_open: whether the bound itself is not.
        whole: whether only integers are.
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is such a number."""
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return False
        if self.whole:
            if not isinstance(value, numbers.Integral):
                return False
        else:
            given, value = value, _in_float32(value)  # 1e39 is infinite in a step,
            if value == 0 != given:  # and 1e-50 is 0, which is not what it says.
                return False
        return self.bounds(value)

    def bounds(self, value: float) -> bool:
        """Whether a number is finite and within, whatever its type can hold."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return abs(value) < math.inf and above and below

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.low_open else 'at least'} {self.low:g}")
        if self.high < math.inf:
            high = self.high if self.whole else f"{self.high:g}"
            parts.append(f"{'below' if self.high_open else 'at most'} {high}")
        return " and ".join(parts) or f"a {'whole' if self.whole else 'finite'} number"


def _in_float32(value: Any) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


_COUNT = Domain(low=1, whole=True)
_COUNT_OR_NONE = Domain(low=0, whole=True)
_SIZE = Domain(low=0)
_ABOVE = Domain(low=0, low_open=True)
_DECAY = Domain(low=0, high=1, high_open=True)
_PART = Domain(low=0, high=1, low_open=True)

# By name of a field or an argument, which means the same wherever it stands; where it does not,
# by the owner's name as well. Null is no number, and for the type of a field to allow.
DOMAINS: dict[str, Domain] = {
    # Length of a run, and what happens how often.
    "max_steps": _COUNT,
    "num_train_epochs": _COUNT,
    "num_epochs": _COUNT,
    "total_steps": _COUNT,
    "logging_steps": _COUNT,
    "eval_steps": _COUNT,
    "eval_every_n_steps": _COUNT,
    "save_steps": _COUNT,
    "save_total_limit": _COUNT,
    "keep_steps": _COUNT,
    "reward_timeout": _ABOVE,
    "warmup_steps": _COUNT_OR_NONE,
    "max_skipped_steps": _COUNT_OR_NONE,
    "max_inflight_computations": Domain(whole=True),  # At most 0 is no limit.
    # The optimizer. A rate of 0 trains nothing, which may be wanted; a norm of 0 never clips.
    "learning_rate": _SIZE,
    "weight_decay": _SIZE,
    "max_grad_norm": _SIZE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "b1": _DECAY,
    "b2": _DECAY,
    "adam_epsilon": _ABOVE,
    "eps": _ABOVE,
    # The model and its place.
    "rank": _COUNT,
    "alpha": _ABOVE,
    "tile_size": _COUNT,
    "fsdp": _COUNT,
    "tp": _COUNT,
    # Data.
    "max_length": _COUNT,
    "max_soft_tokens": _COUNT,
    "image_buckets": _COUNT_OR_NONE,
    "bucket_lengths": _COUNT,
    "batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "prefetch": _COUNT_OR_NONE,
    "max_prompt_length": _COUNT,
    "max_response_length": _COUNT,
    "max_seq_token_per_tpu": _COUNT,
    "seed": Domain(low=0, high=2**32 - 1, whole=True),
    # Sampling and rewards.
    "num_generations": Domain(low=2, whole=True),
    "num_iterations": _COUNT,
    "max_completion_length": _COUNT,
    "max_new_tokens": _COUNT,
    "image_repeats": _COUNT,
    "temperature": _ABOVE,
    "generate.temperature": _SIZE,  # 0 is greedy.
    "top_p": _PART,
    "top_k": _COUNT,
    "beta": _SIZE,
    "epsilon": _ABOVE,
    "epsilon_high": _ABOVE,
    "reward_weights": Domain(),
    "mini_batch_size": _COUNT,
    "train_micro_batch_size": _COUNT,
    "rollout_micro_batch_size": _COUNT,
    "compute_logps_micro_batch_size": _COUNT,
    # Files.
    "max_shard_bytes": _COUNT,
}


def domain(name: str, owner: str = "") -> Domain:
    """Of a field or argument; without an entry of its own it must at least be finite."""
    name = name.rpartition(".")[2]
    return DOMAINS.get(f"{owner}.{name}") or DOMAINS.get(name) or Domain()


def require(owner: str = "", prefix: str = "", **values: Any) -> None:
    """Raises ValueError naming the first value outside its domain.

    Args:
        owner: function or class, where a name does not mean the same in all of them.
        prefix: of the names in messages, such as "lora.".
        **values: numbers, or sequences of them; None passes.
    """
    for name, value in values.items():
        allowed = domain(name, owner)
        several = isinstance(value, list | tuple)
        for one in value if several else (value,):
            if value is not None and not allowed.holds(one):
                expected, found = _unlike(allowed, one)
                raise ValueError(f"{prefix}{name}: expected {expected}, found {found}")


def _unlike(allowed: Domain, one: Any) -> tuple[str, str]:
    """What was expected, and what was found in its place, so that one does not seem the other."""
    expected, found = str(allowed), repr(one)
    if allowed.whole:
        is_whole = isinstance(one, numbers.Integral) or allowed.low == -math.inf
        return expected if is_whole else f"a whole number of {expected}", found
    one = one.item() if getattr(one, "ndim", None) == 0 else one
    if isinstance(one, bool) or not isinstance(one, numbers.Real):
        return expected, found
    if not math.isfinite(one):
        return expected if allowed == Domain() else f"a finite number, {expected}", found
    held = _in_float32(one)
    if held == 0 != one:
        return f"{expected}, as float32 holds it without becoming 0", found
    if not math.isfinite(held) or allowed.bounds(one):
        return f"{expected}, as float32 holds it", f"{found}, which is {held:g} there"
    return expected, found


def require_fields(settings: Any, prefix: str = "") -> None:
    """Raises ValueError naming the first number in a dataclass that is outside its domain.

    Dataclasses within are looked at too; None passes where the field's type has it.
    """
    kind = type(settings)
    for name, optional in numeric_fields(kind):
        value = getattr(settings, name)
        if value is None and not optional:
            raise ValueError(f"{prefix}{name}: expected {domain(name, kind.__name__)}, found None")
        require(kind.__name__, prefix, **{name: value})
    for field in dataclasses.fields(kind):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            require_fields(value, f"{prefix}{field.name}.")


def numeric_fields(kind: type) -> Iterator[tuple[str, bool]]:
    """The fields of a dataclass that are numbers or sequences of them, and whether None is too."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        choices = _choices(hints[field.name])
        if {int, float} & choices:
            yield field.name, type(None) in choices


def _choices(hint: Any) -> set[Any]:
    """The types that a hint allows, those within lists and tuples for the lists and tuples."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType, list, tuple):
        return set().union(*(_choices(inner) for inner in typing.get_args(hint)))
    return {hint}
