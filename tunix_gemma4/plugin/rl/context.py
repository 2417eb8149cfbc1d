# SPDX-License-Identifier: Apache-2.0
"""The batch that a learner has in work, for functions whose arguments do not carry it.

Between a learner and the log-probabilities lie host functions that know prompts and completions
alone. A context variable carries the rest past them; each thread has its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Record:
    """What is found out while a context is bound. Each field has one owner, which alone writes it.

    Attributes:
        place: images that the pass under way has taken. Owner: `RolloutContext.next_images`.
        completion_ids: for each row, the sampled tokens, the stop token included. Owner: `Rollout`.
        rollout_logps: for each row, log-probabilities of these tokens, as sampled. Likewise.
        truncated: for each row, whether it ended before its stop token. Likewise.
        abstained: [B], where no reward function gave a number; None: nowhere. Owner:
            `rewards.without_abstained`.
        logps, entropy: [B, T] of the last computation, as a loss function sees them. Owner:
            `logps`.
    """

    place: int = 0
    completion_ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    rollout_logps: list[np.ndarray] = dataclasses.field(default_factory=list)
    truncated: list[bool] = dataclasses.field(default_factory=list)
    abstained: np.ndarray | None = None
    logps: jax.Array | None = None
    entropy: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutContext:
    """What belongs to the rows in work: told once, by the learner or the loss that binds it.

    Who knows more binds a copy (`dataclasses.replace`), which has the same record.

    Attributes:
        images: [B / n, I, M, C], or None; each row serves n rows of the batch in turn.
        image_repeats: n, the completions of one prompt.
        group: rows next to each other that have the same prompt and may be computed in one row
            with it; 1: that is not known.
        columns: of prompts and of completions that hold all of their tokens; 0: all columns.
        temperature: of the rollout; used wherever the host forgets to pass it on.
        suppressed: ids that the sampler never draws, so that no policy gives them probability.
        count: completions in a learner's piece of a rollout step; 0 within a loss.
        draws: where random numbers come from: a number that each rollout step has of its own, and
            the place in that step of the batch's first completion.
        off_policy: whether there are updates on these rows after the first, by then of a policy
            that has moved since it sampled.
        score_rows: rows that a critic or a reward model scores at once; None: all.
        prompts: as the user gave them, for reward functions; None: as the host has them.
        for_rewards: what reward functions may ask for besides columns; see `data.prompts.CONTEXT`.
        record: the one part that changes.
    """

    images: Any = None
    image_repeats: int = 1
    group: int = 1
    columns: tuple[int, int] = (0, 0)
    temperature: float = 1.0
    suppressed: tuple[int, ...] = ()
    count: int = 0
    draws: tuple[int, int] = (0, 0)
    off_policy: bool = False
    score_rows: int | None = None
    prompts: list[Any] | None = None
    for_rewards: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    record: Record = dataclasses.field(default_factory=Record)

    def next_images(self, rows: int) -> Any:
        """Images of the next `rows` rows of the batch; moves `record.place` behind them.

        The host hands its functions slices of the batch and does not say which. But rollout,
        reference, old policy and critic pass over it one after the other, each in order and in
        whole, in micro-batches of any number of prompts. So a slice begins where the one before it
        ended, and behind the last row begins the next pass. A pass that was left in the middle
        would give others' images to the next one: that is what is refused here.
        """
        if self.images is None:
            return None
        total, (needed, rest) = self.images.shape[0], divmod(rows, self.image_repeats)
        start, end = self.record.place, self.record.place + needed
        if end > total or rest:
            raise RuntimeError(
                f"images: {rows} rows were asked for after {start * self.image_repeats} of "
                f"{total * self.image_repeats}, {self.image_repeats} for each prompt; a pass over "
                "the batch did not end where the batch or a prompt ends"
            )
        self.record.place = end % total
        return self.images if needed == total else self.images[start:end]


_CONTEXT: contextvars.ContextVar[RolloutContext | None] = contextvars.ContextVar(
    "rollout_context", default=None
)


def current() -> RolloutContext | None:
    """Of the batch in work; None outside a learner."""
    return _CONTEXT.get()


@contextlib.contextmanager
def bind(context: RolloutContext) -> Iterator[RolloutContext]:
    """Makes `context` the current one."""
    token = _CONTEXT.set(context)
    try:
        yield context
    finally:
        _CONTEXT.reset(token)
