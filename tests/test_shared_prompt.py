# SPDX-License-Identifier: Apache-2.0
"""Rows in which completions share their prompt: all as in rows of their own."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from rl_rows import EOS, draw, logps as common_logps
from rl_setup import history, low_ids, make_cluster, mixed_batch
from small_models import IMAGE_PRESETS, draw_images, random_model
from test_dpo import make_batch as preference_batch, make_trainer as preference_trainer
from tunix.sft.dpo import dpo_trainer
from tunix.sft.sharding_utils import shard_input

import tunix_gemma4
from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.config import RematConfig
from tunix_gemma4.data.processor import Batch, Processor
from tunix_gemma4.lora import LoraConfig, apply_lora
from tunix_gemma4.model import attention
from tunix_gemma4.model.blockwise import block_pairs, shared_block_size
from tunix_gemma4.model.gemma4 import stack_layers
from tunix_gemma4.model.masks import AttentionMask, Tokens, visible_pairs
from tunix_gemma4.model.shared_prompt import SharedPrompt, completions_per_row
from tunix_gemma4.plugin.rl import lengths, logps, preferences
from tunix_gemma4.plugin.rl.cluster import make_algorithm
from tunix_gemma4.plugin.rl.context import RolloutContext, bind
from tunix_gemma4.plugin.rl.logps import chunked_logps
from tunix_gemma4.sampling import generate
from tunix_gemma4.settings.grpo import GrpoRunConfig
from tunix_gemma4.sharding import shard_model

# ---- The layout.

LAYOUTS = [SharedPrompt(7, 3, 4), SharedPrompt(8, 4, 2), SharedPrompt(3, 9, 3)]


def pairs_of_own_rows(layout, window, looks_ahead):
    """Who sees whom, by the rule of each completion's own row; an image in slots 1 and 2."""
    length, slots = layout.length, jnp.arange(layout.prompt + layout.completion)
    images = jnp.where((slots >= 1) & (slots < 3), 1, 0) if looks_ahead else None
    own = np.asarray(visible_pairs(*[Tokens(slots, images=images)] * 2, window))
    found = np.zeros((length, length), bool)
    for number in range(layout.count):
        start = layout.prompt + number * layout.completion
        columns = np.r_[: layout.prompt, start : start + layout.completion]
        found[np.ix_(columns, columns)] = own
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("window", "looks_ahead"), [(None, False), (4, False), (5, True)])
def test_a_completion_sees_what_it_sees_in_a_row_of_its_own(layout, window, looks_ahead):
    expected = pairs_of_own_rows(layout, window, looks_ahead)
    columns = jnp.arange(layout.length)
    images = jnp.where((columns >= 1) & (columns < 3), 1, 0)[None] if looks_ahead else None
    mask = AttentionMask(
        images=images, window=window, own=0, looks_ahead=looks_ahead, shared=layout
    )
    whole = mask.block((0, layout.length), (0, layout.length))[0]
    np.testing.assert_array_equal(whole, expected)
    for block in (2, 4, 5):
        length = layout.length + -layout.length % block
        pairs = block_pairs(mask, block, length, length)
        # Queries in turn, as the running softmax wants them, and no pair of blocks twice.
        assert list(pairs.starts) == sorted(set(pairs.starts))
        found = np.zeros((length, length), bool)
        for q, k in pairs.starts:
            found[q : q + block, k : k + block] = True
        assert found[: layout.length, : layout.length][expected].all()
        # None is touched in vain, but for images, which only their tokens know.
        for q, k in pairs.starts:
            meet = expected[q : q + block, k : k + block]
            assert looks_ahead or meet.any() or max(q, k) + block > layout.length


def test_blocks_are_as_long_as_few_pairs_are_touched_in_vain():
    mask = AttentionMask(own=0, shared=SharedPrompt(256, 512, 8))
    assert shared_block_size(mask, 256 + 8 * 512, (512, 256, 128)) == 256
    mask = AttentionMask(own=0, shared=SharedPrompt(1024, 128, 8))
    assert shared_block_size(mask, 2048, (512, 256, 128)) in (128, 256)


@pytest.mark.parametrize(
    ("rows", "group", "shards", "expected"),
    [
        (8, 8, 1, 8), (8, 4, 1, 4), (16, 8, 8, 2), (64, 8, 8, 8), (8, 8, 8, 1), (12, 6, 4, 3),
        (8, 6, 1, 1), (6, 3, 2, 3), (3, 1, 1, 1),
    ],
)  # fmt: skip
def test_as_many_completions_share_a_row_as_the_mesh_allows(rows, group, shards, expected):
    assert completions_per_row(rows, group, shards) == expected


# ---- The model on them.

GROUP = 4


def batch(config, images, prompts=2, completion=9):
    """Prompts GROUP times each, completions of any length, and images once a prompt."""
    kinds = ["tttitttit", "tti", "itttttti", "tittttttttttttt"][:prompts]
    # Two images at most; padded on the left.
    if not images:
        kinds = [kind.replace("i", "tttt") for kind in kinds]
    lengths = np.random.default_rng(3).integers(1, completion + 1, prompts * GROUP)
    lengths[0] = completion
    rows = draw(config, ["t" * n for n in lengths], side="right", seed=1)
    prompt = jnp.repeat(draw(config, kinds, side="left"), GROUP, axis=0)
    sizes = [[(2, 2)] * kind.count("i") for kind in kinds]
    return prompt, rows, draw_images(config, *sizes) if images else None


def found(model, kind, rows, count, order=None):
    """Log-probabilities, entropies and the gradient of their weighted sum."""
    prompts, completions, images = rows
    weights = np.random.default_rng(5).normal(size=completions.shape)
    weights = jnp.asarray(weights * (completions != model.config.pad_token_id), jnp.float32)
    if order is not None:
        prompts, completions, weights = (x[order] for x in (prompts, completions, weights))
        images = None if images is None else jnp.repeat(images, GROUP, axis=0)[order]
    graphdef, trained, rest = nnx.split(model, kind, ...)

    def loss(trained):
        repeats = 1 if images is None else len(prompts) // len(images)
        logps, entropy = chunked_logps(
            *(graphdef, nnx.merge_state(trained, rest), prompts, completions, images, None, None),
            jnp.float32(0.9),
            pad_id=model.config.pad_token_id,
            eos_id=EOS,
            suppressed=(5,),
            image_repeats=repeats,
            completions_per_row=count,
        )
        return ((logps + 0.1 * entropy) * weights).sum(), (logps, entropy)

    (_, scores), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
    return [np.where(weights != 0, x, 0) for x in scores], gradient


def assert_shared_as_separate(model, kind, rows, count):
    scores, gradient = found(model, kind, rows, count)
    expected, separate = found(model, kind, rows, 1)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(separate))
    assert largest > 0.1
    differences = apart(scores, expected), apart(gradient, separate)
    if differences[0] > 1e-5 or differences[1] > 5e-5 * largest:
        # What another order of the same separate rows changes is rounding.
        backwards = np.arange(len(rows[0]))[::-1]
        others, control = found(model, kind, rows, 1, backwards)
        others = [score[backwards] for score in others]
        assert differences[0] <= max(1e-5, 3 * apart(others, expected))
        assert differences[1] <= max(5e-5 * largest, 3 * apart(control, separate))


def apart(one, other):
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs)


def with_adapters(preset, quantize=None, stacked=False, **fields):
    """Adapters that are not zero, on all projections of the language model."""
    model = random_model(preset, **fields)
    model = apply_lora(
        model, LoraConfig(rank=2, quantize=quantize, tile_size=8 if quantize else None)
    )
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        leaf[...] = jax.random.normal(jax.random.key(1), leaf.shape) / 16
    return stack_layers(model) if stacked else model


@pytest.mark.parametrize(
    ("preset", "count", "block", "fields"),
    [
        ("e2b", 4, 8, {"remat_config": RematConfig.DECODER}),
        ("e4b", 2, 4, {}),
        ("12b", 4, 4, {"text_only": True}),
        ("26b_a4b", 4, 128, {"remat_config": RematConfig.BLOCK}),
        ("31b", 2, 6, {}),
    ],
)
def test_all_weights_learn_the_same(monkeypatch, preset, count, block, fields):
    monkeypatch.setattr(attention, "CPU_BLOCK", block)
    model = random_model(preset, **fields)
    images = preset in IMAGE_PRESETS
    assert_shared_as_separate(model, nnx.Param, batch(model.config, images), count)


@pytest.mark.parametrize(
    ("preset", "quantize", "stacked"),
    [
        ("e2b", None, True),
        ("e4b", "nf4", False),
        pytest.param("26b_a4b", None, True, marks=pytest.mark.slow),
        pytest.param("31b", "nf4", True, marks=pytest.mark.slow),
    ],
)
def test_adapters_learn_the_same(monkeypatch, preset, quantize, stacked):
    monkeypatch.setattr(attention, "CPU_BLOCK", 8)
    model = with_adapters(preset, quantize, stacked, remat_config=RematConfig.DECODER)
    rows = batch(model.config, images=True)
    assert_shared_as_separate(model, nnx.LoRAParam, rows, GROUP)


def test_rows_on_a_mesh_learn_the_same():
    model = with_adapters("e2b", stacked=True)
    rows = batch(model.config, images=True, prompts=4)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))
    model = shard_model(model, mesh)
    with jax.set_mesh(mesh):
        assert_shared_as_separate(model, nnx.LoRAParam, shard_input(rows, ("fsdp",)), GROUP)


def test_bfloat16_is_as_near_to_float32_as_separate_rows_are():
    rows = batch(random_model("e2b").config, images=True)
    exact = found(random_model("e2b"), nnx.Param, rows, 1)[0][0]
    model = random_model("e2b", dtype=jnp.bfloat16)
    own, shared = (
        np.abs(found(model, nnx.Param, rows, count)[0][0] - exact) for count in (1, GROUP)
    )
    assert shared.mean() <= 1.5 * own.mean() and shared.max() <= 2 * own.max()


def test_a_prompt_that_differs_from_its_rows_gives_no_numbers():
    model = random_model("demo", text_only=True)
    prompts, completions, _ = batch(model.config, images=False)
    prompts = prompts.at[1, -1].add(1)
    (scores, _), _ = found(model, nnx.Param, (prompts, completions, None), GROUP)
    assert np.isnan(scores[1, 0]) and np.isfinite(np.delete(scores, 1, axis=0)).all()


# ---- One prefill for them.


@pytest.mark.parametrize(
    ("preset", "fields", "mesh"),
    [
        ("e2b", {}, False),
        ("26b_a4b", {"use_sliding_window_kv_cache": True}, False),
        ("e4b", {"use_sliding_window_kv_cache": True}, True),
    ],
)
def test_one_prefill_gives_what_several_give(preset, fields, mesh):
    model = random_model(preset, **fields)
    prompts, _, images = batch(model.config, images=True, prompts=4)
    real = np.asarray(prompts != model.config.pad_token_id, np.int32)
    given = Batch(np.asarray(prompts), np.zeros_like(real), real, np.asarray(images))
    if mesh:
        devices = np.array(jax.devices()).reshape(4, 2)
        model = shard_model(stack_layers(model), Mesh(devices, ("fsdp", "tp")))
    options = {"max_new_tokens": 9, "image_repeats": GROUP, "stop_ids": (7,), "temperature": 0.8}
    several = generate(model, given, **options)
    one = generate(model, given, **options, prompt_repeats=GROUP)
    np.testing.assert_array_equal(one.tokens, several.tokens)
    np.testing.assert_allclose(one.logps, several.logps, rtol=1e-5)
    assert len({tuple(row) for row in np.asarray(one.tokens[:GROUP]).tolist()}) > 1


def test_prompts_that_differ_have_no_common_prefill():
    model = random_model("demo", text_only=True)
    prompts, _, _ = batch(model.config, images=False)
    real = np.ones_like(prompts)
    given = Batch(np.asarray(prompts.at[5, 0].add(1)), np.zeros_like(real), real, None)
    with pytest.raises(ValueError, match="rows 4 to 7 do not have the same prompt"):
        generate(model, given, max_new_tokens=2, prompt_repeats=GROUP)
    with pytest.raises(ValueError, match="prompt_repeats: expected a divisor of the 8 rows"):
        generate(model, given, max_new_tokens=2, prompt_repeats=3)


# ---- Through the host's functions.


@pytest.fixture
def registered():
    tunix_gemma4.register()
    # Each message is said once, so that an earlier test may have heard it.
    logging._log_counter_per_token.clear()
    yield
    tunix_gemma4.unregister()


@pytest.fixture
def per_row(monkeypatch):
    """How many completions each call put in a row."""
    seen, original = [], logps.chunked_logps

    def spy(*args, completions_per_row, **kwargs):
        seen.append(completions_per_row)
        return original(*args, completions_per_row=completions_per_row, **kwargs)

    monkeypatch.setattr(logps, "chunked_logps", spy)
    return seen


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("case", ["fits", "shuffled", "too few rows", "a kernel", "not told"])
def test_rows_share_where_that_is_known_and_fits(case, per_row, caplog):
    fields = {"attention_implementation": "splash"} if case == "a kernel" else {}
    model = random_model("demo", text_only=True, **fields)
    prompts, completions, _ = batch(model.config, images=False)
    if case == "shuffled":
        order = np.random.default_rng(0).permutation(len(prompts))
        prompts, completions = prompts[order], completions[order]
    mesh = Mesh(np.array(jax.devices()).reshape(8, 1), ("fsdp", "tp"))
    expected = common_logps(model, prompts, completions)
    group = 1 if case == "not told" else GROUP
    with contextlib.ExitStack() as stack:
        stack.enter_context(caplog.at_level("WARNING", "absl"))
        stack.enter_context(bind(RolloutContext(group=group)))
        if case == "too few rows":
            stack.enter_context(jax.set_mesh(mesh))
        found = common_logps(model, prompts, completions)
    real = np.asarray(completions != model.config.pad_token_id)
    np.testing.assert_allclose(np.where(real, found, 0), np.where(real, expected, 0), atol=1e-5)
    assert per_row == [1, GROUP if case == "fits" else 1]
    said = {
        "shuffled": "4 rows next to each other do not have the same prompt",
        "too few rows": "8 rows lie on 8 parts of the mesh",
        "a kernel": "attention_implementation asks for a kernel",
    }
    assert said.get(case, "Completions are computed") in caplog.text or case in ("fits", "not told")
    assert ("Completions are computed" in caplog.text) == (case in said)


@pytest.mark.parametrize(
    ("limit", "expected"), [(512, [128, 256, 512]), (40, [20, 40]), (20, [20]), (4, [4])]
)
def test_lengths_are_the_limit_its_half_and_its_quarter(limit, expected):
    assert lengths.allowed_lengths(limit) == expected
    assert lengths.fitting_length(0, limit) == expected[0]
    assert lengths.fitting_length(expected[0], limit) == expected[0]
    assert lengths.fitting_length(limit + 1, limit) == limit


def test_columns_hold_every_token():
    prompts, completions = np.zeros((2, 64), int), np.zeros((2, 32), int)
    assert lengths.columns_of(prompts, completions, 0) == (16, 16)
    prompts[0, -16:] = completions[1, 15] = 1
    assert lengths.columns_of(prompts, completions, 0) == (16, 16)
    prompts[1, -17] = completions[0, 16] = 1
    assert lengths.columns_of(prompts, completions, 0) == (32, 32)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("group", [1, GROUP])
@pytest.mark.parametrize("compiled", [False, True])
def test_columns_of_padding_are_not_computed(group, compiled, monkeypatch):
    monkeypatch.setattr(lengths, "_LEAST", 1)
    model = random_model("demo", text_only=True)
    pad = model.config.pad_token_id
    prompts, completions, _ = batch(model.config, images=False)
    wide = prompts.shape[1] * 4, completions.shape[1] * 2
    prompts = jnp.pad(prompts, ((0, 0), (prompts.shape[1] * 3, 0)), constant_values=pad)
    completions = jnp.pad(completions, ((0, 0), (0, wide[1] // 2)), constant_values=pad)
    expected = common_logps(model, prompts, completions)
    computed = []

    def spy(model, hidden, targets, **options):
        computed.append(targets.shape[1])
        return original(model, hidden, targets, **options)

    original = logps.per_token_logps
    monkeypatch.setattr(logps, "per_token_logps", spy)
    logps.chunked_logps.clear_cache()  # It is called where a program is traced.
    graphdef, state = nnx.split(model)

    def run(prompts, completions):
        return common_logps(nnx.merge(graphdef, state), prompts, completions)

    function = jax.jit(run) if compiled else run
    columns = wide[0] // 4, wide[1] // 2
    with bind(RolloutContext(group=group, columns=columns)):
        found = function(prompts, completions)
    assert found.shape == completions.shape and computed == [columns[1]]
    real = np.asarray(completions != pad)
    np.testing.assert_allclose(np.where(real, found, 0), np.where(real, expected, 0), atol=1e-5)
    # Rows that are longer than is said of their batch.
    longer = jnp.where(completions == pad, 30, completions)
    with bind(RolloutContext(group=group, columns=columns)):
        found = function(prompts, longer)
    if compiled:
        assert np.isnan(found).all()
    else:
        expected = common_logps(model, prompts, longer)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("loss_type", ["gspo", "dapo"])
def test_a_run_learns_the_same_with_shared_prompts(
    tiny_checkpoint, loss_type, per_row, monkeypatch
):
    """Images, adapters, a reference or off-policy updates, micro-batches, and short rows."""
    seen = []
    for most in (1, None):
        # At first rows of the limits' lengths.
        monkeypatch.setattr(lengths, "_LEAST", 1000 if most else 2)
        cluster = make_cluster(
            tiny_checkpoint("demo"),
            lora=True,
            reference=loss_type == "gspo",
            micro=2,
            mini_batch_size=4,
            max_tokens=8,
            optimizer=optax.sgd(0.05),
            steps=4,
        )
        cluster.rollout.completions_per_row = most
        settings = GrpoRunConfig(
            loss_type=loss_type,
            num_generations=4,
            num_iterations=2,
            beta=0.1 if loss_type == "gspo" else 0.0,
        )
        learner, algorithm = make_algorithm(settings)
        learner = learner(rl_cluster=cluster, algo_config=algorithm, reward_fns=[low_ids])
        learner.train([mixed_batch(0), mixed_batch(1)])
        names = ("loss", "entropy", "grad_norm", "pg_clipfrac")
        seen.append([history(cluster, name) for name in names])
        assert len(seen[-1][0]) == 4
        counts = set(per_row)
        per_row.clear()
        assert counts == {most or 4}
    for separate, shared in zip(*seen, strict=True):
        np.testing.assert_allclose(shared, separate, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("algorithm", ["dpo", "orpo"])
def test_two_answers_share_their_prompt(tiny_checkpoint, algorithm, monkeypatch):
    directory = tiny_checkpoint("demo")
    processor = Processor.from_pretrained(directory, max_soft_tokens=70)
    given = preference_batch(processor, pictures=(1, 2))
    model = load_checkpoint(directory, text_only=False)
    reference = load_checkpoint(directory, text_only=False) if algorithm == "dpo" else None
    for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        leaf[...] = leaf[...] * 1.01
    results = []
    for shards in (1, 3):  # Two pairs do not lie on three parts.
        monkeypatch.setattr(preferences, "batch_shards", lambda shards=shards: shards)
        trainer = preference_trainer(model, reference, algorithm=algorithm)
        inputs = trainer.gen_model_input_fn(trainer._prepare_inputs(given))
        loss = nnx.value_and_grad(
            lambda model, inputs=inputs: dpo_trainer.dpo_loss_fn(model, **inputs), has_aux=True
        )
        results.append(loss(model))
    ((one, aux), gradient), ((other, expected), separate) = results
    np.testing.assert_allclose(one, other, atol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(aux[name], value, atol=5e-4, err_msg=name)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(separate))
    assert apart(gradient, separate) <= 5e-5 * largest


def test_rows_that_do_not_fit_are_refused():
    model = random_model("demo", text_only=True)
    tokens = jnp.full((1, 9), 20)
    with pytest.raises(ValueError, match="shared_prompt: expected rows of 11 tokens, found 9"):
        model(tokens, positions=tokens, shared_prompt=SharedPrompt(3, 4, 2))
    with pytest.raises(ValueError, match="shared_prompt: expected positions"):
        model(tokens, shared_prompt=SharedPrompt(3, 3, 2))
