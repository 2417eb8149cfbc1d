# SPDX-License-Identifier: Apache-2.0
"""Who may look at whom. True means visible.

The caller says at most "causal and not padding". Windows, packed segments and image blocks are
added here, because some of the host's paths never ask the model for a mask.

A slot is a column of the batch: the index of a token in its row, padding included; where several
completions share a prompt, the index in a row of its own. Windows are measured in slots, so a
left-padded row sees exactly what the unpadded one does.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..config import ModelConfig
from .cache import Cache, cached_slots, end_index, is_ring
from .shared_prompt import SharedPrompt

# Score of a pair that does not meet; finite, so that a query that may see nothing gets no NaN.
MASKED = -1e30


class Tokens(NamedTuple):
    """What decides who sees whom, int [..., tokens] each.

    Attributes:
        slots: of the tokens.
        segments: tokens see their own alone; None: there is one.
        images: `image_ids` where tokens of an image see each other; None: they do not.
        groups: 0 of a shared prompt, which all see, and of each completion a number of its own;
            None: there are none.
    """

    slots: jax.Array
    segments: jax.Array | None = None
    images: jax.Array | None = None
    groups: jax.Array | None = None


def visible_pairs(
    queries: Tokens, keys: Tokens, window: int | None, visible: jax.Array | None = None
) -> jax.Array:
    """The rule, for every layer and every way of computing it: bool [..., queries, keys].

        full    = causal and the caller's
        sliding = (that, or the same image where `images` are given) and in the window

    and the same segment in both, and the same group or a key of a shared prompt. A full layer has
    no window; in a sliding one fewer slots than it lie between two tokens, on either side. Slots
    0..4, window 3; full and sliding:

        1 0 0 0 0     1 0 0 0 0
        1 1 0 0 0     1 1 0 0 0
        1 1 1 0 0     1 1 1 0 0
        1 1 1 1 0     0 1 1 1 0
        1 1 1 1 1     0 0 1 1 1
    """
    query, key = queries.slots[..., :, None], keys.slots[..., None, :]
    result = query >= key
    if visible is not None:
        result = result & visible
    if window is not None:
        if queries.images is not None and keys.images is not None:
            image = queries.images[..., :, None]
            result = result | ((image == keys.images[..., None, :]) & (image > 0))
        result = result & (jnp.abs(query - key) < window)
    if queries.segments is not None and keys.segments is not None:
        result = result & (queries.segments[..., :, None] == keys.segments[..., None, :])
    if queries.groups is not None and keys.groups is not None:
        groups = keys.groups[..., None, :]
        result = result & ((queries.groups[..., :, None] == groups) | (groups == 0))
    return result


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query sees in layers of one kind, asked for by the block.

    In whole rows no array of all pairs is made: a block's pairs follow from its own tokens. With a
    cache, and for patches of images, `visible` says all.

    Attributes:
        visible: bool [B or 1, 1 or queries, keys] or None; of whole rows the caller's mask.
        segments: int [B, T] of whole rows, or None; tokens see their own segment alone.
        images: `image_ids` of whole rows where tokens of an image see each other, or None.
        window: of a sliding layer; None in a full one.
        own: where the queries' own keys begin, which are in their order: 0 in whole rows, behind
            what a ring held before them. None: a query's own key may be anywhere.
        looks_ahead: whether queries of a sliding layer may see later ones.
        shared: how completions share their row's prompt; None: a row has one.
    """

    visible: jax.Array | None = None
    segments: jax.Array | None = None
    images: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    own: int | None = dataclasses.field(default=None, metadata={"static": True})
    looks_ahead: bool = dataclasses.field(default=False, metadata={"static": True})
    shared: SharedPrompt | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def of_whole_rows(self) -> bool:
        """Whether a token has the same index as a query and as a key."""
        return self.own == 0

    def block(self, queries: tuple[Any, int], keys: tuple[Any, int]) -> jax.Array:
        """The pairs of some queries and some keys, bool [B or 1, 1 or queries, keys].

        Of each the index of the first one, which may be traced, and their number.
        """

        def tokens(first: Any, count: int) -> Tokens:
            marks = (self.segments, self.images)
            segments, images = (x if x is None else _part(x, first, count) for x in marks)
            slots, groups = (first + jnp.arange(count))[None], None
            if self.shared is not None:
                slots, groups = self.shared.places(slots)
            return Tokens(slots, segments, images, groups)

        visible = self.visible
        if visible is not None:
            visible = _part(visible, *keys, axis=2)
            visible = _part(visible, *queries) if visible.shape[1] > 1 else visible
            if not self.of_whole_rows:
                return visible
        return visible_pairs(tokens(*queries), tokens(*keys), self.window, visible)

    def padded(self, count: int) -> AttentionMask:
        """With `count` more queries, and in whole rows as many keys, behind; in no image."""

        def pad(x: jax.Array) -> jax.Array:
            wide = [i > 0 and (self.of_whole_rows or i == 1 < x.shape[1]) for i in range(x.ndim)]
            return jnp.pad(x, [(0, count * one) for one in wide])

        return jax.tree.map(pad, self)


def _part(x: jax.Array, first: Any, count: int, axis: int = 1) -> jax.Array:
    return x if x.shape[axis] == count else jax.lax.dynamic_slice_in_dim(x, first, count, axis)


def attention_masks(
    config: ModelConfig,
    tokens: jax.Array,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    shared: SharedPrompt | None = None,
) -> dict[str, AttentionMask]:
    """Of each kind of layer, "sliding" and "full".

    `tokens` [B, T] are the queries, and without a cache the keys. `attention_mask` is bool
    [B, T, S], S = T or the slots of the cache, which they will be stored behind; None for causal.
    `segment_ids` [B, T] come without a cache alone, and `shared` without `attention_mask` as well.
    """
    both_ways = config.image_blocks_attend_both_ways
    images = image_ids(tokens, config) if both_ways else None
    window = config.sliding_window
    if cache is None:
        full = AttentionMask(attention_mask, segment_ids, own=0, shared=shared)
        sliding = dataclasses.replace(full, images=images, window=window, looks_ahead=both_ways)
        return {"sliding": sliding, "full": full}
    length, first = tokens.shape[1], end_index(config, cache)
    queries = Tokens(first + jnp.arange(length), images=images if length > 1 else None)
    masks = {}
    for kind, slots in cached_slots(config, cache, length).items():
        ring, visible = is_ring(config, kind), attention_mask
        if ring and visible is not None:
            visible = jnp.take(visible, slots, axis=2, mode="clip")
        keys = Tokens(slots, images=None if images is None else _images_at(images, slots - first))
        of_kind = window if kind == "sliding" else None
        # Made once here, because a step of decoding would else make it in every layer.
        pairs = visible_pairs(queries, keys, of_kind, visible) & (slots >= 0)
        masks[kind] = AttentionMask(
            jnp.broadcast_to(pairs, (tokens.shape[0], length, slots.size)),
            window=of_kind,
            own=slots.size - length if ring else None,
            looks_ahead=both_ways,
        )
    return masks


def _images_at(images: jax.Array, index: jax.Array) -> jax.Array:
    """`images` [B, T] at some indices [S], 0 where there is no such token: int [B, S].

    Only keys among the new tokens count, so a chunked prefill must not split an image.
    """
    here = (index >= 0) & (index < images.shape[1])
    return jnp.where(here, jnp.take(images, index, axis=1, mode="clip"), 0)


def full_mask(mask: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """A caller's mask as bool `shape` [B, T, S]; axes of size 1 hold for all alike.

    Raises:
        ValueError: for another shape, and for floats, where 0 means visible and not hidden.
    """
    if not (jnp.issubdtype(mask.dtype, jnp.bool_) or jnp.issubdtype(mask.dtype, jnp.integer)):
        expected = "bool or int, true where a key may be seen"
        raise ValueError(f"attention_mask: expected {expected}, found {mask.dtype}")
    if mask.ndim != 3 or any(n not in (1, size) for n, size in zip(mask.shape, shape, strict=True)):
        raise ValueError(
            f"attention_mask: expected shape {shape}, any axis of which may be 1, found "
            f"{mask.shape}; get_attention_mask makes one from tokens"
        )
    return jnp.broadcast_to(mask.astype(bool), shape)


def image_ids(tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """Number of the run of image or video placeholders a token is in, from 1; else 0: int [B, T].

    Two images are two runs because begin- and end-of-image tokens stand between them.

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
