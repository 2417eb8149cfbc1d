# SPDX-License-Identifier: Apache-2.0
"""Decoding with caches equals one forward over the whole row. The window of tiny models is 8."""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    IMAGE_PRESETS,
    TEXT_PRESETS,
    assert_logits_agree,
    draw_images,
    draw_tokens,
    forward,
    random_model,
)

from tunix_gemma4.data.processor import Batch
from tunix_gemma4.sampling import generate

# Left-padded rows of 28 slots, of which the first 11 are the prompt: three and a half windows.
TEXT_ROWS = ("t" * 28, "." * 6 + "t" * 22, "." * 9 + "t" * 19)
TEXT_PROMPT = 11
# Images at the start of a row, two of them, longer than the window, and none.
IMAGE_ROWS = (
    "iiiiii)t(iiii)tttt" + "t" * 12,
    ".tt(iiiiiiiiiiii)t" + "t" * 12,
    "......t(ii)(iii)tt" + "t" * 12,
    "...............ttt" + "t" * 12,
)
IMAGE_GRIDS = ([(3, 2), (2, 2)], [(4, 3)], [(1, 2), (3, 1)], [])
IMAGE_PROMPT = 18


def _right_padded(rows: tuple[str, ...]) -> tuple[str, ...]:
    """The same rows with their padding moved behind them."""
    return tuple(row.lstrip(".") + "." * (len(row) - len(row.lstrip("."))) for row in rows)


def _whole(model, rows, images=None) -> list[np.ndarray]:
    """Logits of each row's real tokens from one forward without a cache, a mask or left padding."""
    tokens, real = draw_tokens(model.config, *_right_padded(rows))
    logits, cache = forward(model, tokens, images=images)
    assert cache is None
    return [np.asarray(row)[: int(n)] for row, n in zip(logits, real.sum(1), strict=True)]


def _in_pieces(model, rows, pieces, images=None) -> list[np.ndarray]:
    """Logits of each row's real tokens from a cache that is filled piece by piece.

    Images go with the first piece that holds a placeholder.
    """
    tokens, real = draw_tokens(model.config, *rows)
    length = tokens.shape[1]
    assert sum(pieces) == length
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    cache = model.init_cache(len(rows), length + 3, jnp.float32)
    slots = jnp.arange(length + 3)
    visible = jnp.pad(real, ((0, 0), (0, 3)))[:, None, :] & (slots <= slots[:, None])
    outputs, start = [], 0
    for piece in pieces:
        now = slice(start, start + piece)
        with_images = images is not None and (tokens[:, now] == model.config.image_token_id).any()
        logits, cache = forward(
            model,
            tokens[:, now],
            positions=positions[:, now],
            cache=cache,
            attention_mask=visible[:, now],
            images=images if with_images else None,
        )
        outputs.append(logits)
        start += piece
    whole = np.concatenate(outputs, axis=1)
    return [row[np.asarray(mask, bool)] for row, mask in zip(whole, real, strict=True)]


def _cases(quick, slow):
    """Parameters (preset, ring): a cover that is quick, and what completes the product."""
    return [
        pytest.param(preset, ring, marks=marks, id=f"{preset}-{'ring' if ring else 'full'}")
        for cases, marks in ((quick, ()), (slow, pytest.mark.slow))
        for preset, ring in cases
    ]


def _assert_rows_agree(found, expected) -> None:
    assert_logits_agree(np.concatenate(found), np.concatenate(expected))


@pytest.mark.parametrize(
    ("preset", "ring"),
    _cases(
        [*((preset, True) for preset in TEXT_PRESETS), ("e2b", False), ("26b_a4b", False)],
        [("e4b", False), ("12b", False), ("31b", False)],
    ),
)
def test_prefill_then_decode_past_the_window_equals_one_forward_when_left_padded(preset, ring):
    model = random_model(preset, text_only=True, use_sliding_window_kv_cache=ring)
    pieces = [TEXT_PROMPT] + [1] * (28 - TEXT_PROMPT)
    _assert_rows_agree(_in_pieces(model, TEXT_ROWS, pieces), _whole(model, TEXT_ROWS))


@pytest.mark.parametrize(
    ("preset", "ring"),
    _cases(
        [("e2b", True), ("31b", False), ("31b", True)],
        [("e4b", True), ("26b_a4b", True), *((preset, False) for preset in IMAGE_PRESETS[:3])],
    ),
)
def test_prefill_with_images_then_decode_equals_one_forward_when_left_padded(preset, ring):
    model = random_model(preset, use_sliding_window_kv_cache=ring)
    images = draw_images(model.config, *IMAGE_GRIDS)
    pieces = [IMAGE_PROMPT] + [1] * 12
    found = _in_pieces(model, IMAGE_ROWS, pieces, images)
    _assert_rows_agree(found, _whole(model, IMAGE_ROWS, images))


@pytest.mark.parametrize(
    ("preset", "ring"),
    _cases([("e2b", True), ("26b_a4b", False)], [("e2b", False), ("26b_a4b", True)]),
)
def test_chunked_prefill_equals_one_forward(preset, ring):
    model = random_model(preset, text_only=True, use_sliding_window_kv_cache=ring)
    # Longer than the window, shorter, and shorter after single tokens.
    pieces = [10, 4, 1, 4, 9]
    _assert_rows_agree(_in_pieces(model, TEXT_ROWS, pieces), _whole(model, TEXT_ROWS))


@pytest.mark.parametrize("preset", ["e4b", pytest.param("31b", marks=pytest.mark.slow)])
def test_a_later_chunk_of_a_prefill_may_hold_images(preset):
    model = random_model(preset)
    rows = ("tttttt(iiii)tttttttt", "....tttttt(ii)tttttt")
    images = draw_images(model.config, [(2, 2)], [(2, 1)])
    found = _in_pieces(model, rows, [6, 8, 6], images)
    _assert_rows_agree(found, _whole(model, rows, images))


def test_the_ring_cache_keeps_one_window_and_the_full_cache_every_slot():
    def sizes(ring):
        model = random_model("12b", use_sliding_window_kv_cache=ring)
        cache = model.init_cache(2, 30, jnp.bfloat16)
        assert all(entry["k"].dtype == jnp.bfloat16 for entry in cache.values())
        return {name: entry["k"].shape[1] for name, entry in cache.items()}

    assert sizes(True) == {f"layer_{i}": 30 if i in (2, 4) else 8 for i in range(5)}
    assert sizes(False) == {f"layer_{i}": 30 for i in range(5)}


def test_layers_that_read_anothers_keys_have_no_cache():
    assert set(random_model("e2b").init_cache(1, 10, jnp.float32)) == {
        "layer_0",
        "layer_1",
        "layer_2",
    }


def test_decode_only_last_token_gives_the_last_column():
    model = random_model("e2b")
    tokens, _ = draw_tokens(model.config, "ttttttttt", "ttttttttt")
    all_columns, _ = forward(model, tokens)
    last, _ = forward(model, tokens, decode_only_last_token=True)
    assert last.shape == (2, 1, model.num_embed)
    assert_logits_agree(last, all_columns[:, -1:])


def test_positions_count_on_from_the_cache_when_none_are_given():
    model = random_model("e4b", text_only=True)
    tokens, _ = draw_tokens(model.config, "t" * 14)
    cache = model.init_cache(1, 14, jnp.float32)
    first, cache = forward(model, tokens[:, :9], cache=cache)
    second, _ = forward(model, tokens[:, 9:], cache=cache)
    assert_logits_agree(jnp.concatenate([first, second], axis=1), forward(model, tokens)[0])


class _Numbers:
    """A tokenizer for Tunix's Sampler: text is token ids with spaces between."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 2

    def eos_id(self):
        return 1

    def pad_id(self):
        return 0


@pytest.mark.parametrize("preset", ["e2b", pytest.param("26b_a4b", marks=pytest.mark.slow)])
def test_tunix_sampler_decodes_the_same_greedy_tokens(preset):
    from tunix.generate.sampler import CacheConfig, Sampler

    model = random_model(preset)
    config = model.config
    tokens, real = draw_tokens(config, "ttt(iiii)tt", ".....tttttt")
    first = jnp.argmax(real, axis=1)
    tokens = tokens.at[jnp.arange(2), first].set(2)
    images = draw_images(config, [(2, 2)], [])
    ours = generate(
        model,
        Batch(tokens=tokens, loss_mask=real * 0, padding_mask=real, images=images),
        max_new_tokens=12,
        stop_ids=[1],
    )

    sampler = Sampler(model, _Numbers(), CacheConfig(32, 1, 1, 1))
    text = [
        " ".join(map(str, row[int(start) + 1 :].tolist()))
        for row, start in zip(tokens, first, strict=True)
    ]
    theirs = sampler(
        text,
        max_generation_steps=12,
        max_prompt_length=11,
        images=images,
        forbidden_tokens=[config.image_token_id, config.video_token_id, config.audio_token_id],
    )
    assert [row.tolist() for row in theirs.tokens] == ours.rows()
    assert len({token for row in ours.rows() for token in row}) > 4
