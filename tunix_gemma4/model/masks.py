# SPDX-License-Identifier: Apache-2.0
"""Who may look at whom. True means visible.

The caller says at most "causal and not padding". Windows, packed segments and image blocks are
added here, because some of the host's paths never ask the model for a mask.

A slot is a column of the batch: the index of a token in its row, padding included. Windows are
measured in slots, so a left-padded row sees exactly what the unpadded one does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..config import ModelConfig

# Score of a pair that does not meet; finite, so that a query that may see nothing gets no NaN.
MASKED = -1e30


class Keys(NamedTuple):
    """The keys that the queries of one call meet.

    Attributes:
        slots: slot of each key, int [S]; negative where nothing is stored yet.
        in_order: the slots are 0, 1, ..., S - 1, as in the caller's mask.
    """

    slots: jax.Array
    in_order: bool


def causal_mask(q_slots: jax.Array, kv_slots: jax.Array) -> jax.Array:
    """True where a query may look back, itself included: [T, S].

    Slots 0..3:

        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1
    """
    return q_slots[:, None] >= kv_slots[None, :]


def full_mask(mask: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """A caller's mask as bool `shape` [B, T, S]; axes of size 1 hold for all alike.

    Raises:
        ValueError: for another shape, and for floats, where 0 means visible and not hidden.
    """
    if not (jnp.issubdtype(mask.dtype, jnp.bool_) or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise ValueError(
            "attention_mask: expected bool or int, true where a key may be seen, found "
            f"{mask.dtype}"
        )
    fits = mask.ndim == 3 and all(
        found in (1, size) for found, size in zip(mask.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"attention_mask: expected shape {shape}, any axis of which may be 1, found "
            f"{mask.shape}; get_attention_mask makes one from tokens"
        )
    return jnp.broadcast_to(mask.astype(bool), shape)


def window_mask(q_slots: jax.Array, kv_slots: jax.Array, window: int) -> jax.Array:
    """True where fewer than `window` slots lie between, on either side: [T, S].

    Slots 0..4, window 3; a sliding layer is this and `causal_mask`:

        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1
        0 1 1 1 1
        0 0 1 1 1
    """
    return jnp.abs(q_slots[:, None] - kv_slots[None, :]) < window


def image_blocks(tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """Number of the run of image or video placeholders a token is in, from 1; else 0: int [B, T].

    Two images are separate blocks because begin- and end-of-image tokens stand between them.

        t t i i i t i i   ->   0 0 1 1 1 0 2 2
    """
    soft = (tokens == config.image_token_id) | (tokens == config.video_token_id)
    starts = soft & ~jnp.pad(soft, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(soft, jnp.cumsum(starts, axis=1), 0)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Position of each token counted from the start of its run of equal ids: int32 [B, T].

    1 1 1 2 2 0   ->   0 1 2 0 1 0
    """
    slots = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.where(jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True), slots, 0)
    return slots - jax.lax.cummax(starts, axis=1)


class Visibility(NamedTuple):
    """Who may look at whom in whole rows, computed tile by tile: no array of all pairs is made.

    Attributes:
        visible: the caller's mask, bool [B, T, T], or None.
        segments: int [B, T] or None; tokens see their own segment alone.
        blocks: `image_blocks` [B, T] where sliding layers look both ways in them, else None.
    """

    visible: jax.Array | None
    segments: jax.Array | None
    blocks: jax.Array | None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        tokens: jax.Array,
        attention_mask: jax.Array | None,
        segment_ids: jax.Array | None,
    ) -> Visibility:
        """That of `tokens` [B, T], which are all there is: there is no cache.

        The mask is bool or int [B, T, T].
        """
        both_ways = config.image_blocks_attend_both_ways
        return cls(
            None if attention_mask is None else attention_mask.astype(bool),
            segment_ids,
            image_blocks(tokens, config) if both_ways else None,
        )

    def padded(self, count: int) -> Visibility:
        """With `count` more slots behind, in no image."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) + ((0, count),) * (x.ndim - 1)), self)

    def tile(
        self, window: int | None, rows: tuple[Any, int], columns: tuple[Any, int]
    ) -> jax.Array:
        """The mask of some queries and some keys, bool [B or 1, queries, keys].

        Args:
            window: of a sliding layer; None in a full one.
            rows: first slot of the queries and their number.
            columns: first slot of the keys and their number.
        """
        q_slots, kv_slots = (start + jnp.arange(size) for start, size in (rows, columns))

        def equal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            of_rows = jax.lax.dynamic_slice_in_dim(x, *rows, axis=1)
            of_columns = jax.lax.dynamic_slice_in_dim(x, *columns, axis=1)
            return of_rows[:, :, None] == of_columns[:, None, :], of_rows[:, :, None]

        visible = causal_mask(q_slots, kv_slots)[None]
        if self.visible is not None:
            sizes = (self.visible.shape[0], rows[1], columns[1])
            starts = (0, rows[0], columns[0])
            visible = visible & jax.lax.dynamic_slice(self.visible, starts, sizes)
        if window is not None:
            if self.blocks is not None:
                same, block = equal(self.blocks)
                visible = visible | (same & (block > 0))
            visible = visible & window_mask(q_slots, kv_slots, window)
        if self.segments is not None:
            visible = visible & equal(self.segments)[0]
        return visible


class Given(NamedTuple):
    """A mask of queries and keys, bool [B, 1 or T, S]; `tile` is that of `Visibility`."""

    visible: jax.Array

    def tile(
        self, window: int | None, rows: tuple[Any, int], columns: tuple[Any, int]
    ) -> jax.Array:
        mask = jax.lax.dynamic_slice_in_dim(self.visible, *columns, axis=2)
        return mask if mask.shape[1] == 1 else jax.lax.dynamic_slice_in_dim(mask, *rows, axis=1)


def attention_masks(
    config: ModelConfig,
    tokens: jax.Array,
    *,
    first_slot: jax.Array | int,
    keys: dict[str, Keys],
    attention_mask: jax.Array | None,
) -> dict[str, jax.Array]:
    """With a cache, the mask of each kind of layer, bool [B, T, S of that kind].

        full    = caller's and causal
        sliding = (that, or the same image block where the config asks for it) and in window

    Args:
        config: decides windows and image blocks.
        tokens: int [B, T], the queries.
        first_slot: slot of the first query.
        keys: per kind, where the keys come from.
        attention_mask: bool [B, T, slots], or None for causal.
    """
    q_slots = first_slot + jnp.arange(tokens.shape[1])
    result = {}
    for kind, (slots, in_order) in keys.items():
        visible = causal_mask(q_slots, slots)[None]
        if attention_mask is not None:
            in_slots = jnp.take(attention_mask, slots, axis=2, mode="clip")
            visible = visible & (attention_mask if in_order else in_slots)
        if kind == "sliding":
            if config.image_blocks_attend_both_ways and tokens.shape[1] > 1:
                visible = visible | _same_block(config, tokens, first_slot, slots)
            visible = visible & window_mask(q_slots, slots, config.sliding_window)
        visible = visible & (slots >= 0)
        result[kind] = jnp.broadcast_to(visible, (tokens.shape[0], *visible.shape[1:]))
    return result


def _same_block(
    config: ModelConfig, tokens: jax.Array, first_slot: jax.Array | int, slots: jax.Array
) -> jax.Array:
    """True where query and key are soft tokens of one image: bool [B, T, S].

    Only keys among `tokens` count, so a chunked prefill must not split an image.
    """
    blocks = image_blocks(tokens, config)
    index = slots - first_slot
    here = (index >= 0) & (index < tokens.shape[1])
    of_keys = jnp.where(here, jnp.take(blocks, index, axis=1, mode="clip"), 0)
    return (blocks[:, :, None] == of_keys[:, None, :]) & (blocks[:, :, None] > 0)
