# SPDX-License-Identifier: Apache-2.0
"""What to change so that a recipe fits, and how far it could go, found by compiling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..settings.common import TrainSettings
from ..settings.grpo import GrpoRunConfig
from ..settings.sft import RunConfig
from .plan import GB, Plan, plan

Run = TypeVar("Run", bound=TrainSettings)

# Lengths are sought in steps of a block of queries.
LENGTH_UNIT = 256
_LONGEST = 131_072
_MOST_ROWS = 4096


def largest(
    total: Callable[[int], int], capacity: int, *, start: int, unit: int, limit: int
) -> int | None:
    """The largest multiple of `unit` up to `limit` whose `total` is within `capacity`.

    Bytes grow nearly in proportion, so two totals foretell the answer, which is then tried; one
    that does not fit is lowered by a sixteenth until it does, and then half of the last sixteenth
    is tried. The search begins at `start`. None if not even `unit` fits.
    """
    known: dict[int, int] = {}
    limit = limit // unit * unit

    def total_of(size: int) -> int:
        if size not in known:
            known[size] = total(size)
        return known[size]

    first = min(max(unit, start // unit * unit), limit)
    fits = total_of(first) <= capacity
    second = min(2 * first, limit) if fits else max(unit, first // 2 // unit * unit)
    guess = first
    if second != first:
        slope = (total_of(second) - total_of(first)) / (second - first)
        guess = limit if slope <= 0 else int(first + (capacity - total_of(first)) / slope)
    guess = min(max(guess // unit * unit, unit), limit)
    over = guess
    while guess > unit and total_of(guess) > capacity:
        over, guess = guess, max(unit, guess - max(unit, guess // 16 // unit * unit))
    if total_of(guess) <= capacity:
        total_of((guess + over) // 2 // unit * unit)
    return max((size for size, found in known.items() if found <= capacity), default=None)


@dataclasses.dataclass(frozen=True)
class Try:
    """Settings that were tried, as on the command line, and the bytes per chip they take."""

    settings: str
    total: int
    fits: bool


class Search:
    """Tries other settings of a recipe on given chips, which are told as `plan` is.

    `say` takes a line about each try; `tried` has those so far, in order.
    """

    def __init__(
        self,
        config: RunConfig | GrpoRunConfig,
        topology: str,
        images: int | None,
        say: Callable[[str], None],
    ):
        self._config, self._topology, self._images, self._say = config, topology, images, say
        self.tried: list[Try] = []

    def try_settings(self, settings: dict[str, Any]) -> Plan:
        """The plan with other settings, whose names may be dotted."""
        found = plan(_changed(self._config, settings), self._topology, images=self._images)
        named = " ".join(f"{key}={_written(value)}" for key, value in settings.items())
        self.tried.append(Try(named, found.total, bool(found.fits)))
        verdict = "fits" if found.fits else "does not fit"
        self._say(f"  {named}: {found.total / GB:.2f} GB, {verdict}")
        return found

    def to_fit(self) -> None:
        """Tries what takes less memory, each by itself, then all together if none was enough."""
        together: dict[str, Any] = {}
        for settings in self._smaller():
            self.try_settings(settings)
            together |= settings
        if len(self.tried) > 1 and not any(found.fits for found in self.tried):
            self.try_settings(together)

    def _smaller(self) -> Iterator[dict[str, Any]]:
        config = self._config
        if not config.scan_layers:
            yield {"scan_layers": True}
        if config.remat != "decoder":
            yield {"remat": "decoder"}
        if rows := self._fewest_rows():
            yield rows
        plain = config.lora is not None and config.lora.quantize is None
        if plain and not getattr(config, "beta", 0):  # A reference would not be quantised.
            yield {"lora.quantize": "nf4"}

    def _fewest_rows(self) -> dict[str, Any]:
        """As few rows in a forward pass as the mesh allows, and as many in a step as before."""
        config = self._config
        if isinstance(config, GrpoRunConfig):
            sizes = [size for size in _micro_sizes(config) if size < config.micro]
            return {"train_micro_batch_size": sizes[0]} if sizes else {}
        times = config.batch_size // config.mesh.fsdp
        steps = config.gradient_accumulation_steps * times
        rows = {"batch_size": config.mesh.fsdp, "gradient_accumulation_steps": steps}
        return rows if times > 1 else {}

    def longest(self, capacity: int) -> tuple[str, int | None]:
        """The setting of the length, and its largest value that fits."""
        if isinstance(self._config, GrpoRunConfig):
            name, start = "max_completion_length", self._config.max_completion_length
        else:
            name, start = "data.max_length", self._config.data.max_length
        return name, self._largest(capacity, name, start, LENGTH_UNIT, _LONGEST)

    def most_rows(self, capacity: int) -> tuple[str, int | None]:
        """The setting of the rows of a forward pass of training, and its largest that fits."""
        if isinstance(self._config, GrpoRunConfig):
            name = "train_micro_batch_size"
            sizes = reversed(_micro_sizes(self._config))
            fits = (s for s in sizes if self.try_settings({name: s}).total <= capacity)
            return name, next(fits, None)
        start, unit = self._config.batch_size, self._config.mesh.fsdp
        return "batch_size", self._largest(capacity, "batch_size", start, unit, _MOST_ROWS)

    def _largest(self, capacity: int, name: str, start: int, unit: int, limit: int) -> int | None:
        def total(value: int) -> int:
            return self.try_settings({name: value}).total

        return largest(total, capacity, start=start, unit=unit, limit=limit)


def _micro_sizes(config: GrpoRunConfig) -> list[int]:
    """Prompts that a forward pass of training may have."""
    return [
        size
        for size in range(1, config.mini + 1)
        if config.mini % size == 0 and size * config.num_generations % config.mesh.fsdp == 0
    ]


def _changed(config: Run, settings: dict[str, Any]) -> Run:
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        if section:
            value = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section or key: value})
    config.validate()
    return config


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
