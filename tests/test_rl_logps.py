# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, entropies and scores of Gemma 4 through Tunix's own functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from rl_rows import (
    EOS,
    PLAIN_DPO_LOGPS,
    PLAIN_ENTROPY,
    PLAIN_LOGPS,
    draw,
    logps,
    policy,
    relative,
    scorer,
    scores,
)
from small_models import draw_images, random_model
from tunix.rl import algo_core, common
from tunix.sft.sharding_utils import shard_input

import tunix_gemma4
from tunix_gemma4 import losses
from tunix_gemma4.plugin.rl.context import RolloutContext, bind
from tunix_gemma4.sharding import shard_model


@pytest.fixture(scope="module", autouse=True)
def _registered_with_small_chunks():
    tunix_gemma4.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_TOKENS", 9)
        yield
    tunix_gemma4.unregister()


@functools.cache
def with_images():
    """Prompts padded on the left, completions on the right, and no, one or two images a row."""
    config = policy().config
    images = draw_images(config, [], [(2, 2)], [(2, 2), (2, 2)])
    prompts = draw(config, ["ttt", "tit", "iitt"], side="left")
    return prompts, draw(config, ["ttttttt", "tttt", "ttttttttt"], side="right", seed=1), images


# ---- Chunked against plain.


@pytest.fixture(scope="module")
def plain():
    """Plain log-probabilities, logits and entropies at a temperature, with images."""
    prompts, completions, images = with_images()
    options = {"images": images, "temperature": 0.7, "return_logits": True}
    found, logits = logps(policy(), prompts, completions, function=PLAIN_LOGPS, **options)
    return found, logits, PLAIN_ENTROPY(logits)


def test_chunked_logps_and_entropies_equal_the_plain_ones(plain):
    prompts, completions, images = with_images()
    options = {"images": images, "temperature": 0.7, "return_logits": True}
    found, entropy = logps(policy(), prompts, completions, **options)
    assert found.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(found, plain[0], atol=1e-5)
    np.testing.assert_allclose(algo_core.compute_entropy_from_logits(entropy), plain[2], atol=1e-5)
    options.pop("return_logits")
    np.testing.assert_array_equal(logps(policy(), prompts, completions, **options), found)


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_segments_say_what_the_mask_does_where_the_kernel_cannot_take_one(plain, kernel):
    prompts, completions, images = with_images()
    model = random_model("demo", attention_implementation=kernel)
    found = logps(model, prompts, completions, images=images, temperature=0.7)
    words = np.asarray(completions != model.config.pad_token_id)
    np.testing.assert_allclose(found[words], plain[0][words], atol=1e-5)
    assert np.isfinite(found).all()
    assert np.abs(found - plain[0])[~words].max() > 1e-3  # So the mask was left out.


def test_images_and_temperature_in_work_are_used(plain):
    prompts, completions, images = with_images()
    with bind(RolloutContext(images=np.asarray(images), temperature=0.7)) as batch:
        found = logps(policy(), prompts, completions)
    np.testing.assert_allclose(found, plain[0], atol=1e-5)
    np.testing.assert_allclose(batch.record.logps, plain[0], atol=1e-5)
    np.testing.assert_allclose(batch.record.entropy, plain[2], atol=1e-5)


@pytest.mark.parametrize("positional", [False, True])
def test_a_temperature_that_is_passed_is_the_one_used(plain, positional):
    model, (prompts, completions, images) = policy(), with_images()
    call = (*nnx.split(model), prompts, completions, model.config.pad_token_id, EOS)
    with bind(RolloutContext(images=np.asarray(images), temperature=0.3)):
        if positional:
            found = common.compute_per_token_logps(*call, None, True, False, None, None, 0.7)
        else:
            found = common.compute_per_token_logps(*call, temperature=0.7)
    np.testing.assert_allclose(found, plain[0], atol=1e-5)


def test_suppressed_ids_have_no_probability(plain):
    prompts, completions, images = with_images()
    suppressed = (5, 251, 252)
    with bind(RolloutContext(images=np.asarray(images), suppressed=suppressed)) as batch:
        found = logps(policy(), prompts, completions, temperature=0.7)
    rest = jnp.delete(plain[1], jnp.array(suppressed), axis=-1)
    chosen = jnp.take_along_axis(plain[1], completions[..., None], axis=-1)[..., 0]
    expected = chosen - jax.nn.logsumexp(rest, axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(batch.record.entropy, PLAIN_ENTROPY(rest), atol=1e-5)
    assert jnp.abs(found - plain[0]).max() > 1e-3


def dpo_inputs(model, prompts, completions):
    pad = model.config.pad_token_id
    tokens, positions, mask, _ = common.process_ids(prompts, completions, pad, EOS)
    return tokens, positions, mask, completions.shape[1]


def test_dpos_log_probabilities_equal_the_plain_ones():
    model, (prompts, completions, images) = policy(), with_images()
    inputs = dpo_inputs(model, prompts, completions)
    found = common.get_per_token_logps(model, *inputs, images=images)
    expected = PLAIN_DPO_LOGPS(model, *inputs, images=images)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    by_name = dict(zip(("input_tokens", "positions", "attn_mask"), inputs[:3], strict=True))
    again = common.get_per_token_logps(
        model=model, **by_name, logits_to_keep=inputs[3], images=images
    )
    np.testing.assert_array_equal(again, found)


# ---- What is never built.


def largest_intermediate(function, state):
    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                yield variable.aval.size
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(state).jaxpr))


@pytest.mark.parametrize("what", ["logps", "gradients", "dpo", "dpo gradients"])
def test_no_array_of_batch_times_tokens_times_vocabulary_is_built(what):
    model = policy()
    tokens = draw(model.config, ["t" * 40] * 4, side="right")
    prompts, completions = tokens[:, :5], tokens[:, 5:]
    graphdef, state = nnx.split(model)
    inputs = dpo_inputs(model, prompts, completions)

    def total(plain, state):
        model = nnx.merge(graphdef, state)
        if what.startswith("dpo"):
            function = PLAIN_DPO_LOGPS if plain else common.get_per_token_logps
            return function(model, *inputs).sum()
        function = PLAIN_LOGPS if plain else common.compute_per_token_logps
        options = {"stop_gradient": False, "temperature": 0.7}
        return logps(model, prompts, completions, function=function, **options).sum()

    whole = completions.size * model.config.vocab_size
    assert whole > max(leaf.size for leaf in jax.tree.leaves(state))
    for plain in (False, True):
        function = functools.partial(total, plain)
        found = largest_intermediate(jax.grad(function) if "grad" in what else function, state)
        assert (found >= whole) == plain


# ---- Gradients, and a mesh.


@functools.cache
def eight_rows():
    config = policy().config
    prompts = draw(config, ["ttt", "tit", "iitt", "i"] * 2, side="left")
    completions = draw(config, ["ttttttt", "tttt", "ttttttttt", "tt"] * 2, side="right", seed=1)
    return prompts, completions, draw_images(config, *[[], [(2, 2)], [(2, 2)] * 2, [(2, 2)]] * 2)


def assert_gradients_agree(found, expected, tolerance):
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(np.abs(np.asarray(ours) - np.asarray(theirs)).max()) <= tolerance * largest


def weighted(found, entropy):
    """A loss that depends on every log-probability and entropy."""
    return (jnp.cos(jnp.arange(found.size).reshape(found.shape)) * (found + 0.3 * entropy)).sum()


def loss_of_actor_and_critic(models, rows):
    """A loss, with log-probabilities and scores, as a learner has it inside its own jit."""
    (model, critic), (prompts, completions, images) = models, rows
    with bind(RolloutContext(images=images, temperature=0.7)) as batch:
        found = logps(model, prompts, completions, stop_gradient=False)
        scored = scores(critic, prompts, completions, stop_gradient=False)
    return weighted(found, batch.record.entropy) + (jnp.sin(scored) ** 2).sum(), (found, scored)


def with_gradients(models, rows):
    compute = nnx.jit(nnx.value_and_grad(loss_of_actor_and_critic, has_aux=True))
    (_, found), gradients = compute(models, rows)
    return found, gradients


@functools.cache
def on_one_device():
    return with_gradients((policy(), scorer()), eight_rows())


def test_gradients_through_the_chunks_are_the_plain_ones():
    prompts, completions, images = eight_rows()
    options = {"images": images, "temperature": 0.7, "stop_gradient": False}

    def loss(model):
        found, logits = logps(
            model, prompts, completions, function=PLAIN_LOGPS, return_logits=True, **options
        )
        return weighted(found, PLAIN_ENTROPY(logits)), found

    (_, expected), gradients = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(policy())
    (found, _), (found_gradients, _) = on_one_device()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert_gradients_agree(found_gradients, gradients, 1e-5)


def test_log_probabilities_carry_no_gradient_unless_asked_for():
    model, (prompts, completions, _) = policy(), eight_rows()
    graphdef, state = nnx.split(model)

    def total(state):
        return logps(nnx.merge(graphdef, state), prompts, completions).sum()

    gradients = jax.jit(jax.grad(total))(state)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def on_mesh(fsdp, tp):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(fsdp, tp), ("fsdp", "tp"))
    return mesh, tuple(shard_model(nnx.clone(model), mesh) for model in (policy(), scorer()))


@pytest.mark.parametrize(("fsdp", "tp"), [(8, 1), (4, 2)])
def test_a_mesh_changes_neither_log_probabilities_nor_scores_nor_gradients(fsdp, tp):
    expected, expected_gradients = on_one_device()
    mesh, models = on_mesh(fsdp, tp)
    with mesh:
        rows = shard_input(eight_rows(), ("fsdp",))
        if tp == 1:
            _, found = nnx.jit(loss_of_actor_and_critic)(models, rows)
        else:
            found, gradients = with_gradients(models, rows)
            assert_gradients_agree(gradients, expected_gradients, 1e-4)
    assert not rows[0].sharding.is_fully_replicated
    assert relative(found[0], expected[0]) <= 1e-5
    assert relative(found[1], expected[1]) <= 1e-5


def test_images_in_work_are_placed_on_the_mesh():
    mesh, (model, _) = on_mesh(4, 2)
    prompts, completions, images = eight_rows()
    with mesh, bind(RolloutContext(images=np.asarray(images), temperature=0.7)) as batch:
        prompts, completions = shard_input((prompts, completions), ("fsdp",))
        found = [logps(model, prompts[i : i + 4], completions[i : i + 4]) for i in (0, 4)]
    assert relative(np.concatenate(found), on_one_device()[0][0]) <= 1e-5
    assert len(batch.record.logps.sharding.device_set) == 8


# ---- Scores with images.


def test_images_in_work_reach_the_scores():
    critic, (prompts, completions, images) = scorer(), with_images()
    pad = critic.config.pad_token_id
    tokens, positions, mask, real = common.process_ids(prompts, completions, pad, EOS)
    with bind(RolloutContext(images=np.asarray(images))):
        found = scores(critic, prompts, completions)
        rows = [scores(critic, prompts[i : i + 1], completions[i : i + 1]) for i in range(3)]
    direct = nnx.jit(lambda model: model(tokens, positions, None, mask, real, images)[0])
    assert relative(found, direct(critic)[..., 0]) <= 1e-5
    assert relative(np.concatenate(rows), found) <= 1e-4
