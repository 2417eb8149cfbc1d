# SPDX-License-Identifier: Apache-2.0
"""Sampling: what is drawn, when a row stops, what is compiled, and on which mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tunix_gemma4.processor import Batch
from tunix_gemma4.sampling import generate, sample
from tunix_gemma4.tiny import tiny_config

VOCAB = 16
PAD, STOP, OTHER_STOP, IMAGE, VIDEO, AUDIO = 0, 1, 2, 13, 14, 15


class Chain(nnx.Module):
    """A model whose next-token logits are a row of a table; it counts how often it is traced."""

    def __init__(self, table: np.ndarray):
        self.table = nnx.Param(jnp.asarray(table, jnp.float32))
        self.config = dataclasses.replace(
            tiny_config("12b"),
            vocab_size=VOCAB,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            pad_token_id=PAD,
            eos_token_id=[STOP, OTHER_STOP],
        )

    traces = 0

    def init_cache(self, batch_size, max_seq_len, dtype):
        return {"layer_0": {"end_index": jnp.zeros(batch_size, jnp.int32)}}

    def __call__(self, tokens, positions, cache, mask, images=None, decode_only_last_token=False):
        Chain.traces += 1
        return self.table[...][tokens][:, -1:], cache


def chain(**following: int) -> Chain:
    """`chain(_5=6)`: after 5 comes 6; after anything else its successor."""
    table = np.full((VOCAB, VOCAB), -1.0)
    for token in range(VOCAB):
        table[token, following.get(f"_{token}", (token + 1) % VOCAB)] = 1.0
    return Chain(table)


def prompts(*rows: list[int]) -> Batch:
    """Left-padded text prompts."""
    length = max(map(len, rows))
    tokens = np.array([[PAD] * (length - len(row)) + row for row in rows], np.int32)
    padding = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int32)
    return Batch(tokens=tokens, loss_mask=np.zeros_like(tokens), padding_mask=padding)


def test_generate_stops_each_row_on_any_stop_id_and_pads_after_it():
    model = chain(_5=STOP, _8=OTHER_STOP)
    out = generate(model, prompts([4], [9, 6], [10]), max_new_tokens=4, pad_id=7)
    assert out.rows() == [[5, STOP], [7, 8, OTHER_STOP], [11, 12, 0, 1]]
    np.testing.assert_array_equal(out.lengths, [2, 3, 4])
    np.testing.assert_array_equal(out.tokens[0], [5, STOP, 7, 7])
    assert out.tokens.dtype == out.lengths.dtype == jnp.int32


def test_generate_takes_the_stop_list_of_the_caller_over_the_configs():
    out = generate(chain(_5=STOP), prompts([4]), max_new_tokens=3, stop_ids=(2,))
    assert out.rows() == [[5, STOP, 2]]


def test_generate_never_emits_a_media_placeholder():
    table = np.full((VOCAB, VOCAB), -1.0)
    table[:, [IMAGE, VIDEO, AUDIO]], table[:, 9] = 5.0, 1.0
    greedy = generate(Chain(table), prompts([4]), max_new_tokens=3)
    assert greedy.rows() == [[9, 9, 9]]
    hot = generate(Chain(table), prompts([4]), max_new_tokens=200, temperature=5.0, stop_ids=[])
    assert not set(hot.rows()[0]) & {IMAGE, VIDEO, AUDIO}


def test_generate_returns_after_the_prefill_when_one_token_is_asked_for():
    assert generate(chain(), prompts([4], [6]), max_new_tokens=1).rows() == [[5], [7]]


def test_generate_compiles_once_for_all_weights_and_settings_of_one_shape():
    settings = {"max_new_tokens": 5, "top_p": 0.9}
    generate(chain(), prompts([4, 5]), temperature=1.0, **settings)
    before = Chain.traces
    generate(chain(_5=3), prompts([6, 7]), temperature=0.5, seed=3, stop_ids=[4, 5], **settings)
    assert Chain.traces == before


def test_generate_draws_the_same_tokens_for_the_same_seed_only():
    model = Chain(np.zeros((VOCAB, VOCAB)))
    settings = {"max_new_tokens": 20, "temperature": 1.0, "stop_ids": []}
    rows = [generate(model, prompts([4]), seed=seed, **settings).rows() for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


def test_generate_refuses_rows_that_are_not_left_padded():
    batch = prompts([4, 5], [6])
    batch = batch.replace(tokens=batch.tokens[:, ::-1], padding_mask=batch.padding_mask[:, ::-1])
    with pytest.raises(ValueError, match=r"last column of row 1; collate with side='left'"):
        generate(chain(), batch, max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        ({"temperature": -1.0}, "temperature: expected 0 .greedy. or more, found -1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected at least 1, or None"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p: expected above 0 and at most 1, found 1.5"),
        ({"top_k": 5}, "temperature=0 is greedy and would ignore top_k=5"),
    ],
    ids=["no-tokens", "negative-temperature", "top-k", "top-p", "greedy-with-top-k"],
)
def test_generate_refuses_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(chain(), prompts([4]), **({"max_new_tokens": 2} | settings))


def _shares(logits, **settings) -> np.ndarray:
    """How often each token is drawn in 20,000 rows of the same logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (20_000, len(logits)))
    drawn = sample(rows, key=jax.random.key(0), **settings)
    return np.bincount(drawn, minlength=len(logits)) / 20_000


PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.66}, [1, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        # Of the three that top_k keeps, 0.4 / 0.85 and 0.25 / 0.85 reach 0.7 together.
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),
    ],
    ids=["all", "top-k", "top-p", "top-p-next", "top-p-first", "top-p-all", "top-k-then-top-p"],
)
def test_sample_draws_the_kept_tokens_in_their_proportions(settings, kept):
    settings = {name: jnp.float32(v) if name == "top_p" else v for name, v in settings.items()}
    expected = np.where(np.isin(np.arange(5), kept), PROBABILITIES, 0)
    shares = _shares(np.log(PROBABILITIES), temperature=jnp.float32(1), **settings)
    np.testing.assert_array_equal(shares > 0, expected > 0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.015)


def test_sample_divides_by_the_temperature_before_it_sums_up_to_top_p():
    # At temperature 0.5 probabilities are squared: 0.16, 0.0625, 0.04 of 0.275 in all.
    shares = _shares(np.log(PROBABILITIES), temperature=jnp.float32(0.5), top_p=jnp.float32(0.58))
    np.testing.assert_array_equal(np.flatnonzero(shares), [1])
    shares = _shares(np.log(PROBABILITIES), temperature=jnp.float32(1), top_p=jnp.float32(0.58))
    np.testing.assert_array_equal(np.flatnonzero(shares), [1, 3])
