# SPDX-License-Identifier: Apache-2.0
"""Rows in which several completions follow one prompt, which is computed once for all of them.

    [ prompt | completion 1 | completion 2 | ... ]

A completion sees the prompt and itself, and not the others. Its slots go on from the prompt's end,
so windows and positions are what they are in a row of its own, and padding stays where it was.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Part = tuple[int, int, int]  # of a block: its group, first slot and last slot


class SharedPrompt(NamedTuple):
    """The layout of such a row. It is static: which blocks meet follows from it alone.

    Attributes:
        prompt: P, columns of the prompt, padding included.
        completion: C, columns of each completion, likewise.
        count: s, completions in the row.
    """

    prompt: int
    completion: int
    count: int

    @property
    def length(self) -> int:
        """Columns of a row."""
        return self.prompt + self.count * self.completion

    def places(self, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Slots and groups of some columns; the prompt is group 0, completions count from 1.

        Prompt 3, completion 2: slots 0 1 2 | 3 4 | 3 4, groups 0 0 0 | 1 1 | 2 2.
        """
        behind = columns - self.prompt
        slots = jnp.where(behind < 0, columns, self.prompt + behind % self.completion)
        return slots, jnp.where(behind < 0, 0, 1 + behind // self.completion)

    def parts(self, first: int, count: int) -> list[Part]:
        """The same of `count` columns in a row, which may lie in several groups."""
        found = []
        end = first + count
        while first < end:
            behind = first - self.prompt
            if behind < 0:
                group, slot, left = 0, first, -behind
            else:
                number, inside = divmod(behind, self.completion)
                group, slot, left = 1 + number, self.prompt + inside, self.completion - inside
            size = min(left, end - first)
            found.append((group, slot, slot + size - 1))
            first += size
        return found

    def rows(self, prompts: jax.Array, completions: jax.Array) -> jax.Array:
        """[B, P] and [B, C], equal prompts next to each other, as [B / s, P + s C]."""
        joined = completions.reshape(-1, self.count * self.completion)
        return jnp.concatenate([prompts[:: self.count], joined], axis=1)

    def before_completions(self, states: jax.Array) -> jax.Array:
        """Of each token of the completions what the token before it has: [B, C, ...].

        `states` are [B / s, P + s C, ...]. All first tokens have that of the prompt's last column.
        """
        rows, rest = states.shape[0], states.shape[2:]
        last = states[:, self.prompt - 1][:, None, None]
        last = jnp.broadcast_to(last, (rows, self.count, 1, *rest))
        own = states[:, self.prompt :].reshape(rows, self.count, self.completion, *rest)
        shifted = jnp.concatenate([last, own[:, :, :-1]], axis=2)
        return shifted.reshape(rows * self.count, self.completion, *rest)


def completions_per_row(rows: int, group: int, shards: int) -> int:
    """The largest s: it divides a group, and as many rows of s lie on every shard of the batch.

    Args:
        rows: completions of a batch; those of a prompt are `group` next to each other.
        group: completions of one prompt.
        shards: of the batch.
    """
    fits = (
        s
        for s in range(group, 0, -1)
        if group % s == 0 and rows % group == 0 and (rows // s) % shards == 0
    )
    return next(fits, 1)


def meeting(queries: list[Part], keys: list[Part], nearest: int, window: int) -> bool:
    """Whether any pair of two blocks meets, by their `parts`.

    `nearest` is the least distance, negative where queries look ahead; `window` is more than the
    greatest.
    """
    return any(
        key_group in (0, query_group) and last - low >= nearest and first - high < window
        for query_group, first, last in queries
        for key_group, low, high in keys
    )
