# SPDX-License-Identifier: Apache-2.0
"""Key/value caches: whole-length ones, and rings of one window for sliding layers.

A cache is a dict `{"layer_3": {"k": [B, S, K, H], "v": [B, S, K, H], "end_index": int32 [B]}}`,
the form Tunix's sampler carries. Every leaf has the batch on axis 0 because beam search reorders
along it; `end_index`, the number of tokens stored, is the same in every row. Layers that read
another layer's keys have no entry.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..config import LayerSpec, ModelConfig

LayerCache = dict[str, jax.Array]
Cache = dict[str, LayerCache]


def cache_name(index: int) -> str:
    """Key of a layer's entry in a `Cache`."""
    return f"layer_{index}"


def init_cache(config: ModelConfig, batch_size: int, max_seq_len: int, dtype) -> Cache:
    """An empty cache for rows of up to `max_seq_len` slots, padding included."""
    cache = {}
    for spec in config.layers:
        if spec.shares_kv:
            continue
        size = max_seq_len
        if spec.window is not None and is_ring(config, spec.kind):
            size = min(spec.window, size)
        shape = (batch_size, size, spec.num_kv_heads, spec.head_dim)
        entry = {name: jnp.zeros(shape, dtype) for name in ("k", "v")}
        entry["end_index"] = jnp.zeros((batch_size,), jnp.int32)
        cache[cache_name(spec.index)] = entry
    return cache


def is_ring(config: ModelConfig, kind: str) -> bool:
    return kind == "sliding" and config.use_sliding_window_kv_cache


def _ring_slots(size: int, last: jax.Array) -> jax.Array:
    """Slot that each place of a ring holds once slot `last` is stored; negative where none is.

    Size 4, last 5:   places 0 1 2 3   ->   slots 4 5 2 3
    """
    return last - (last - jnp.arange(size)) % size


def end_index(config: ModelConfig, cache: Cache) -> jax.Array:
    """Slot of the next token: how many a cache holds."""
    first = next(spec for spec in config.layers if not spec.shares_kv)
    return cache[cache_name(first.index)]["end_index"][0]


def cached_slots(config: ModelConfig, cache: Cache, length: int) -> dict[str, jax.Array]:
    """Slots of the keys that `length` new tokens meet in layers of each kind; negative: nothing.

    In a ring, several tokens at once meet what the ring held and then themselves: the earlier
    of them need keys that the later ones push out.
    """
    slots = {}
    for spec in config.layers:
        if spec.kind in slots or spec.shares_kv:
            continue
        entry = cache[cache_name(spec.index)]
        size, end = entry["k"].shape[1], entry["end_index"][0]
        if not is_ring(config, spec.kind):
            slots[spec.kind] = jnp.arange(size)
        elif length == 1:
            slots[spec.kind] = _ring_slots(size, end)
        else:
            held = _ring_slots(size, end - 1)
            slots[spec.kind] = jnp.concatenate([held, end + jnp.arange(length)])
    return slots


def store(
    config: ModelConfig, spec: LayerSpec, cache: LayerCache, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, LayerCache]:
    """Stores new keys and values [B, T, K, H]; returns those to attend to and the new cache.

    What is returned stands in the order of `cached_slots`.
    """
    length, size, end = k.shape[1], cache["k"].shape[1], cache["end_index"][0]
    ring = is_ring(config, spec.kind)
    pairs = [(cache[name], x.astype(cache[name].dtype)) for name, x in (("k", k), ("v", v))]
    if ring and length > 1:
        kept = min(length, size)
        places = (end + length - kept + jnp.arange(kept)) % size
        stored = [old.at[:, places].set(new[:, length - kept :]) for old, new in pairs]
        seen = [jnp.concatenate(pair, axis=1) for pair in pairs]
    else:
        # A slice, which is written in place where a scatter may be a pass over the whole cache.
        write = jax.lax.dynamic_update_slice_in_dim
        stored = seen = [write(*pair, end % size if ring else end, axis=1) for pair in pairs]
    entry = {"k": stored[0], "v": stored[1], "end_index": cache["end_index"] + length}
    return seen[0], seen[1], entry
