# SPDX-License-Identifier: Apache-2.0
"""Sampling: what is drawn, when a row stops, what is compiled, and on which mesh."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from small_models import draw_images, draw_tokens, forward, random_model

from tunix_gemma4 import sampling
from tunix_gemma4.data.processor import Batch
from tunix_gemma4.sampling import generate, sample
from tunix_gemma4.sharding import shard_model
from tunix_gemma4.testing.tiny import tiny_config

ROOT = Path(__file__).parent.parent
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

    def __call__(self, tokens, positions, cache, mask, *, decode_only_last_token, **inputs):
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


def test_generate_refuses_ids_that_have_no_row_in_the_embedding():
    model = chain()
    with pytest.raises(ValueError, match=rf"'{model.config.vocab_size}' with id"):
        generate(model, prompts([1, model.config.vocab_size]), max_new_tokens=1)


def test_a_rows_draws_hang_on_its_place_alone():
    """Not on the other rows, their number, or padding; each place and token has its own."""
    model, settings = Chain(np.zeros((VOCAB, VOCAB))), {"temperature": 1.0, "stop_ids": []}
    whole = generate(model, prompts(*[[4]] * 16), max_new_tokens=9, **settings).rows()
    assert len({tuple(row) for row in whole}) == 16
    assert len({tuple(row[token] for row in whole) for token in range(9)}) == 9
    for places in ([11], [3, 0, 9, 5]):
        batch = prompts(*[[4]] * (len(places) - 1), [6, 7, 4])
        found = generate(model, batch, max_new_tokens=12, places=places, **settings).rows()
        assert [row[:9] for row in found] == [whole[place] for place in places]


def test_generate_refuses_rows_that_are_not_left_padded():
    batch = prompts([4, 5], [6])
    batch = batch.replace(tokens=batch.tokens[:, ::-1], padding_mask=batch.padding_mask[:, ::-1])
    with pytest.raises(ValueError, match=r"last column of row 1; collate with side='left'"):
        generate(chain(), batch, max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, found 0"),
        ({"temperature": -1.0}, "temperature: expected at least 0, found -1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected at least 1, found 0"),
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
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = sample(rows, keys=keys, **settings)
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


def test_rounding_does_not_exchange_the_noise_of_two_tokens():
    """Noise belongs to a token, not to its rank, which rounding decides between near equals."""
    logits = np.repeat(np.linspace(2, 0, 20), 2)[None].repeat(500, 0).astype(np.float32)
    other = logits + np.tile([0, 1e-6], 20).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 500)
    settings = {"keys": keys, "temperature": jnp.float32(1)}
    for more in ({}, {"top_k": 30}, {"top_k": 30, "top_p": 1.0}, {"top_p": 1.0}):
        drawn = sample(jnp.asarray(logits), **settings, **more)
        same = sample(jnp.asarray(other), **settings, **more)
        assert np.mean(drawn != same) < 0.003 and len(np.unique(drawn)) > 20


@pytest.mark.parametrize("step", [None, 0.25], ids=["all differ", "many alike"])
def test_top_p_keeps_what_a_sort_would_and_sorts_nothing(step):
    draw = np.random.default_rng(0)
    scales = np.array([0.1, 1, 3, 10, 30, 0])[:, None]
    logits = scales * draw.normal(size=(6, 1000))
    logits = logits if step is None else np.round(logits / step) * step
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=-1).astype(np.float64)
    before = np.cumsum(ordered, axis=-1) - ordered
    for top_p in (1e-6, 0.10005, 0.50005, 0.90005, 0.99905):
        expected = np.zeros_like(probabilities, bool)
        np.put_along_axis(expected, order, before < top_p, axis=-1)
        found = sampling._nucleus(jnp.asarray(probabilities), jnp.float32(top_p))
        np.testing.assert_array_equal(found, expected, err_msg=str(top_p))
    keys = jax.random.split(jax.random.key(0), 6)
    program = jax.make_jaxpr(
        lambda logits: sample(logits, keys=keys, temperature=jnp.float32(1), top_p=jnp.float32(0.9))
    )(jnp.asarray(logits, jnp.float32))
    assert not {"sort", "top_k"} & set(re.findall(r"\w+", str(program)))


# ---- With the model.

ROWS = ("ttt(iiii)tt", ".....tttttt")
GRIDS = ([(2, 2)], [])


def image_prompts(config, copies: int = 1) -> Batch:
    """A row with an image and a left-padded one without, `copies` times."""
    tokens, padding = draw_tokens(config, *(ROWS * copies))
    images = draw_images(config, *(GRIDS * copies))
    arrays = {"tokens": tokens, "padding_mask": padding, "images": images}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return Batch(loss_mask=np.zeros_like(arrays["tokens"]), **arrays)


def test_generate_continues_as_the_model_would_without_a_cache():
    model = random_model("26b_a4b")
    batch = image_prompts(model.config)
    out = generate(model, batch, max_new_tokens=10, stop_ids=[])
    whole = np.concatenate([batch.tokens, out.tokens], axis=1)
    padding = np.pad(batch.padding_mask, ((0, 0), (0, 10)), constant_values=1)
    logits, _ = forward(
        model,
        whole,
        positions=np.maximum(np.cumsum(padding, axis=1) - 1, 0),
        attention_mask=model.get_attention_mask(whole, inputs_mask=padding),
        images=batch.images,
    )
    config = model.config
    media = [config.image_token_id, config.video_token_id, config.audio_token_id]
    following = np.asarray(logits[:, batch.tokens.shape[1] - 1 : -1]).copy()
    following[..., media] = -np.inf
    np.testing.assert_array_equal(out.tokens, following.argmax(-1))


def test_generate_does_not_depend_on_the_other_rows_or_on_padding():
    model = random_model("e4b")
    batch = image_prompts(model.config)
    settings = {"max_new_tokens": 8, "stop_ids": [], "temperature": 1.0}
    together = generate(model, batch, **settings).rows()
    alone = jax.tree.map(lambda x: x[1:, 5:] if x.ndim == 2 else x[1:], batch)
    assert generate(model, alone, places=[1], **settings).rows() == together[1:]


def _same_tokens_on_a_mesh(shape, **settings) -> None:
    settings = {"max_new_tokens": 8, "stop_ids": []} | settings
    batch = image_prompts(tiny_config("e2b"), copies=4)
    expected = generate(random_model("e2b"), batch, **settings)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("fsdp", "tp"))
    found = generate(shard_model(random_model("e2b"), mesh), batch, **settings)
    assert found.rows() == expected.rows()
    assert len({token for row in found.rows() for token in row}) > 4
    assert len(found.tokens.sharding.device_set) == 8


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)], ids=["fsdp", "fsdp and tp"])
def test_generate_gives_the_same_tokens_on_a_mesh(shape):
    _same_tokens_on_a_mesh(shape)


@pytest.mark.slow
def test_generate_draws_the_same_tokens_on_a_mesh():
    _same_tokens_on_a_mesh((4, 2), temperature=0.7, top_k=20, top_p=0.9)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_generate_runs_with_adapters_and_quantised_weights(quantize):
    from tunix_gemma4.lora import LoraConfig, apply_lora

    base = random_model("e2b")
    batch = image_prompts(base.config)
    model = apply_lora(base, LoraConfig(rank=4, targets="all", quantize=quantize), rngs=nnx.Rngs(1))
    fresh = generate(model, batch, max_new_tokens=6, stop_ids=[])
    if quantize is None:  # Adapters start as nothing.
        assert fresh.rows() == generate(base, batch, max_new_tokens=6, stop_ids=[]).rows()
    adapters = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.3, adapters))
    trained = generate(model, batch, max_new_tokens=6, stop_ids=[])
    assert trained.rows() != fresh.rows()


def test_generate_refuses_images_that_do_not_fit_their_placeholders():
    model = random_model("e2b")
    batch = image_prompts(model.config)
    with pytest.raises(ValueError, match="row 0 has 4 image placeholders .* but 0 soft tokens"):
        generate(model, batch.replace(images=None), max_new_tokens=2)
    swapped = batch.replace(images=batch.images[::-1])
    with pytest.raises(ValueError, match="row 0 has 4 image placeholders .* but 0 soft tokens"):
        generate(model, swapped, max_new_tokens=2)
    text_only = random_model("e2b", text_only=True)
    with pytest.raises(ValueError, match="build or load it with text_only=False"):
        generate(text_only, batch, max_new_tokens=2)


def test_the_example_answers_with_and_without_images(tiny_dir, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    command = [
        *(sys.executable, ROOT / "examples" / "generate.py", f"--model={tiny_dir}"),
        *("--prompt=What digit is this?", "--max_new_tokens=4", "--max_soft_tokens=70"),
    ]
    images = [f"--image={tmp_path / name}.png" for name in ("a", "b")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for more in (images, ["--temperature=1", "--top_k=8", "--top_p=0.9"]):
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("What digit is this?\n    ")


def _compiled_memory(monkeypatch, model, batch, **settings) -> tuple[int, int]:
    """Bytes of temporaries and of arguments of the program that `generate` compiles."""
    found = []

    def record(*arguments, **options):
        memory = compiled(*arguments, **options).compile().memory_analysis()
        found.append((memory.temp_size_in_bytes, memory.argument_size_in_bytes))
        return run(*arguments, **options)

    run = sampling._generate
    compiled = run.lower
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "_generate", record)
        generate(model, batch, **settings)
    return found[0]


def test_generate_holds_one_set_of_caches_and_of_weights(monkeypatch):
    # What a longer answer adds is its caches, which the loop writes in place; their values once
    # more, transposed, as XLA for CPU multiplies them; and a few numbers a slot. A second set of
    # caches would make it nearly three. The prompt is one token: a longer one's scores grow too.
    model = random_model("e2b", text_only=True, use_sliding_window_kv_cache=False)
    tokens, padding = (np.asarray(x) for x in draw_tokens(model.config, *["t"] * 4))
    batch = Batch(tokens=tokens, loss_mask=0 * tokens, padding_mask=padding)
    short, long = 1000, 5000
    (least, weights), (most, _) = (
        _compiled_memory(monkeypatch, model, batch, max_new_tokens=count, stop_ids=[])
        for count in (short, long)
    )
    caches = jax.eval_shape(lambda: model.init_cache(4, long - short, jnp.float32))
    added = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    assert added <= most - least <= 2 * added
    state = jax.tree.leaves(nnx.state(model))
    assert weights <= 1.05 * sum(leaf.size * leaf.dtype.itemsize for leaf in state)
