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
from absl import logging
from flax import nnx
from jax.core import Tracer
from tunix.rl import common
from tunix.sft import sharding_utils

from ...losses import per_token_logps
from ...model.gemma4 import Gemma4ForConditionalGeneration, Gemma4ForTokenScores
from ...model.shared_prompt import SharedPrompt, completions_per_row
from ...sharding import active_mesh, batch_shards
from ..hooks import around, call_of
from .context import RolloutContext, current
from .gate import gated
from .lengths import columns_of, fitting_length, on_host, same_in_groups


@around
def wrap_compute_per_token_logps(original, *args: Any, **kwargs: Any) -> Any:
    """Log-probabilities without a [B, T, V] array, with the images in work, gated segment_ids."""
    given = call_of(original, *args, **kwargs)
    call = given.arguments
    model = nnx.merge(call["graphdef"], call["state"])
    if isinstance(model, Gemma4ForConditionalGeneration):
        temperature_given = "temperature" in call
        given.apply_defaults()
        kernel = model.config.wants_kernel
        return _logps(given.arguments, wants_kernel=kernel, temperature_given=temperature_given)
    kept = gated(model, call.get("segment_ids"))
    if kept is not model:
        call["graphdef"], call["state"] = nnx.split(kept)
    return original(*given.args, **given.kwargs)


def _logps(call: dict[str, Any], *, wants_kernel: bool, temperature_given: bool) -> Any:
    context, asked, said = current(), call["prompt_tokens"], call["completion_tokens"]
    rows, packed = said.shape[0], call["segment_ids"] is not None
    images, temperature, suppressed = call["images"], call["temperature"], ()
    per_row, columns = 1, (0, 0)
    if context is not None:
        if not packed:
            group, columns = known(asked, said, context, call["pad_id"])
            # Images of a call's own belong to each row.
            if images is None and context.group > 1:
                per_row = _per_row(rows, group, context.group, kernel=wants_kernel)
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
        completions_per_row=per_row,
        columns=columns,
    )
    if context is not None:
        context.record.logps, context.record.entropy = logps, entropy
    if call["stop_gradient"]:
        logps, entropy = jax.lax.stop_gradient((logps, entropy))
    # In place of logits goes what they are asked for: see `wrap_compute_entropy_from_logits`. Newer
    # hosts ask for it by its name.
    wanted = call.get("return_logits") or call.get("return_entropy")
    return (logps, entropy) if wanted else logps


def known(
    prompts: Any, completions: Any, context: RolloutContext, pad_id: int
) -> tuple[int, tuple[int, int]]:
    """`group` and `columns` of these rows of the batch in work.

    What is said of the batch is looked at where its tokens are there. Where they are compiled it is
    taken as it is, and `chunked_logps` gives no numbers where it is wrong.
    """
    group, columns = context.group, context.columns
    rows = on_host(prompts, completions) if (group, columns) != (1, (0, 0)) else None
    if rows is None:
        return group, columns
    if columns != (0, 0):
        # Of the whole step, so that its micro-batches are alike; rows from elsewhere may be longer.
        asked, said = columns_of(rows[0], rows[1], pad_id)
        longest = max(map(len, context.record.completion_ids), default=0)
        of_step = columns[1] or fitting_length(longest, completions.shape[1])
        columns = max(columns[0], asked), max(of_step, said)
    return group if same_in_groups(rows[0], group) else 1, columns


def _per_row(rows: int, group: int, asked: int, *, kernel: bool) -> int:
    """How many completions share a row, in so many rows; says once why none do.

    `asked` is the group that the batch in work is said to have, `group` that of these rows.
    """
    shards = batch_shards()
    count = 1 if kernel else completions_per_row(rows, group, shards)
    if count == 1 < asked:
        reason = f"{rows} rows lie on {shards} parts of the mesh, and as many must be left"
        if group == 1:
            reason = f"{asked} rows next to each other do not have the same prompt"
        if kernel:
            reason = "attention_implementation asks for a kernel, which takes no such rows"
        message = "Completions are computed with their prompt each, none in a row with others: %s."
        logging.log_first_n(logging.WARNING, message, 1, reason)
    return count


def _placed(images: Any) -> Any:
    """Rows of images on the host's mesh, split like its own inputs."""
    mesh = active_mesh()
    if images is None or isinstance(images, Tracer) or mesh is None:
        return images
    return sharding_utils.shard_input(images, ("fsdp",)) if "fsdp" in mesh.shape else images


@functools.partial(
    jax.jit,
    static_argnames=(
        *("pad_id", "eos_id", "suppressed", "image_repeats"),
        *("completions_per_row", "columns"),
    ),
)
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
    completions_per_row: int = 1,
    columns: tuple[int, int] = (0, 0),
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies float32 [B, completion], or [B, T] of packed rows.

    With `completions_per_row` as many rows next to each other have the same prompt, which is
    computed once for them. `columns` are the last of prompts and the first of completions, all
    others being padding, which gets 0; 0 are all. Rows of which this is not true are NaN.
    """
    model = nnx.merge(graphdef, state)
    prompt, limit = prompt_tokens.shape[1], completion_tokens.shape[1]
    asked, said = columns[0] or prompt, columns[1] or limit
    start = prompt - asked
    prompts, completions = prompt_tokens[:, start:], completion_tokens[:, :said]
    if completions_per_row > 1:
        hidden = _shared_hidden(
            *(model, prompts, completions, images), pad_id=pad_id, count=completions_per_row
        )
        targets = completions
    else:
        given = common.process_ids(
            prompts, completions, pad_id, eos_id, segment_ids, segment_positions
        )
        hidden, targets = _own_hidden(model, given, images, segment_ids, said, image_repeats)
    result = per_token_logps(model, hidden, targets, temperature=temperature, suppressed=suppressed)
    if segment_ids is not None:
        # Nothing predicts the first token of a packed row.
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))), result)
    others = jnp.concatenate([prompt_tokens[:, :start], completion_tokens[:, said:]], axis=1)
    true = (others == pad_id).all(axis=1)
    first = jnp.repeat(prompts[::completions_per_row], completions_per_row, axis=0)
    true &= (prompts == first).all(axis=1)
    result = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, limit - said))), result)
    return jax.tree.map(lambda x: jnp.where(true[:, None], x, jnp.nan), result)


def _own_hidden(model, given, images, segment_ids, count: int, image_repeats: int):
    """States and the tokens that they predict, [B, C, D] and [B, C], of a row for each completion.

    `given` is what the host's `process_ids` says.
    """
    tokens, positions, mask, padding = given
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
    count = count if segment_ids is None else tokens.shape[1] - 1
    return hidden[:, -count - 1 : -1], tokens[:, -count:]


def _shared_hidden(model, prompts, completions, images, *, pad_id: int, count: int) -> jax.Array:
    """The state before each token of the completions [B, C, D], by rows that share a prompt."""
    layout = SharedPrompt(prompts.shape[1], completions.shape[1], count)
    rows = prompts.shape[0] // count
    tokens = layout.rows(prompts, completions)
    real = tokens != pad_id
    # Counted as in a row of its own: prompt, then completion.
    of_prompt = jnp.cumsum(real[:, : layout.prompt], axis=1)
    own = real[:, layout.prompt :].reshape(rows, count, layout.completion)
    of_completions = of_prompt[:, -1:, None] + jnp.cumsum(own, axis=2)
    counted = jnp.concatenate([of_prompt, of_completions.reshape(rows, -1)], axis=1)
    hidden, _ = model(
        tokens,
        positions=counted - (counted >= 1),
        segment_ids=real.astype(jnp.int32),
        images=images,
        skip_lm_head=True,
        image_repeats=1 if images is None else max(1, rows // images.shape[0]),
        shared_prompt=layout,
    )
    return layout.before_completions(hidden)


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
