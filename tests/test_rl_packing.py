# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities and scores of padded and packed rows are those of the rows alone."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from rl_rows import PLAIN_ENTROPY, PLAIN_LOGPS, draw, logps, policy, relative, scorer, scores
from tunix.rl import common, utils as rl_utils

import tunix_gemma4
from tunix_gemma4 import losses


@pytest.fixture(scope="module", autouse=True)
def _registered_with_small_chunks():
    tunix_gemma4.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_TOKENS", 9)
        yield
    tunix_gemma4.unregister()


ROWS = [("ttt", "tttttt"), ("ttttttt", "ttt")]


@functools.cache
def alone(preset):
    """Prompt, completion, log-probabilities and scores of each row by itself."""
    model, critic, found = policy(preset), scorer(preset), []
    for seed, (prompt, completion) in enumerate(ROWS):
        row = draw(model.config, [prompt], side="right", seed=seed)
        row = row, draw(model.config, [completion], side="right", seed=10 + seed)
        found.append((*row, logps(model, *row), scores(critic, *row)))
    return found


def padded(preset):
    """The rows as a rollout pads them: prompts on the left, completions on the right."""
    pad = policy(preset).config.pad_token_id
    prompts = np.full((2, 9), pad, np.int32)
    completions = np.full((2, 8), pad, np.int32)
    for row, (prompt, completion, *_) in enumerate(alone(preset)):
        prompts[row, 9 - prompt.shape[1] :] = prompt
        completions[row, : completion.shape[1]] = completion
    return jnp.asarray(prompts), jnp.asarray(completions)


PRESETS = ["e2b", "26b_a4b"]


@pytest.mark.parametrize("preset", PRESETS)
def test_padding_changes_neither_log_probabilities_nor_scores(preset):
    prompts, completions = padded(preset)
    found = logps(policy(preset), prompts, completions)
    scored = scores(scorer(preset), prompts, completions)
    assert found.shape == (2, 8) and scored.shape == (2, 17)
    for row, (prompt, completion, expected, expected_scores) in enumerate(alone(preset)):
        count, start = completion.shape[1], 9 - prompt.shape[1]
        assert relative(found[row, :count], expected[0]) <= 1e-4
        assert relative(scored[row, start : 9 + count], expected_scores[0]) <= 1e-4


def pack(preset):
    """The rows in one, by the host's own packing."""
    prompts, completions = padded(preset)
    pad = policy(preset).config.pad_token_id
    example = common.TrainExample(
        prompt_ids=prompts,
        prompt_mask=prompts != pad,
        completion_ids=completions,
        completion_mask=completions != pad,
        advantages=jnp.ones(2),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
    (packed,) = list(rl_utils.pack_sequences(iter([[example]]), 24, pad_id=pad))
    return packed[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_sequences_do_not_see_each_other(preset):
    example = pack(preset)
    segments = {
        "segment_ids": example.segment_ids,
        "segment_positions": example.segment_positions,
    }
    row = example.prompt_ids, example.completion_ids
    found = logps(policy(preset), *row, **segments)
    scored = scores(scorer(preset), *row, **segments)
    assert found.shape == scored.shape == (1, 24)
    start = 0
    for prompt, completion, expected, expected_scores in alone(preset):
        first, end = start + prompt.shape[1], start + prompt.shape[1] + completion.shape[1]
        assert relative(found[0, first:end], expected[0]) <= 1e-4
        assert relative(scored[0, start:end], expected_scores[0]) <= 1e-4
        start = end


def test_packed_log_probabilities_and_entropies_equal_the_plain_ones():
    example, model = pack("e2b"), policy("e2b")
    options = {
        "segment_ids": example.segment_ids,
        "segment_positions": example.segment_positions,
        "return_logits": True,
    }
    row = example.prompt_ids, example.completion_ids
    found, entropy = logps(model, *row, **options)
    expected, logits = logps(model, *row, function=PLAIN_LOGPS, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(entropy[:, 1:], PLAIN_ENTROPY(logits)[:, 1:], atol=1e-5)
