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
    """The numbers from `low` to `high`, as float32 has them, or whole ones."""

    low: float = -math.inf  # infinity is never within
    high: float = math.inf
    low_open: bool = False  # whether the bound itself is not within
    high_open: bool = False
    whole: bool = False  # whether only integers are
    also: int | None = None  # a number outside that means something of its own

    def holds(self, value: Any) -> bool:
        """Whether `value` is such a number."""
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return False
        if self.whole:
            return isinstance(value, numbers.Integral) and self.bounds(value)
        held = _in_float32(value)  # 1e39 is infinite in a step,
        if held == 0 != value:  # and 1e-50 is 0, which is not what it says.
            return False
        return self.bounds(held)

    def bounds(self, value: Any) -> bool:
        """Whether a number is finite and within, whatever its type can hold."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return value == self.also or (abs(value) < math.inf and above and below)

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.low_open else 'at least'} {self.low:g}")
        if self.high < math.inf:
            high = self.high if self.whole else f"{self.high:g}"
            parts.append(f"{'below' if self.high_open else 'at most'} {high}")
        also = "" if self.also is None else f", or {self.also}"
        return (" and ".join(parts) or f"a {'whole' if self.whole else 'finite'} number") + also


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
    name: allowed
    for allowed, names in (
        # Length of a run, and what happens how often.
        (_COUNT, "max_steps num_train_epochs num_epochs total_steps logging_steps eval_steps"),
        (_COUNT, "eval_every_n_steps save_steps save_total_limit keep_steps"),
        (_COUNT_OR_NONE, "warmup_steps max_skipped_steps"),
        (_ABOVE, "reward_timeout"),
        (Domain(whole=True), "max_inflight_computations"),  # At most 0 is no limit.
        # The optimizer. A rate of 0 trains nothing, which may be wanted; a norm of 0 never clips.
        (_SIZE, "learning_rate weight_decay max_grad_norm"),
        (_DECAY, "adam_beta1 adam_beta2 b1 b2"),
        (_ABOVE, "adam_epsilon eps"),
        # The model and its place.
        (_COUNT, "rank tile_size tp"),
        (dataclasses.replace(_COUNT, also=-1), "fsdp"),  # All that are left.
        (_ABOVE, "alpha"),
        # Data.
        (_COUNT, "max_length max_soft_tokens bucket_lengths batch_size max_prompt_length"),
        (_COUNT, "gradient_accumulation_steps max_response_length max_seq_token_per_tpu"),
        (_COUNT_OR_NONE, "image_buckets prefetch"),
        (Domain(low=0, high=2**32 - 1, whole=True), "seed"),
        # Sampling and rewards.
        (Domain(low=2, whole=True), "num_generations"),
        (_COUNT, "num_iterations max_completion_length max_new_tokens image_repeats top_k"),
        (_COUNT, "prompt_repeats"),
        (_ABOVE, "temperature epsilon epsilon_high"),
        (_SIZE, "generate.temperature beta"),  # Greedy is 0.
        (_PART, "top_p"),
        (Domain(), "reward_weights"),
        # Rows at once.
        (_COUNT, "mini_batch_size train_micro_batch_size rollout_micro_batch_size"),
        (_COUNT, "compute_logps_micro_batch_size completions_per_row"),
        # Files.
        (_COUNT, "max_shard_bytes"),
    )
    for name in names.split()
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

    Or the first switch that is neither on nor off.

    Dataclasses within are looked at too; None passes where the field's type has it.
    """
    kind = type(settings)
    for name, optional in numeric_fields(kind):
        value = getattr(settings, name)
        if value is None and not optional:
            raise ValueError(f"{prefix}{name}: expected {domain(name, kind.__name__)}, found None")
        require(kind.__name__, prefix, **{name: value})
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value = getattr(settings, field.name)
        # From Python "no" would be a yes.
        if hints[field.name] is bool and not isinstance(value, bool | np.bool_):
            raise ValueError(f"{prefix}{field.name}: expected true or false, found {value!r}")
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
