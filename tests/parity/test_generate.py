# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens equal those of transformers' own `generate`.

Transformers 5.12.1 lets the full-attention layers of 26B-A4B and 31B look both ways within an
image, and its `generate` takes no prepared masks; with images those sizes are compared with its
forward, called anew for each token. Media placeholders, which it would emit, are suppressed there.
"""

import numpy as np
import pytest
import torch

from tunix_gemma4.data.processor import Batch
from tunix_gemma4.sampling import generate

from .oracle import (
    AUDIO,
    BOI,
    BOS,
    EOI,
    FIRST_WORD,
    IMAGE,
    IMAGE_SIZES,
    PAD,
    TEXT_SIZES,
    VIDEO,
    VOCABULARY,
    Inputs,
    hf_arguments,
    hf_model,
    our_config,
    our_model,
    random_image,
)

pytestmark = pytest.mark.parity

NEW = 16  # Three windows.


def _prompts(layouts: list[str], *, images=None, seed: int = 5) -> Inputs:
    """Left-padded rows drawn as in `oracle.image_inputs`."""
    random = np.random.default_rng(seed)
    ids = {"i": IMAGE, "(": BOI, ")": EOI, "b": BOS}
    length = max(map(len, layouts))
    tokens = np.full((len(layouts), length), PAD, np.int32)
    for row, layout in enumerate(layouts):
        words = random.integers(FIRST_WORD, VOCABULARY, len(layout))
        line = [ids.get(mark, word) for mark, word in zip(layout, words, strict=True)]
        tokens[row, length - len(line) :] = line
    return Inputs(tokens, (tokens != PAD).astype(np.int32), images)


def _text_prompts() -> Inputs:
    return _prompts(["b" + "t" * 12, "b" + "t" * 4, "b" + "t" * 7])


def _image_prompts() -> Inputs:
    """An image longer than the window, two images after padding, and none."""
    empty = random_image(0, 0, seed=0)
    images = np.stack([np.stack([empty] * 2)] * 3)
    images[0, 0] = random_image(6, 9, seed=1)
    images[1, 0], images[1, 1] = random_image(6, 6, seed=2), random_image(3, 6, seed=3)
    return _prompts(["(iiiiii)ttttttt", "t(iiii)t(ii)t", "b" + "t" * 6], images=images)


def _ours(config, hf, inputs: Inputs, stop_ids) -> list[list[int]]:
    batch = Batch(
        tokens=inputs.tokens,
        loss_mask=np.zeros_like(inputs.tokens),
        padding_mask=inputs.mask,
        images=inputs.images,
    )
    out = generate(our_model(config, hf), batch, max_new_tokens=NEW, stop_ids=stop_ids)
    return np.asarray(out.tokens).tolist()


def _theirs(config, hf, inputs: Inputs, stop_ids) -> list[list[int]]:
    """Of transformers' `generate`, filled up to `NEW` tokens as ours are."""
    arguments = hf_arguments(config, inputs)
    del arguments["position_ids"], arguments["use_cache"]
    out = hf.generate(
        **arguments,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=stop_ids or None,
        pad_token_id=PAD,
        suppress_tokens=[IMAGE, VIDEO, AUDIO],
    )
    new = out[:, inputs.tokens.shape[1] :].tolist()
    return [row + [PAD] * (NEW - len(row)) for row in new]


def _theirs_by_forwards(config, hf, inputs: Inputs) -> list[list[int]]:
    """The same greedy tokens from a whole forward per token, with prepared masks."""
    tokens, mask = inputs.tokens, inputs.mask
    for _ in range(NEW):
        arguments = hf_arguments(config, Inputs(tokens, mask, inputs.images))
        with torch.no_grad():
            logits = hf(**arguments).logits[:, -1].clone()
        logits[:, [IMAGE, VIDEO, AUDIO]] = -torch.inf
        token = logits.argmax(-1, keepdim=True).numpy().astype(np.int32)
        tokens = np.concatenate([tokens, token], axis=1)
        mask = np.concatenate([mask, np.ones_like(token)], axis=1)
    return tokens[:, -NEW:].tolist()


def _talkative_model(config):
    """`oracle.hf_model` with random signs in the final norm.

    Else the tied head would answer each token with itself, and parity would show little.
    """
    hf = hf_model(config)
    signs = np.sign(np.random.default_rng(0).standard_normal(config.hidden_size))
    with torch.no_grad():
        hf.model.language_model.norm.weight.mul_(torch.from_numpy(signs))
    return hf


def _assert_varied(rows: list[list[int]]) -> None:
    """A row of one repeated token would agree with too much."""
    assert len({token for row in rows for token in row}) > 4, rows


@pytest.mark.parametrize("size", TEXT_SIZES)
def test_greedy_tokens_of_text_equal_transformers(size):
    config = our_config(size)
    hf = _talkative_model(config)
    theirs = _theirs(config, hf, _text_prompts(), [])
    _assert_varied(theirs)
    assert _ours(config, hf, _text_prompts(), []) == theirs


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_greedy_tokens_with_images_equal_transformers(size):
    config = our_config(size, images=True)
    hf = _talkative_model(config)
    inputs = _image_prompts()
    if config.image_blocks_attend_both_ways:
        theirs = _theirs_by_forwards(config, hf, inputs)
    else:
        theirs = _theirs(config, hf, inputs, [])
    _assert_varied(theirs)
    assert _ours(config, hf, inputs, []) == theirs


def test_rows_stop_and_are_padded_where_transformers_stops():
    config = our_config("e2b", images=True)
    hf = _talkative_model(config)
    inputs = _image_prompts()
    free = _theirs(config, hf, inputs, [])
    # A token that ends the first row early and one that ends the second, of those they emit.
    stop_ids = [free[0][2], free[1][5]]
    theirs = _theirs(config, hf, inputs, stop_ids)
    assert theirs != free
    assert _ours(config, hf, inputs, stop_ids) == theirs
