# SPDX-License-Identifier: Apache-2.0
"""A score for every token: its head, where it comes from, what trains, and files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file
from small_models import draw_images, draw_tokens, forward, random_model
from tunix.rl import common
from tunix.sft import peft_trainer

import tunix_gemma4
from tunix_gemma4.checkpoint import load_checkpoint, save_checkpoint
from tunix_gemma4.checkpoint.names import SCORE
from tunix_gemma4.lora import LoraConfig, apply_lora, load_adapter, merge_lora, save_adapter
from tunix_gemma4.lora.adapters import adapted
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration, Gemma4ForTokenScores
from tunix_gemma4.sharding import param_shardings, shard_model

ROWS = ("t(iiii)ttttt", "tttt(iiii)tt")
SIZES = ([(2, 2)], [(2, 2)])
LORA = LoraConfig(rank=4, alpha=8, targets="language")


@pytest.fixture(scope="module")
def policy():
    """Never changed: the tests train copies."""
    return random_model("demo", text_only=False)


def scorer(policy, *, seed=1, **options):
    """A model of scores whose head has learnt something."""
    scores = Gemma4ForTokenScores.from_policy(policy, **options)
    kernel = scores.score.kernel
    kernel[...] = jax.device_put(
        jax.random.normal(jax.random.key(seed), kernel.shape), kernel[...].sharding
    )
    return scores


@pytest.fixture(scope="module")
def scores(policy):
    return scorer(policy)


@pytest.fixture(scope="module")
def inputs(policy):
    tokens, _ = draw_tokens(policy.config, *ROWS)
    return {"tokens": tokens, "images": draw_images(policy.config, *SIZES)}


def arrays(model):
    """The arrays of all variables, by path."""
    state = nnx.to_flat_state(nnx.state(model))
    return {path: variable.get_raw_value() for path, variable in state}


def bytes_of(model):
    return {path: np.asarray(array).tobytes() for path, array in arrays(model).items()}


# ---- The head.


def test_scores_are_the_policys_final_states_times_the_head(policy, scores, inputs):
    hidden, _ = forward(policy, **inputs, skip_lm_head=True)
    expected = np.asarray(hidden, np.float64) @ np.asarray(scores.score.kernel[...], np.float64)
    found, cache = forward(scores, **inputs)
    assert cache is None
    assert found.shape == (2, 12, 1) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_new_head_is_zero_and_float32_whatever_the_body_is(dtype):
    policy = random_model("demo", text_only=False, dtype=dtype, param_dtype=dtype)
    for model in (
        Gemma4ForTokenScores.from_policy(policy),
        Gemma4ForTokenScores(policy.config, rngs=nnx.Rngs(0)),
    ):
        assert model.language_model.norm.weight.dtype == dtype
        assert model.score.kernel.dtype == jnp.float32
        assert not np.any(model.score.kernel[...])
    tokens, _ = draw_tokens(policy.config, "tttt")
    found, _ = forward(scorer(policy), tokens)
    assert found.dtype == jnp.float32 and np.isfinite(found).all() and np.any(found)


def test_scores_with_a_cache_are_those_of_the_whole_row(scores):
    tokens, _ = draw_tokens(scores.config, "tttttt")
    whole, _ = forward(scores, tokens)
    cache = scores.init_cache(1, 6, jnp.float32)
    first, cache = forward(scores, tokens[:, :5], cache=cache)
    last, _ = forward(scores, tokens[:, 5:], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([first, last], axis=1), whole, atol=1e-4)


def test_a_model_of_scores_is_no_policy(scores):
    assert tunix_gemma4.Gemma4ForTokenScores is Gemma4ForTokenScores
    assert not isinstance(scores, Gemma4ForConditionalGeneration)


# ---- What the host computes with it.


def compute_score(model, prompts, completions, **options):
    return common.compute_score(model, prompts, completions, 0, 1, **options)


def test_padding_on_either_side_does_not_change_a_score(scores):
    padded, _ = draw_tokens(scores.config, "....ttttttt.....")
    found = compute_score(scores, padded[:, :8], padded[:, 8:])
    bare = padded[:, 4:11]
    expected = compute_score(scores, bare[:, :4], bare[:, 4:])
    assert found.shape == (1, 16)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found[:, 4:11], expected, rtol=0, atol=1e-4 * largest)


def test_packed_rows_have_the_scores_of_separate_ones(scores, inputs):
    tokens, images = inputs["tokens"], inputs["images"]
    length = tokens.shape[1]
    packed = forward(
        scores,
        tokens.reshape(1, -1),
        segment_ids=jnp.repeat(jnp.array([[1, 2]]), length, axis=1),
        images=images.reshape(1, 2, *images.shape[2:]),
    )[0].reshape(2, length)
    separate = forward(scores, **inputs)[0][..., 0]
    largest = np.abs(separate).max()
    np.testing.assert_allclose(packed, separate, rtol=0, atol=1e-4 * largest)
    # Without segments the second row sees the first.
    unseparated, _ = forward(
        scores, tokens.reshape(1, -1), images=images.reshape(1, 2, *images.shape[2:])
    )
    assert np.abs(unseparated[0, length:, 0] - separate[1]).max() > 0.01 * largest


def test_the_hosts_packed_scores_are_those_of_separate_rows(scores):
    tokens, _ = draw_tokens(scores.config, "tttttt", "tttttt")
    separate = compute_score(scores, tokens[:, :2], tokens[:, 2:])
    packed = compute_score(
        scores,
        jnp.zeros((1, 0), jnp.int32),
        tokens.reshape(1, -1),
        segment_ids=jnp.repeat(jnp.array([[1, 2]]), 6, axis=1),
        segment_positions=jnp.tile(jnp.arange(6), 2)[None],
    )
    largest = np.abs(separate).max()
    np.testing.assert_allclose(packed.reshape(2, 6), separate, rtol=0, atol=1e-4 * largest)


def test_gradients_reach_the_head_and_every_layer_and_stop_where_asked(policy, scores):
    tokens, _ = draw_tokens(policy.config, "tttttttttttt", "tttttttttttt")

    def loss(model, stop):
        return compute_score(model, tokens[:, :7], tokens[:, 7:], stop_gradient=stop).sum()

    gradients = arrays_of_gradients(loss, scores, False)
    hidden, _ = forward(policy, tokens, skip_lm_head=True)
    of_head = gradients.pop((SCORE, "kernel"))[:, 0]
    np.testing.assert_allclose(of_head, np.asarray(hidden).sum((0, 1)), rtol=1e-3, atol=1e-3)
    # Without images the tower gets none.
    text = {path: g for path, g in gradients.items() if path[0] == "language_model"}
    assert len(text) > 20 and all(np.any(gradient) for gradient in text.values())
    assert not any(map(np.any, arrays_of_gradients(loss, scores, True).values()))


def arrays_of_gradients(loss, model, stop):
    gradients = nnx.jit(nnx.grad(lambda model: loss(model, stop)))(model)
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(gradients)}


def test_a_mesh_of_eight_devices_computes_the_scores_of_one(scores, inputs):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = shard_model(random_model("demo", text_only=False), mesh)
    sharded = scorer(placed)
    expected = nnx.to_flat_state(param_shardings(nnx.state(sharded), mesh))
    found = arrays(sharded)
    assert {path: found[path].sharding for path in found} == {
        path: variable.get_raw_value() for path, variable in expected
    }
    assert not found[SCORE, "kernel"].sharding.is_fully_replicated
    rows = {name: jnp.repeat(value, 2, axis=0) for name, value in inputs.items()}
    single = np.asarray(forward(scores, **inputs)[0]).repeat(2, axis=0)
    with mesh:
        on_mesh, _ = forward(sharded, **rows)
    np.testing.assert_allclose(on_mesh, single, rtol=0, atol=1e-4 * np.abs(single).max())


# ---- From a policy.


def test_from_policy_copies_arrays_unless_told_to_share_them(policy):
    own = arrays(policy)
    for share in (False, True):
        model = Gemma4ForTokenScores.from_policy(policy, share_arrays=share)
        held = arrays(model)
        assert held.keys() - own.keys() == {(SCORE, "kernel")}
        assert all((held[path] is own[path]) == share for path in own)
        variables = {id(variable) for _, variable in nnx.to_flat_state(nnx.state(policy))}
        ours = {id(variable) for _, variable in nnx.to_flat_state(nnx.state(model))}
        assert not variables & ours


def test_a_critic_survives_a_step_that_donates_the_policys_arrays(inputs):
    policy = random_model("demo", text_only=False)
    critic = scorer(policy)
    before = forward(critic, **inputs)[0]
    for array in arrays(policy).values():
        array.delete()
    np.testing.assert_array_equal(forward(critic, **inputs)[0], before)


def test_from_policy_works_on_shapes(policy):
    abstract = nnx.eval_shape(lambda: Gemma4ForTokenScores.from_policy(policy))
    assert abstract.score.kernel.get_raw_value() == jax.ShapeDtypeStruct((64, 1), jnp.float32)


def test_a_policy_with_adapters_is_merged_by_the_caller(policy, inputs):
    lora = perturbed(apply_lora(policy, LORA))
    with pytest.raises(ValueError, match=r"from_policy\(merge_lora\(policy\)\)"):
        Gemma4ForTokenScores.from_policy(lora)
    hidden, _ = forward(lora, **inputs, skip_lm_head=True)
    model = scorer(merge_lora(lora))
    expected = np.asarray(hidden) @ np.asarray(model.score.kernel[...])
    found, _ = forward(model, **inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


# ---- Training.


def perturbed(model, size=0.05):
    """Gives every B values, so that the adapters do something."""
    for index, module in enumerate(adapted(model).values()):
        b = module.kernel_lora_b
        b[...] = size * jax.random.normal(jax.random.key(index), b.shape)
    return model


def learn(model, inputs, *, steps=6, rate=3e-3):
    """Trains scores towards 0.3 and 0.7 in the host's trainer; the losses."""

    def loss(model, tokens, images, goals):
        found = model(tokens, images=images)[0][..., 0]
        return jnp.square(found - goals[:, None]).mean()

    config = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=steps)
    trainer = peft_trainer.PeftTrainer(model, optax.adam(rate), config)
    trainer.with_loss_fn(loss).with_gen_model_input_fn(dict)
    trainer.train([inputs | {"goals": jnp.array([0.3, 0.7])}] * steps)
    assert trainer.train_steps == steps
    return trainer.metrics_logger.get_metric_history("", "loss", "train")


@pytest.mark.parametrize("share", [False, True])
def test_training_a_critic_leaves_the_actor_bit_for_bit_and_the_reverse(policy, inputs, share):
    actor = nnx.clone(policy)
    critic = Gemma4ForTokenScores.from_policy(actor, share_arrays=share)
    before, started = bytes_of(actor), bytes_of(critic)
    losses = learn(critic, inputs)
    assert losses[-1] < 0.5 * losses[0]
    assert bytes_of(actor) == before
    trained = bytes_of(critic)
    assert all(trained[path] != started[path] for path in trained)
    for _, variable in nnx.to_flat_state(nnx.state(actor)):
        variable[...] = variable[...] + 1
    assert bytes_of(critic) == trained


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_critic_with_adapters_trains_them_and_its_head_alone(policy, inputs, quantize):
    config = LoraConfig(rank=4, alpha=8, targets="language", quantize=quantize)
    critic = apply_lora(Gemma4ForTokenScores.from_policy(policy, share_arrays=True), config)
    assert isinstance(critic.score.kernel, nnx.Param)
    assert not np.any(forward(critic, **inputs)[0])
    before = bytes_of(critic)
    losses = learn(critic, inputs, steps=10, rate=1e-2)
    assert losses[-1] < 0.5 * losses[0]
    changed = {path for path, value in bytes_of(critic).items() if value != before[path]}
    matrices = {path for path in before if str(path[-1]).startswith("kernel_lora")}
    assert changed == matrices and {(SCORE, "kernel_lora_a"), (SCORE, "kernel_lora_b")} < changed
    if quantize is None:
        expected, _ = forward(critic, **inputs)
        found, _ = forward(merge_lora(critic), **inputs)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# ---- Files.


def test_a_saved_model_of_scores_comes_back_whole(tiny_checkpoint, tmp_path, inputs):
    source = tiny_checkpoint("e2b", audio=True)
    model = scorer(load_checkpoint(source, text_only=False))
    save_checkpoint(model, tmp_path / "critic")
    tensors = load_file(tmp_path / "critic" / "model.safetensors")
    np.testing.assert_array_equal(tensors["score.weight"], np.asarray(model.score.kernel[...]).T)
    assert tensors.keys() - load_file(source / "model.safetensors").keys() == {"score.weight"}
    settings = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert settings["architectures"] == ["Gemma4ForTokenScores"] and settings["num_labels"] == 1
    loaded = load_checkpoint(tmp_path / "critic", text_only=False, model_class=Gemma4ForTokenScores)
    assert bytes_of(loaded) == bytes_of(model)
    assert (tmp_path / "critic" / "tokenizer.json").is_file()
    # Saving what was loaded, from a text-only model, loses nothing either.
    text = load_checkpoint(tmp_path / "critic", model_class=Gemma4ForTokenScores)
    save_checkpoint(text, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in tensors.items()
    }


def test_a_head_stays_in_float32_when_the_body_is_loaded_in_bfloat16(tiny_dir, tmp_path):
    model = scorer(load_checkpoint(tiny_dir))
    save_checkpoint(model, tmp_path / "critic")
    half = load_checkpoint(
        tmp_path / "critic", dtype=jnp.bfloat16, model_class=Gemma4ForTokenScores
    )
    assert half.language_model.norm.weight.dtype == jnp.bfloat16
    assert half.score.kernel.dtype == jnp.float32
    np.testing.assert_array_equal(half.score.kernel[...], model.score.kernel[...])


def test_a_directory_of_the_other_kind_is_refused_and_says_what_to_do(tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="no score head; load it as a policy") as error:
        load_checkpoint(tiny_dir, model_class=Gemma4ForTokenScores)
    assert "1 missing: score.weight" in str(error.value)
    assert "Is config.json that" not in str(error.value)
    save_checkpoint(scorer(load_checkpoint(tiny_dir)), tmp_path / "critic")
    with pytest.raises(ValueError, match="pass model_class=Gemma4ForTokenScores"):
        load_checkpoint(tmp_path / "critic")


def test_an_adapter_of_a_critic_holds_its_head(policy, inputs, tmp_path):
    critic = perturbed(apply_lora(Gemma4ForTokenScores.from_policy(policy), LORA))
    save_adapter(critic, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.score.lora_A.weight" in names
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] is None
    loaded = load_adapter(Gemma4ForTokenScores.from_policy(policy), tmp_path / "adapter")
    assert bytes_of(loaded) == bytes_of(critic)
    found, _ = forward(loaded, **inputs)
    assert np.any(found)
    with pytest.raises(ValueError, match="unexpected: .*score"):
        load_adapter(policy, tmp_path / "adapter")
