# SPDX-License-Identifier: Apache-2.0
"""Policies, critics and rows for the tests of log-probabilities and scores."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small_models import random_model
from tunix.rl import algo_core, common

from tunix_gemma4.model.gemma4 import Gemma4ForTokenScores

# The host's own, as long as this is imported before anything registers.
PLAIN_LOGPS = common.compute_per_token_logps
PLAIN_ENTROPY = algo_core.compute_entropy_from_logits
PLAIN_DPO_LOGPS = common.get_per_token_logps
EOS = 1

# Two or three layers of each kind, for text; `demo` has two and sees images.
FEWER_LAYERS = {
    "demo": {},
    "e2b": {
        "text_only": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
    },
    "26b_a4b": {
        "text_only": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
}


@functools.cache
def policy(preset="demo"):
    return random_model(preset, **FEWER_LAYERS[preset])


@functools.cache
def scorer(preset="demo"):
    model = Gemma4ForTokenScores.from_policy(policy(preset))
    kernel = model.score.kernel
    kernel[...] = jax.random.normal(jax.random.key(3), kernel.shape) / 8
    return model


def draw(config, rows, *, side, seed=0):
    """Tokens [B, T] of rows drawn with `t` for a word and `i` for an image of 2 x 2 soft tokens."""
    image = [config.boi_token_id, *[config.image_token_id] * 4, config.eoi_token_id]
    rng, tokens = np.random.default_rng(seed), []
    for row in rows:
        words = [image if letter == "i" else [int(rng.integers(20, 250))] for letter in row]
        tokens.append([word for part in words for word in part])
    length = max(map(len, tokens))
    padding = [[config.pad_token_id] * (length - len(row)) for row in tokens]
    pairs = zip(tokens, padding, strict=True)
    return jnp.array([row + pad if side == "right" else pad + row for row, pad in pairs])


def logps(model, prompts, completions, *, function=None, **options):
    """By Tunix's function as it stands, or by the given one."""
    function = function or common.compute_per_token_logps
    pad = model.config.pad_token_id
    return function(*nnx.split(model), prompts, completions, pad, EOS, **options)


def scores(model, prompts, completions, **options):
    pad = model.config.pad_token_id
    return common.compute_score(model, prompts, completions, pad, EOS, **options)


def relative(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape and np.isfinite(expected).all()
    assert np.abs(expected).max() > 0.1
    return np.abs(found - expected).max() / np.abs(expected).max()
