# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and losses that never hold a [B, T, V] array.

With 262,144 words one float32 copy of the logits costs 1 MiB per token. Here the head runs over a
few columns of the batch at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from .model.gemma4 import Gemma4ForConditionalGeneration

# Tokens whose logits exist at once: 1 GiB of float32 over the whole mesh for the released sizes.
CHUNK_TOKENS = 1024

# A logit with no probability in float32; finite, so that masked-out targets stay numbers.
_NO_PROBABILITY = -1e30


def per_token_logps(
    model: Gemma4ForConditionalGeneration,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    suppressed: Sequence[int] = (),
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each distribution, in float32.

    Args:
        model: gives the head and its soft cap.
        hidden: final hidden states [B, T, D], as with `skip_lm_head=True`.
        targets: int [B, T], the token that each state predicts.
        temperature: divides the soft-capped logits.
        suppressed: ids that have no probability, as where a sampler never draws them.

    Returns:
        Log-probabilities [B, T] and entropies [B, T] in nats.
    """
    return _chunked(
        model, hidden, targets, temperature, with_entropy=True, suppressed=tuple(suppressed)
    )


def next_token_loss(
    model: Gemma4ForConditionalGeneration,
    input_tokens: jax.Array,
    input_mask: jax.Array,
    positions: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    images: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    loss_denominator: jax.Array | None = None,
) -> jax.Array:
    """Mean negative log-likelihood of the supervised tokens; for `PeftTrainer.with_loss_fn`.

    Args:
        model: the model to train.
        input_tokens: int [B, T].
        input_mask: [B, T], nonzero where a token is supervised as a target. A segment's first
            token is never a target.
        positions, attention_mask, images, segment_ids: as in the model's call.
        loss_denominator: [B], the same in every row: supervised tokens of the whole optimizer
            step over the number of its micro-batches, whose gradients the host averages. None
            counts the supervised tokens of this batch.

    Returns:
        A float32 scalar.
    """
    hidden, _ = model(
        input_tokens,
        positions,
        None,
        attention_mask,
        segment_ids=segment_ids,
        images=images,
        skip_lm_head=True,
    )
    supervised = input_mask[:, 1:] != 0
    if segment_ids is not None:
        supervised &= segment_ids[:, 1:] == segment_ids[:, :-1]
    targets = input_tokens[:, 1:]
    logps, _ = _chunked(model, hidden[:, :-1], targets, 1.0, with_entropy=False)
    total = -jnp.where(supervised, logps, 0.0).sum()
    if loss_denominator is None:
        return total / jnp.maximum(supervised.sum(), 1)
    return total / loss_denominator.astype(jnp.float32).mean()


def _chunked(model, hidden, targets, temperature, *, with_entropy, suppressed=()):
    """Log-probabilities and, if asked for, entropies, a few columns at a time."""
    batch, length = targets.shape
    columns = min(length, max(1, CHUNK_TOKENS // batch))
    count = -(-length // columns)
    padding = count * columns - length

    @jax.checkpoint
    def chunk(hidden, targets):
        logits = model.compute_final_logits(hidden) / temperature
        if suppressed:
            words = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(suppressed))
            logits = jnp.where(words, _NO_PROBABILITY, logits)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        if not with_entropy:
            return chosen - normaliser, jnp.zeros_like(normaliser)
        shares = jnp.exp(logits - normaliser[..., None])
        return chosen - normaliser, normaliser - (shares * logits).sum(axis=-1)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, columns, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length]

    _, (logps, entropy) = jax.lax.scan(
        lambda carry, chunked: (carry, chunk(*chunked)), None, (split(hidden), split(targets))
    )
    return join(logps), join(entropy)
