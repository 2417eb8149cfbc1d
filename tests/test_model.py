# SPDX-License-Identifier: Apache-2.0
"""What must hold of the model whatever its weights: masks, packing, padding, remat, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import (
    IMAGE_PRESETS,
    TEXT_PRESETS,
    assert_logits_agree,
    draw_images,
    draw_tokens,
    forward,
    random_model,
)

from tunix_gemma4.config import RematConfig
from tunix_gemma4.model import masks
from tunix_gemma4.sharding import shard_model
from tunix_gemma4.testing.tiny import tiny_config

# Two conversations and what they look like packed into one row, padding behind.
FIRST, SECOND = "tt(iiii)tttttt", "(iiiiiiiiii)ttt(ii)t"
SECOND_GRIDS = [(5, 2), (2, 1)]


def _packed_equals_separate(preset: str, first: str, second: str, grids) -> None:
    """Packed with segment ids alone against each conversation in a row of its own."""
    model = random_model(preset, text_only=grids is None)
    config = model.config
    longest = max(len(first), len(second))
    apart, _ = draw_tokens(config, *(row.ljust(longest, ".") for row in (first, second)))
    tail = 3
    packed = jnp.concatenate(
        [apart[0, : len(first)], apart[1, : len(second)], jnp.zeros(tail, jnp.int32)]
    )[None]
    segments = jnp.array([[1] * len(first) + [2] * len(second) + [0] * tail])
    images = packed_images = None
    if grids is not None:
        images = draw_images(config, *grids, count=2)
        used = [
            images[row, i] for row, row_grids in enumerate(grids) for i in range(len(row_grids))
        ]
        packed_images = jnp.stack(used)[None]
    expected, _ = forward(model, apart, images=images)
    found, _ = forward(model, packed, segment_ids=segments, images=packed_images)
    assert_logits_agree(found[:, : len(first)], expected[:1, : len(first)])
    assert_logits_agree(found[:, len(first) : -tail], expected[1:, : len(second)])


@pytest.mark.parametrize("preset", TEXT_PRESETS)
def test_packed_rows_equal_separate_rows(preset):
    _packed_equals_separate(preset, "t" * 13, "t" * 20, None)


@pytest.mark.parametrize(
    "preset", ["e2b", pytest.param("e4b", marks=pytest.mark.slow), "26b_a4b", "31b"]
)
def test_packed_rows_with_images_equal_separate_rows(preset):
    _packed_equals_separate(preset, FIRST, SECOND, [[(2, 2)], SECOND_GRIDS])


@pytest.mark.parametrize(
    "preset", ["e2b", "12b", *(pytest.param(p, marks=pytest.mark.slow) for p in IMAGE_PRESETS[1:])]
)
def test_left_padded_rows_equal_unpadded_rows_with_either_type_of_mask(preset):
    model = random_model(preset)
    with_images = model.config.has_vision
    rows = (FIRST, SECOND) if with_images else ("t" * 14, "t" * 20)
    images = draw_images(model.config, [(2, 2)], SECOND_GRIDS) if with_images else None
    right, _ = draw_tokens(model.config, *(row.ljust(23, ".") for row in rows))
    left, real = draw_tokens(model.config, *(row.rjust(23, ".") for row in rows))
    expected, _ = forward(model, right, images=images)
    mask = model.get_attention_mask(left, inputs_mask=real)
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    for dtype in (jnp.bool_, jnp.int32):
        found, _ = forward(
            model, left, positions=positions, attention_mask=mask.astype(dtype), images=images
        )
        assert np.isfinite(found).all()  # Padding included: it sees nothing at all.
        for row, drawn in enumerate(rows):
            assert_logits_agree(found[row, -len(drawn) :], expected[row, : len(drawn)])


def test_positions_are_counted_within_each_segment_when_none_are_given():
    model = random_model("e2b", text_only=True)
    tokens, _ = draw_tokens(model.config, "t" * 9)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    given = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    expected, _ = forward(model, tokens, positions=given, segment_ids=segments)
    assert_logits_agree(forward(model, tokens, segment_ids=segments)[0], expected)
    plain, _ = forward(model, tokens, positions=jnp.arange(9)[None])
    assert_logits_agree(forward(model, tokens)[0], plain)
    assert np.abs(np.asarray(plain - expected)).max() > 0.1


@pytest.mark.parametrize("preset", ["e2b", pytest.param("26b_a4b", marks=pytest.mark.slow)])
def test_remat_changes_neither_values_nor_gradients(preset):
    def value_and_gradients(remat):
        model = random_model(preset, remat_config=remat)
        tokens, real = draw_tokens(model.config, "t(iiii)ttttttttt")
        images = draw_images(model.config, [(2, 2)])
        graphdef, state = nnx.split(model)

        @jax.jit
        def loss(state):
            logits, _ = nnx.merge(graphdef, state)(tokens, images=images)
            return jax.nn.log_softmax(logits)[:, :-1][..., 77].mean()

        value, gradients = jax.value_and_grad(loss)(state)
        return value, nnx.to_flat_state(gradients)

    value, expected = value_and_gradients(RematConfig.NONE)
    for remat in (RematConfig.BLOCK, RematConfig.DECODER):
        found_value, found = value_and_gradients(remat)
        np.testing.assert_allclose(found_value, value, rtol=1e-6)
        for (path, one), (_, other) in zip(found, expected, strict=True):
            one, other = np.asarray(one[...]), np.asarray(other[...])
            largest = np.abs(other).max()
            assert largest > 0, f"{path}: no gradient"
            assert np.abs(one - other).max() <= 1e-5 * largest, path


def test_remat_is_found_in_the_compiled_program():
    def checkpoints(remat):
        model = random_model("e2b", remat_config=remat)
        tokens, _ = draw_tokens(model.config, "tt(ii)t")
        graphdef, state = nnx.split(model)
        images = draw_images(model.config, [(2, 1)])
        jaxpr = jax.make_jaxpr(lambda s: nnx.merge(graphdef, s)(tokens, images=images)[0])(state)
        return [equation.primitive.name for equation in jaxpr.eqns].count("remat2")

    config = tiny_config("e2b")
    text, vision = config.num_layers, config.vision_config.num_hidden_layers
    assert [checkpoints(remat) for remat in (1, 2, 3)] == [0, text + vision, text + vision]


def test_hidden_states_through_the_head_are_the_logits():
    model = random_model("e4b", text_only=True)
    tokens, _ = draw_tokens(model.config, "t" * 12)
    hidden, _ = forward(model, tokens, skip_lm_head=True)
    assert hidden.shape == (1, 12, model.config.embed_dim)
    assert_logits_agree(model.compute_final_logits(hidden), forward(model, tokens)[0])


def test_output_hidden_states_sows_every_layer_and_ends_with_what_the_head_reads():
    model = random_model("e2b", text_only=True)
    tokens, _ = draw_tokens(model.config, "t" * 6)
    final, _ = model(tokens, skip_lm_head=True, output_hidden_states=True)
    (states,) = nnx.pop(model, nnx.Intermediate).values()
    states = states.get_value()
    assert len(states) == model.config.num_layers
    assert all(state.shape == final.shape for state in states)
    np.testing.assert_array_equal(states[-1], final)
    assert np.abs(np.asarray(states[0] - states[1])).max() > 0.01


# ---- Images that do not fit.


def test_images_to_a_text_only_model_are_refused():
    model = random_model("e2b", text_only=True)
    images = draw_images(tiny_config("e2b"), [(1, 1)])
    with pytest.raises(ValueError, match="build or load it with text_only=False"):
        model(jnp.zeros((1, 4), jnp.int32), images=images)


def test_rows_in_turn_that_share_images_have_them_encoded_once():
    """Values and gradients are those of images given to each row."""
    model = random_model("26b_a4b")
    tokens, _ = draw_tokens(model.config, *["t(ii)tt"] * 2, *["t(iiii)"] * 2)
    images = draw_images(model.config, [(2, 1)], [(2, 2)])

    @nnx.jit
    def loss(model, images):
        def total(model):
            logits, _ = model(tokens, images=images, image_repeats=4 // images.shape[0])
            return jnp.sin(logits).sum(), logits

        (_, logits), gradient = nnx.value_and_grad(total, has_aux=True)(model)
        return logits, gradient

    shared, gradient = loss(model, images)
    each, expected = loss(model, jnp.repeat(images, 2, axis=0))
    assert_logits_agree(shared, each)
    for found, wanted in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    with pytest.raises(ValueError, match=r"expected shape \[2, I, M, .*found \(4, "):
        model(tokens, images=jnp.repeat(images, 2, axis=0), image_repeats=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: images[0], r"images: expected shape \[1, I, M, 50\].*found \(1, 108, 50\)"),
        (lambda images: images[..., :-2], r"found \(1, 1, 108, 48\)"),
        (lambda images: jnp.repeat(images, 2, axis=0), r"found \(2, 1, 108, 50\)"),
        (lambda images: images[:, :, :-1], "M divisible by pooling_kernel_size.*9, found 107"),
        (lambda images: images.astype(jnp.bfloat16), "images: expected float32.*found bfloat16"),
    ],
    ids=["no-batch-axis", "no-positions", "another-batch", "patches", "dtype"],
)
def test_images_of_the_wrong_form_are_refused(spoil, message):
    model = random_model("e2b")
    tokens, _ = draw_tokens(model.config, "t(i)")
    with pytest.raises(ValueError, match=message):
        model(tokens, images=spoil(draw_images(model.config, [(1, 1)])))


@pytest.mark.parametrize("drawn", ["t(iii)t", "t(iiiii)t", "ttttttt"], ids=["few", "many", "none"])
def test_placeholders_that_differ_from_soft_tokens_raise_eagerly_and_are_nan_under_jit(drawn):
    model = random_model("e2b")
    good = "t(iiii)t"
    tokens, _ = draw_tokens(model.config, good, drawn.ljust(len(good), "t")[: len(good)])
    images = draw_images(model.config, [(2, 2)], [(2, 2)])
    count = drawn.count("i")
    with pytest.raises(ValueError, match=f"row 1 has {count} image placeholders .* but 4 soft"):
        model(tokens, images=images)
    logits, _ = forward(model, tokens, images=images)
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()


def test_placeholders_without_images_raise_eagerly_and_are_nan_under_jit():
    model = random_model("e2b")
    tokens, _ = draw_tokens(model.config, "t(ii)t", "tttttt")
    with pytest.raises(ValueError, match="row 0 has 2 image placeholders .* but 0 soft tokens"):
        model(tokens)
    logits, _ = forward(model, tokens)
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


def test_no_mix_of_image_sizes_recompiles_within_one_bucket():
    model = random_model("e2b")
    graphdef, state = nnx.split(model)
    traces = []

    @jax.jit
    def run(state, tokens, images):
        traces.append(tokens.shape)
        return nnx.merge(graphdef, state)(tokens, images=images)[0]

    mixes = [
        (("t(iiii)tttttttttt", "tt(iiiiii)(iiii)t"), ([(2, 2)], [(3, 2), (2, 2)])),
        (("(iiiiiiiiiiii)ttt", "ttttttttttttttttt"), ([(6, 2)], [])),
        (("(i)tttttttttt(ii)", "....ttttt(iii)ttt"), ([(1, 1), (1, 2)], [(1, 3)])),
    ]
    for rows, grids in mixes:
        tokens, _ = draw_tokens(model.config, *rows)
        logits = run(state, tokens, draw_images(model.config, *grids, count=2))
        assert np.isfinite(logits).all()
    assert len(traces) == 1


def test_unused_image_slots_do_not_matter():
    model = random_model("31b")
    tokens, _ = draw_tokens(model.config, "t(iiii)t(ii)tt")
    grids = [(2, 2), (2, 1)]
    tight, _ = forward(model, tokens, images=draw_images(model.config, grids))
    loose = draw_images(model.config, grids, count=4)[:, jnp.array([2, 0, 3, 1])]
    assert_logits_agree(forward(model, tokens, images=loose)[0], tight)


def test_the_order_of_images_matters():
    model = random_model("e4b")
    tokens, _ = draw_tokens(model.config, "t(iiii)t(iiii)tt")
    images = draw_images(model.config, [(2, 2), (2, 2)])
    there, _ = forward(model, tokens, images=images)
    back, _ = forward(model, tokens, images=images[:, ::-1])
    assert np.abs(np.asarray(there - back)).max() > 0.01


# ---- Masks, drawn.


def _matrix(drawing: str) -> np.ndarray:
    """A mask from rows of 1 and 0."""
    return np.array(
        [[int(x) for x in line.split()] for line in drawing.split("\n") if line.strip()]
    )


def test_causal_mask_is_the_lower_triangle():
    expected = """
        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1
    """
    slots = masks.Tokens(jnp.arange(4))
    np.testing.assert_array_equal(masks.visible_pairs(slots, slots, None), _matrix(expected))


def _sliding_and_full(config, drawn: str, **inputs) -> dict[str, np.ndarray]:
    tokens, _ = draw_tokens(config, drawn)
    found = masks.attention_masks(config, tokens, **({"attention_mask": None} | inputs))
    whole = (0, len(drawn))
    return {kind: np.asarray(mask.block(whole, whole)[0], int) for kind, mask in found.items()}


def test_sliding_layers_see_one_window_themselves_included():
    found = _sliding_and_full(tiny_config("e2b", sliding_window=3), "ttttt")
    sliding = """
        1 0 0 0 0
        1 1 0 0 0
        1 1 1 0 0
        0 1 1 1 0
        0 0 1 1 1
    """
    np.testing.assert_array_equal(found["sliding"], _matrix(sliding))
    np.testing.assert_array_equal(found["full"], np.tril(np.ones((5, 5))))


def test_tokens_of_one_image_see_each_other_in_sliding_layers_within_the_window():
    found = _sliding_and_full(tiny_config("31b", sliding_window=3), "tiiii(ii)")
    #   t i i i i ( i i )
    sliding = """
        1 0 0 0 0 0 0 0 0
        1 1 1 1 0 0 0 0 0
        1 1 1 1 1 0 0 0 0
        0 1 1 1 1 0 0 0 0
        0 0 1 1 1 0 0 0 0
        0 0 0 1 1 1 0 0 0
        0 0 0 0 1 1 1 1 0
        0 0 0 0 0 1 1 1 0
        0 0 0 0 0 0 1 1 1
    """
    np.testing.assert_array_equal(found["sliding"], _matrix(sliding))
    np.testing.assert_array_equal(found["full"], np.tril(np.ones((9, 9))))


def test_tokens_of_one_image_are_causal_where_the_config_does_not_ask_for_blocks():
    found = _sliding_and_full(tiny_config("e2b", sliding_window=8), "tiii")
    np.testing.assert_array_equal(found["sliding"], np.tril(np.ones((4, 4))))


def test_segments_and_padding_are_respected_by_every_kind_of_layer():
    padding = jnp.array([[1, 1, 1, 1, 0]])
    visible = jnp.tril(jnp.ones((1, 5, 5), jnp.int32)) * padding[:, None]
    found = _sliding_and_full(
        tiny_config("31b", sliding_window=2),
        "tiitt",
        attention_mask=visible,
        segment_ids=jnp.array([[1, 1, 2, 2, 2]]),
    )
    sliding = """
        1 0 0 0 0
        1 1 0 0 0
        0 0 1 0 0
        0 0 1 1 0
        0 0 0 1 0
    """
    full = """
        1 0 0 0 0
        1 1 0 0 0
        0 0 1 0 0
        0 0 1 1 0
        0 0 1 1 0
    """
    np.testing.assert_array_equal(found["sliding"], _matrix(sliding))
    np.testing.assert_array_equal(found["full"], _matrix(full))


def test_a_mask_of_the_wrong_shape_is_refused():
    model = random_model("e2b", text_only=True)
    tokens = jnp.zeros((2, 6), jnp.int32)
    with pytest.raises(
        ValueError, match=r"expected shape \(2, 6, 6\), any axis .*, found \(2, 6, 5\)"
    ):
        model(tokens, attention_mask=jnp.ones((2, 6, 5), bool))
    with pytest.raises(
        ValueError, match=r"expected shape \(2, 6, 9\), any axis .*, found \(2, 6, 6\)"
    ):
        cache = model.init_cache(2, 9, jnp.float32)
        model(tokens, cache=cache, attention_mask=jnp.ones((2, 6, 6), bool))


def test_a_mesh_with_explicit_axes_is_refused_before_anything_moves():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with pytest.raises(ValueError, match="mesh: expected Auto axes.*pass it axis_types="):
        shard_model(random_model("12b"), mesh)


# ---- What the host asks for.


@pytest.mark.parametrize("preset", TEXT_PRESETS)
def test_get_model_input_runs_and_reaches_the_tower(preset):
    model = random_model(preset)
    inputs = model.get_model_input()
    logits, _ = forward(model, **inputs)
    assert np.isfinite(logits).all()
    assert ("images" in inputs) == model.config.has_vision
    if model.config.has_vision:
        # One soft token a row, and what it shows makes a difference.
        assert ((inputs["tokens"] == model.config.image_token_id).sum(axis=1) == 1).all()
        inputs["images"] = inputs["images"].at[..., :-2].add(0.3)
        assert np.abs(np.asarray(forward(model, **inputs)[0] - logits)).max() > 0.01


def test_configs_compare_by_value_and_hash_alike():
    assert tiny_config("e2b") == tiny_config("e2b")
    assert hash(tiny_config("e2b")) == hash(tiny_config("e2b"))
    assert tiny_config("e2b") != dataclasses.replace(tiny_config("e2b"), sliding_window=9)
    assert tiny_config("e2b") != tiny_config("e2b", text_only=True)


def test_models_of_equal_configs_share_one_compiled_program():
    traces = []

    @nnx.jit
    def run(model, tokens):
        traces.append(1)
        return model(tokens)[0]

    tokens = jnp.ones((1, 5), jnp.int32)
    for seed in (0, 1):
        run(random_model("12b"), tokens + seed)
    assert len(traces) == 1
