# SPDX-License-Identifier: Apache-2.0
"""One rule for names: no two metrics of a run share one, whoever gives them."""

from __future__ import annotations

import itertools

from absl import logging

_STATISTICS = ("mean", "min", "max")
_ADVANTAGES = ("advantages", "advantages/returns", "advantages/old_values")
# What the host and these learners write themselves.
_TAKEN = {
    *("prompts", "completions", "rewards/sum", "rewards/score/std"),
    *("rewards/groups_without_spread", "rewards/reward_kl_penalty", "completions/truncated"),
    *(f"rewards/{name}" for name in _STATISTICS),
    *(f"{of}completions/{name}_length" for of in ("", "generation/") for name in _STATISTICS),
    *(
        f"{of}/{name}"
        for of in ("rewards/score", "rewards/reward", *_ADVANTAGES)
        for name in _STATISTICS
    ),
}
# Before the names of the trainers' own metrics.
_TRAINERS = ("actor/", "critic/", "perf/")


class MetricNames:
    """Hands out names: one that another has taken gets a number behind it."""

    def __init__(self) -> None:
        self._owners: dict[str, object] = dict.fromkeys(_TAKEN)

    def of(self, wanted: str, owner: object) -> str:
        """A name of the owner's own: `wanted`, or the first free of `wanted_2`, `wanted_3`, ..."""
        first = 2 if wanted.startswith(_TRAINERS) else 1
        for number in itertools.count(first):
            name = wanted if number == 1 else f"{wanted}_{number}"
            is_new = name not in self._owners
            if self._owners.setdefault(name, owner) == owner:
                if is_new and name != wanted:
                    logging.warning(
                        "There is a metric %r already: another of this name is called %r.",
                        *(wanted, name),
                    )
                return name
