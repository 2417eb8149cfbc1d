# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and losses that never hold a [B, T, V] array.

With 262,144 words one float32 copy of the logits costs 1 MiB per token. Here the head runs over a
chunk of the batch at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from .model.layers import as_array, over_chunks
from .model.vocabulary import hidden_gradient, soft_cap, uncapped_logits

if TYPE_CHECKING:
    from .model.gemma4 import Gemma4ForConditionalGeneration

# Tokens whose logits exist at once: 0.5 GiB of float32 over the whole mesh for the released sizes.
CHUNK_TOKENS = 512

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
        temperature: divides the soft-capped logits; has no gradient.
        suppressed: ids that have no probability, as where a sampler never draws them.

    Returns:
        Log-probabilities [B, T] and entropies [B, T] in nats.
    """
    wanted = {"with_entropy": True, "suppressed": tuple(suppressed)}
    return _chunked(model, hidden, targets, temperature, **wanted)


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
        input_tokens, positions, None, attention_mask, segment_ids, images, skip_lm_head=True
    )
    supervised = input_mask[:, 1:] != 0
    if segment_ids is not None:
        supervised &= segment_ids[:, 1:] == segment_ids[:, :-1]
    logps, _ = _chunked(model, hidden[:, :-1], input_tokens[:, 1:], 1.0)
    total = -jnp.where(supervised, logps, 0.0).sum()
    if loss_denominator is None:
        return total / jnp.maximum(supervised.sum(), 1)
    return total / loss_denominator.astype(jnp.float32).mean()


def _of_logits(logits, targets, temperature, config, with_entropy, suppressed):
    """Log-probabilities and entropies, 0 if not wanted, of a chunk: float32 [B, chunk] each."""
    logits = soft_cap(logits, config) / temperature
    if suppressed:
        words = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(suppressed))
        logits = jnp.where(words, _NO_PROBABILITY, logits)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if not with_entropy:
        return chosen - normaliser, jnp.zeros_like(normaliser)
    shares = jnp.exp(logits - normaliser[..., None])
    return chosen - normaliser, normaliser - (shares * logits).sum(axis=-1)


def _chunked(model, hidden, targets, temperature, *, with_entropy=False, suppressed=()):
    """Log-probabilities and, if asked for, entropies, a chunk at a time.

    Where the table is frozen, the forward pass also keeps `d_states`, the gradient of each
    log-probability for its state [B, T, D], and the backward pass needs no logits at all.
    """
    config, wanted = model.config, (model.config, with_entropy, suppressed)
    size = max(1, CHUNK_TOKENS // hidden.shape[0])

    def of_states(table, temperature, hidden, targets):
        logits = uncapped_logits(table, hidden, config)
        return _of_logits(logits, targets, temperature, *wanted)

    def with_d_states(table, temperature, hidden, targets):
        logits = uncapped_logits(table, hidden, config)
        scores, pull = jax.vjp(lambda x: _of_logits(x, targets, temperature, *wanted), logits)
        (d_logits,) = pull((jnp.ones_like(scores[0]), jnp.zeros_like(scores[1])))
        return *scores, hidden_gradient(table, d_logits, config).astype(hidden.dtype)

    def by_chunks(function, table, temperature, *rows):
        return over_chunks(lambda _, *xs: (_, function(table, temperature, *xs)), size, *rows)[1]

    @jax.custom_vjp
    def scored(*inputs):
        return by_chunks(of_states, *inputs)

    def forward(*primals):
        inputs = [primal.value for primal in primals]
        if primals[0].perturbed:
            return scored(*inputs), (inputs, None)
        *scores, d_states = by_chunks(with_d_states, *inputs)
        return tuple(scores), (inputs, d_states)

    def backward(residuals, d_scores):
        (table, temperature, *rows), d_states = residuals
        # Of entropies no gradient was kept.
        if d_states is not None and isinstance(d_scores[1], SymbolicZero):
            d_hidden = as_array(d_scores[0])[..., None] * d_states
            return None, None, d_hidden.astype(d_states.dtype), None

        def gradients(d_table, hidden, targets, *d_scores):
            score = lambda *xs: of_states(xs[0], temperature, xs[1], targets)  # noqa: E731
            d_more, d_hidden = jax.vjp(score, table, hidden)[1](d_scores)
            return d_table + d_more, d_hidden

        rows += map(as_array, d_scores)
        d_table, d_hidden = over_chunks(gradients, size, *rows, carry=jnp.zeros_like(table))
        return d_table, None, d_hidden, None

    scored.defvjp(forward, backward, symbolic_zeros=True)
    table = model.language_model.embed_tokens.embedding[...]
    return scored(table, jnp.asarray(temperature, jnp.float32), hidden, targets)
