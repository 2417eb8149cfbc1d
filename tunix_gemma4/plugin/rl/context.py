# SPDX-License-Identifier: Apache-2.0
"""The batch that a learner has in work, for functions whose arguments do not carry it.

Between a learner and the log-probabilities lie host functions that know prompts and completions
alone. A context variable carries the rest past them; each thread has its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Draws:
    """Where random numbers of the next completions come from.

    Attributes:
        step: a number that each rollout step has of its own.
        place: of the next completion in the step.
    """

    step: int = 0
    place: int = 0

    def take(self, count: int) -> range:
        """Places of the next `count` completions."""
        places = range(self.place, self.place + count)
        self.place += count
        return places


@dataclasses.dataclass
class Bound:
    """What belongs to the rows in work.

    Attributes:
        images: [B / n, I, M, C], or None; each row serves n rows of the batch in turn.
        image_repeats: n, the completions of one prompt.
        temperature: of the rollout; used wherever the host forgets to pass it on.
        suppressed: ids that the sampler never draws, so that no policy gives them probability.
        count: completions in a learner's piece of a rollout step; 0 within a loss.
        draws: of the rollout step.
        off_policy: whether there are updates on these rows after the first, by then of a policy
            that has moved since it sampled.
        score_rows: rows that a critic or a reward model scores at once; None: all.
        prompts: the prompts as the user gave them, for reward functions.
        for_rewards: what reward functions may ask for besides columns; see `data.prompts.CONTEXT`.
        abstained: [B], where no reward function gave a number; None: nowhere.
        completion_ids: for each row, the sampled tokens, the stop token included.
        rollout_logps: for each row, log-probabilities of these tokens, as sampled.
        truncated: for each row, whether it ended before its stop token.
        logps, entropy: [B, T] of the last computation, as a loss function sees them.
    """

    images: np.ndarray | jax.Array | None = None
    image_repeats: int = 1
    temperature: float = 1.0
    suppressed: tuple[int, ...] = ()
    count: int = 0
    draws: Draws = dataclasses.field(default_factory=Draws)
    off_policy: bool = False
    score_rows: int | None = None
    prompts: list[Any] | None = None
    for_rewards: dict[str, Any] = dataclasses.field(default_factory=dict)
    abstained: np.ndarray | None = None
    completion_ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    rollout_logps: list[np.ndarray] = dataclasses.field(default_factory=list)
    truncated: list[bool] = dataclasses.field(default_factory=list)
    logps: jax.Array | None = None
    entropy: jax.Array | None = None
    _next: int = 0

    def rows(self, count: int) -> np.ndarray | jax.Array | None:
        """Images of the next `count` rows.

        The host passes over the rows again and again (rollout, reference, old policy), each time
        in order and in whole, in micro-batches of any number of prompts.
        """
        if self.images is None:
            return None
        total, (needed, rest) = self.images.shape[0], divmod(count, self.image_repeats)
        start, end = self._next, self._next + needed
        if end > total or rest:
            raise RuntimeError(
                f"images: {count} rows were asked for after {start * self.image_repeats} of "
                f"{total * self.image_repeats}, {self.image_repeats} for each prompt; a pass over "
                "the batch did not end where the batch or a prompt ends"
            )
        self._next = end % total
        return self.images if needed == total else self.images[start:end]


_BOUND: contextvars.ContextVar[Bound | None] = contextvars.ContextVar("bound", default=None)


def bound() -> Bound | None:
    """The batch in work; None outside a learner."""
    return _BOUND.get()


@contextlib.contextmanager
def bind(batch: Bound) -> Iterator[Bound]:
    """Makes `batch` the one in work."""
    token = _BOUND.set(batch)
    try:
        yield batch
    finally:
        _BOUND.reset(token)
