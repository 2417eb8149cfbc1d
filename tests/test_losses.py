# SPDX-License-Identifier: Apache-2.0
"""The chunked head against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from tunix_gemma4 import losses
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration
from tunix_gemma4.planning.measure import count_flops
from tunix_gemma4.testing.tiny import tiny_config

PRESETS = ["e2b", "26b_a4b"]


def _case(preset):
    model = Gemma4ForConditionalGeneration(tiny_config(preset), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 37), 10, 200)
    mask = (jax.random.uniform(jax.random.key(2), tokens.shape) < 0.4).astype(jnp.int32)
    return model, tokens, mask


def _plain_loss(model, tokens, mask):
    logps = jax.nn.log_softmax(model(tokens)[0][:, :-1])
    chosen = jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0]
    return -(chosen * mask[:, 1:]).sum() / mask[:, 1:].sum()


@pytest.mark.parametrize("preset", PRESETS)
def test_chunked_loss_has_the_gradients_of_the_plain_loss(preset, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 15)
    model, tokens, mask = _case(preset)
    value, grads = nnx.jit(nnx.value_and_grad(losses.next_token_loss))(model, tokens, mask)
    plain_value, plain_grads = nnx.jit(nnx.value_and_grad(_plain_loss))(model, tokens, mask)
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain_grads))
    for ours, plain in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        # At most three times the rounding that was measured, 1.1e-6 with jax 0.12.
        assert float(jnp.abs(ours - plain).max()) <= 3e-6 * largest


def test_no_array_of_batch_times_tokens_times_vocabulary_is_built(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 6)
    model, tokens, mask = _case("e2b")
    graphdef, state = nnx.split(model)

    def loss(state):
        return losses.next_token_loss(nnx.merge(graphdef, state), tokens, mask)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                yield variable.aval.size
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    whole = (tokens.size - tokens.shape[0]) * model.config.vocab_size
    program = jax.make_jaxpr(jax.value_and_grad(loss))(state).jaxpr
    parameters = {leaf.size for leaf in jax.tree.leaves(state)}
    assert max(size for size in sizes(program) if size not in parameters) < whole


def test_per_token_logps_and_entropy_equal_the_plain_ones_at_a_temperature(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 10)
    model, tokens, _ = _case("e2b")
    hidden, _ = nnx.jit(lambda model: model(tokens, skip_lm_head=True))(model)
    logps, entropy = losses.per_token_logps(model, hidden, tokens, temperature=0.7)
    plain = jax.nn.log_softmax(model.compute_final_logits(hidden) / 0.7)
    chosen = jnp.take_along_axis(plain, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logps, chosen, atol=1e-5)
    np.testing.assert_allclose(entropy, -(jnp.exp(plain) * plain).sum(-1), atol=1e-5)
    assert logps.dtype == entropy.dtype == jnp.float32


def test_a_denominator_makes_micro_batches_average_to_the_big_batch():
    model, tokens, mask = _case("e2b")
    loss = nnx.jit(losses.next_token_loss)
    whole = loss(model, tokens, mask)
    denominator = jnp.full((1,), mask[:, 1:].sum() / 3)
    parts = [
        loss(model, tokens[i : i + 1], mask[i : i + 1], loss_denominator=denominator)
        for i in range(3)
    ]
    np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-5)


def test_the_first_token_of_a_packed_segment_is_no_target():
    model, tokens, _ = _case("e2b")
    segments = jnp.where(jnp.arange(37) < 20, 1, 2)[None].repeat(3, axis=0)
    everything = jnp.ones_like(tokens)
    without_starts = everything.at[:, 20].set(0)
    loss = nnx.jit(losses.next_token_loss)
    assert loss(model, tokens, everything, segment_ids=segments) == loss(
        model, tokens, without_starts, segment_ids=segments
    )


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_frozen_table_leaves_the_gradients_of_all_else_as_they_are(with_entropy, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 15)
    model, tokens, _ = _case("e2b")
    hidden, _ = nnx.jit(lambda model: model(tokens, skip_lm_head=True))(model)

    def total(hidden):
        logps, entropy = losses.per_token_logps(
            model, hidden, tokens, temperature=0.7, suppressed=(3, 7)
        )
        return (jnp.sin(logps) + with_entropy * entropy**2).sum()

    def plain(hidden):
        logits = model.compute_final_logits(hidden) / 0.7
        logits = logits.at[..., jnp.array([3, 7])].set(-1e30)
        logps = jax.nn.log_softmax(logits)
        entropy = -(jnp.exp(logps) * logps).sum(-1)
        chosen = jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]
        return (jnp.sin(chosen) + with_entropy * entropy**2).sum()

    found, wanted = jax.jit(jax.grad(total))(hidden), jax.jit(jax.grad(plain))(hidden)
    assert float(jnp.abs(found - wanted).max()) <= 3e-6 * float(jnp.abs(wanted).max())


def test_the_backward_pass_of_a_frozen_table_has_no_product_with_it():
    model, tokens, mask = _case("e2b")
    hidden, _ = nnx.jit(lambda model: model(tokens, skip_lm_head=True))(model)

    graphdef, state = nnx.split(model)
    table = state["language_model"]["embed_tokens"]["embedding"][...]

    def total(table, hidden):
        fresh = nnx.merge(graphdef, state)
        fresh.language_model.embed_tokens.embedding = nnx.Param(table)
        return losses.per_token_logps(fresh, hidden, tokens)[0].sum()

    def products(argnums):
        return count_flops(jax.jit(jax.grad(total, argnums)).trace(table, hidden).jaxpr)

    one = 2 * tokens.size * model.config.vocab_size * model.config.hidden_size
    assert products(1) == 2 * one  # Logits, and their way back.
    assert products((0, 1)) == 4 * one
