# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, entropies and scores: what the host computes, without its gaps.

For Gemma 4 nothing of size [B, T, V] exists; images, temperature and suppressed ids of the batch
in work are used where the host's call cannot carry them. Other models keep the host's functions,
behind the gate of `gate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from tunix.rl import common
from tunix.sft import sharding_utils

from ...losses import per_token_logps
from ...model.gemma4 import Gemma4ForConditionalGeneration, Gemma4ForTokenScores
from ...sharding import active_mesh
from ..hooks import around, call_of
from .context import current
from .gate import gated


@around
def wrap_compute_per_token_logps(original, *args: Any, **kwargs: Any) -> Any:
    """Log-probabilities without a [B, T, V] array, with the images in work, gated segment_ids."""
    given = call_of(original, *args, **kwargs)
    call = given.arguments
    model = nnx.merge(call["graphdef"], call["state"])
    if isinstance(model, Gemma4ForConditionalGeneration):
        temperature_given = "temperature" in call
        given.apply_defaults()
        return _logps(given.arguments, temperature_given=temperature_given)
    kept = gated(model, call.get("segment_ids"))
    if kept is not model:
        call["graphdef"], call["state"] = nnx.split(kept)
    return original(*given.args, **given.kwargs)


def _logps(call: dict[str, Any], *, temperature_given: bool) -> Any:
    context = current()
    rows = call["completion_tokens"].shape[0]
    images, temperature, suppressed = call["images"], call["temperature"], ()
    if context is not None:
        images = _placed(context.next_images(rows)) if images is None else images
        temperature = temperature if temperature_given else context.temperature
        suppressed = context.suppressed
    logps, entropy = chunked_logps(
        call["graphdef"],
        call["state"],
        call["prompt_tokens"],
        call["completion_tokens"],
        images,
        call["segment_ids"],
        call["segment_positions"],
        # The host takes 0, which is greedy, for 1.
        jnp.float32(temperature or 1.0),
        pad_id=call["pad_id"],
        eos_id=call["eos_id"],
        suppressed=suppressed,
        # The model refuses what does not divide.
        image_repeats=1 if images is None else max(1, rows // images.shape[0]),
    )
    if context is not None:
        context.record.logps, context.record.entropy = logps, entropy
    if call["stop_gradient"]:
        logps, entropy = jax.lax.stop_gradient((logps, entropy))
    # In place of logits goes what they are asked for: see `wrap_compute_entropy_from_logits`. Newer
    # hosts ask for it by its name.
    wanted = call.get("return_logits") or call.get("return_entropy")
    return (logps, entropy) if wanted else logps


def _placed(images: Any) -> Any:
    """Rows of images on the host's mesh, split like its own inputs."""
    mesh = active_mesh()
    if images is None or isinstance(images, Tracer) or mesh is None:
        return images
    return sharding_utils.shard_input(images, ("fsdp",)) if "fsdp" in mesh.shape else images


@functools.partial(jax.jit, static_argnames=("pad_id", "eos_id", "suppressed", "image_repeats"))
def chunked_logps(
    graphdef,
    state,
    prompt_tokens: jax.Array,
    completion_tokens: jax.Array,
    images: jax.Array | None,
    segment_ids: jax.Array | None,
    segment_positions: jax.Array | None,
    temperature: jax.Array,
    *,
    pad_id: int,
    eos_id: int,
    suppressed: tuple[int, ...],
    image_repeats: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies float32 [B, completion], or [B, T] of packed rows."""
    model = nnx.merge(graphdef, state)
    tokens, positions, mask, padding = common.process_ids(
        prompt_tokens, completion_tokens, pad_id, eos_id, segment_ids, segment_positions
    )
    if model.config.wants_kernel:
        # Kernels take no mask of all pairs. Segments, of which padding is one, say the same
        # of all tokens but padding.
        mask = None
    hidden, _ = model(
        tokens,
        positions=positions,
        attention_mask=mask,
        segment_ids=padding if segment_ids is None else segment_ids,
        images=images,
        skip_lm_head=True,
        image_repeats=image_repeats,
    )
    packed = segment_ids is not None
    count = tokens.shape[1] - 1 if packed else completion_tokens.shape[1]
    result = per_token_logps(
        model,
        hidden[:, -count - 1 : -1],
        tokens[:, -count:],
        temperature=temperature,
        suppressed=suppressed,
    )
    # Nothing predicts the first token of a packed row.
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))), result) if packed else result


def wrap_compute_entropy_from_logits(original: Callable | None) -> Callable | None:
    """The entropy comes with the chunked log-probabilities.

    Entropies [B, T] go through, which Gemma 4 has in place of logits [B, T, V].
    """
    if original is None:  # Newer hosts need none.
        return None

    @functools.wraps(original)
    def compute_entropy_from_logits(logits: jax.Array) -> jax.Array:
        return logits if logits.ndim == 2 else original(logits)

    return compute_entropy_from_logits


@around
def wrap_score(original, *args: Any, **kwargs: Any) -> jax.Array:
    """Models without segment_ids can score; heads see the images in work."""
    given = call_of(original, *args, **kwargs)
    call, context = given.arguments, current()
    if not isinstance(call["model"], Gemma4ForTokenScores) or context is None:
        call["model"] = gated(call["model"], call.get("segment_ids"))
        return original(*given.args, **given.kwargs)
    # The host has no micro-batches here, and would score a whole rollout step at once.
    rows = len(call["completion_tokens"])
    size = context.score_rows or rows
    cut = ("prompt_tokens", "completion_tokens", "segment_ids", "segment_positions")
    cut = [name for name in cut if call.get(name) is not None]
    parts = []
    for start in range(0, rows, size):
        piece = {name: call[name][start : start + size] for name in cut}
        images = _placed(context.next_images(len(piece["completion_tokens"])))
        seeing = call["model"] if images is None else _WithImages(call["model"], images)
        parts.append(original(**call | piece | {"model": seeing}))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


class _Images(nnx.Variable):
    """Images as a variable, so that a compiled function takes them as an argument."""


class _WithImages(nnx.Module):
    """A model that sees `images` in every call."""

    def __init__(self, model: nnx.Module, images: jax.Array):
        self.model, self.images = model, _Images(jnp.asarray(images))

    def __call__(self, tokens: jax.Array, *, segment_ids: Any = None, **kwargs: Any) -> Any:
        images = self.images[...]
        images = jnp.repeat(images, tokens.shape[0] // images.shape[0], axis=0)
        return self.model(tokens, segment_ids=segment_ids, images=images, **kwargs)


@around
def wrap_get_per_token_logps(original, *args: Any, **kwargs: Any) -> jax.Array:
    """DPO and ORPO without a [B, T, V] array."""
    given = call_of(original, *args, **kwargs)
    model = given.arguments["model"]
    if isinstance(model, Gemma4ForConditionalGeneration):
        given.apply_defaults()
        return _completion_logps(**given.arguments)
    given.arguments["model"] = gated(model)
    return original(*given.args, **given.kwargs)


@nnx.jit(static_argnames=("logits_to_keep",))
def _completion_logps(model, input_tokens, positions, attn_mask, logits_to_keep, images):
    """Log-probabilities float32 [B, logits_to_keep] of the last tokens."""
    hidden, _ = model(input_tokens, positions, None, attn_mask, images=images, skip_lm_head=True)
    targets = input_tokens[:, -logits_to_keep:]
    logps, _ = per_token_logps(model, hidden[:, -logits_to_keep - 1 : -1], targets)
    return logps
