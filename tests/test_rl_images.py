# SPDX-License-Identifier: Apache-2.0
"""Images reach rollout, log-probabilities and loss, row by row, however a batch is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rl_setup import draw_picture, low_ids, make_cluster, mixed_batch, question
from tunix.rl import common
from tunix.rl.grpo import grpo_learner
from tunix.rl.queue.data_queue import SimpleDataQueue
from tunix.rl.rl_cluster import Mode

import tunix_gemma4
from tunix_gemma4 import sampling
from tunix_gemma4.plugin.rl import learner as hooks, logps, losses
from tunix_gemma4.plugin.rl.context import RolloutContext, bind

GENERATIONS = 2


@pytest.fixture(scope="module", autouse=True)
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


@pytest.fixture(scope="module")
def directory(tiny_checkpoint):
    return tiny_checkpoint("demo")


@pytest.fixture(scope="module")
def cluster(directory):
    """Shared; nothing here trains it."""
    return make_cluster(directory)


def make_learner(cluster, reward_fn=low_ids, **fields):
    config = grpo_learner.GRPOConfig(num_generations=GENERATIONS, **{"beta": 0.0} | fields)
    reward_fns = reward_fn if isinstance(reward_fn, list) else [reward_fn]
    return grpo_learner.GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=reward_fns)


def examples_of(learner, batches, *, micro):
    """What the host's own pipeline makes of `batches`, up to the trainer."""
    read = iter(
        hooks.Read(
            batches,
            hooks.reader_of(learner.rl_cluster, learner.rl_cluster.rollout, Mode.TRAIN).read,
        )
    )
    if micro < 4:
        read = learner._create_micro_batch_iterator(read, micro)
    learner._rollout_micro_batch_size = learner._compute_logps_micro_batch_size = micro
    queue = SimpleDataQueue(maxsize=0)
    learner._prepare_data(
        iterator=read,
        proceed_num_steps=-1,
        sample_repeat=GENERATIONS,
        batch_repeat=1,
        service_target_batch_size=micro,
        data_queue=queue,
    )
    return [example for item in iter(queue.get, None) for example in item]


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_each_row_keeps_its_images_and_agrees_with_the_sampler(cluster, micro):
    """With old log-probabilities, which go through the micro-batches of their own pass."""
    batch = mixed_batch(3)
    learner = make_learner(cluster, num_iterations=2)
    examples = examples_of(learner, [batch], micro=micro)
    assert len(examples) == 4 // micro
    processor = cluster.rollout.processor
    pictures = [
        [image] if not isinstance(image, list | None) else image or [] for image in batch["images"]
    ]
    rows = [
        (p, i) for p, i in zip(batch["prompts"], pictures, strict=True) for _ in range(GENERATIONS)
    ]
    found = jnp.concatenate([example.images for example in examples])
    tokens = jnp.concatenate([example.prompt_ids for example in examples])
    for row, (prompt, images) in enumerate(rows):
        given = {"messages": prompt, "images": images} if images else prompt
        expected = processor.encode(given, add_generation_prompt=True)
        assert int((tokens[row] == processor.image_token_id).sum()) == int(
            (expected.tokens == processor.image_token_id).sum()
        )
        if images:
            np.testing.assert_array_equal(found[row, : len(images)], expected.images)
        assert (found[row, len(images) :, :, -1] == -1).all()
    for example in examples:
        difference = jnp.abs(example.old_per_token_logps - example.rollout_logps)
        assert jnp.where(example.completion_mask, difference, 0).max() < 1e-3


def agreement(cluster, example):
    """The metrics of a loss that only computes log-probabilities."""

    def loss(model, train_example):
        common.compute_per_token_logps(
            *nnx.split(model),
            prompt_tokens=train_example.prompt_ids,
            completion_tokens=train_example.completion_ids,
            pad_id=0,
            eos_id=1,
            stop_gradient=False,
            return_logits=True,
        )
        return 0.0, {}

    model = cluster.actor_trainer.model
    return jax.device_get(losses.with_images(loss)(model, example)[1])


@pytest.fixture(scope="module")
def example(cluster):
    (example,) = examples_of(make_learner(cluster), [mixed_batch(1)], micro=4)
    return example


def test_sampler_and_trainer_agree(cluster, example):
    found = agreement(cluster, example)
    assert 0 < found["rollout_agreement/mean"] <= found["rollout_agreement/max"] < 1e-3
    assert 0 < found["entropy"] < np.log(cluster.actor_trainer.model.num_embed)


def test_agreement_notices_a_mask_that_shows_padding(cluster, example, monkeypatch):
    def careless(*args, **kwargs):
        ids, positions, mask, segments = process_ids(*args, **kwargs)
        return ids, positions, jnp.tril(jnp.ones_like(mask)), jnp.ones_like(segments)

    process_ids = common.process_ids
    monkeypatch.setattr(common, "process_ids", careless)
    logps.chunked_logps.clear_cache()
    found = agreement(cluster, example.replace(group=1))  # Shared prompts have a mask of their own.
    logps.chunked_logps.clear_cache()
    assert found["rollout_agreement/mean"] > 1e-2


def test_agreement_notices_other_pictures(cluster, example):
    images = np.array(example.images)
    images[..., :-2] = np.random.default_rng(0).random(images[..., :-2].shape)
    found = agreement(cluster, example.replace(images=images))
    assert found["rollout_agreement/mean"] > 1e-2


def test_new_image_sizes_compile_nothing(cluster):
    learner = make_learner(cluster, num_iterations=2)
    examples_of(learner, [mixed_batch(0)], micro=4)
    sizes = sampling._generate._cache_size(), logps.chunked_logps._cache_size()
    examples_of(
        make_learner(cluster, num_iterations=2), [mixed_batch(s) for s in (1, 2, 4)], micro=4
    )
    assert (sampling._generate._cache_size(), logps.chunked_logps._cache_size()) == sizes


def test_completions_end_with_the_stop_token_and_so_does_their_mask(cluster):
    rollout = cluster.rollout
    config = cluster.get_rollout_config(Mode.TRAIN)
    assert rollout.stop_ids(config) == rollout.processor.stop_ids
    assert len(rollout.processor.stop_ids) > 1
    stops = list(range(5, 200))
    config.eos_tokens, before = stops, config.eos_tokens
    (example,) = examples_of(make_learner(cluster), [mixed_batch(1)], micro=4)
    config.eos_tokens = before
    ids, mask = np.asarray(example.completion_ids), np.asarray(example.completion_mask)
    # As PPO finds the end of a completion.
    last = np.asarray(jnp.max(common.build_positions_from_mask(jnp.asarray(mask)), axis=-1))
    stopped = 0
    for row in range(len(ids)):
        assert mask[row].sum() == last[row] + 1
        ends = np.flatnonzero(np.isin(ids[row], stops))
        if len(ends):
            assert ends[0] == last[row]
            stopped += 1
    assert stopped > 4


def test_no_media_and_no_padding_is_sampled(cluster):
    (example,) = examples_of(make_learner(cluster), [mixed_batch(2)], micro=4)
    ids, mask = np.asarray(example.completion_ids), np.asarray(example.completion_mask)
    assert not np.isin(ids[mask.astype(bool)], cluster.rollout.suppressed).any()
    config = cluster.actor_trainer.model.config
    assert {config.image_token_id, config.pad_token_id} <= set(cluster.rollout.suppressed)


def test_steps_draw_differently_and_a_restart_the_same(cluster):
    prompts, config = ["one two"], cluster.get_rollout_config(Mode.TRAIN)

    def draw(step):
        cluster.rollout.begin(step)
        return [cluster.rollout.generate(prompts, config).tokens[0].tolist() for _ in range(2)]

    first, second = draw(1)
    assert first != second
    assert draw(2) != [first, second]
    assert draw(1) == [first, second]


def test_reward_functions_see_prompts_and_images_as_they_were_given(cluster):
    seen = {}

    def reward(prompts, completions, images, answer):
        seen.update(prompts=prompts, images=images, answer=answer)
        return [0.0, 1.0] * 4

    batch = mixed_batch(5)
    examples_of(make_learner(cluster, reward), [batch], micro=4)
    assert seen["prompts"] == [p for p in batch["prompts"] for _ in range(GENERATIONS)]
    assert seen["answer"] == [a for a in batch["answer"] for _ in range(GENERATIONS)]
    assert seen["images"][0] is batch["images"][0]


def test_reward_functions_may_abstain_and_ask_for_more_than_columns(cluster):
    """Two functions; both abstain on the third completion, one of a group of two."""
    seen = []

    async def judge(completion_ids, trainer_state, log_metric):
        assert all(isinstance(ids, list) and ids for ids in completion_ids)
        seen.append(trainer_state)
        log_metric("judge/seen", float(len(completion_ids)))
        return [0.0, 1.0, None, 1.0, 0.0, 1.0, 1.0, 0.0]

    def silent(prompts, completions, log_extra):
        log_extra("letters", [len(message["content"]) for (message,) in completions])
        return [None] * 8

    examples = examples_of(make_learner(cluster, [judge, silent]), [mixed_batch(5)], micro=4)
    advantages = np.concatenate([np.asarray(example.advantages) for example in examples])
    assert advantages[2] == advantages[3] == 0
    assert np.all(advantages[[1, 5, 6]] > 0.7) and np.all(advantages[[0, 4, 7]] < -0.7)
    assert seen[0].max_steps == cluster.actor_trainer.config.max_steps


def test_packing_with_images_is_refused(directory):
    cluster = make_cluster(directory)
    cluster.cluster_config.training_config.max_seq_token_per_tpu = 512
    with pytest.raises(ValueError, match="max_seq_token_per_tpu.*drops images"):
        make_learner(cluster).train([mixed_batch(0)])


def test_a_rollout_engine_that_would_drop_images_is_refused(cluster, monkeypatch):
    class Elsewhere:
        def pad_id(self):
            return 0

    learner = make_learner(cluster)
    monkeypatch.setattr(cluster, "_rollout", Elsewhere())
    with pytest.raises(ValueError, match="'images': Elsewhere would drop the images"):
        learner.train([mixed_batch(0)])
    with pytest.raises(ValueError, match="Elsewhere.*made after"):
        hooks.set_processor(cluster, None)


def test_a_pass_that_stops_within_the_batch_or_a_prompt_is_noticed():
    work = RolloutContext(images=np.zeros((4, 1, 1, 1)), image_repeats=2)
    with bind(work):
        assert work.next_images(6).shape[0] == 3
        with pytest.raises(RuntimeError, match="4 rows were asked for after 6 of 8, 2 for each"):
            work.next_images(4)
        with pytest.raises(RuntimeError, match="1 rows were asked for after 6 of 8"):
            work.next_images(1)
        assert work.next_images(2).shape[0] == 1
        assert work.next_images(8).shape[0] == 4


def test_a_prompt_too_long_for_the_rollout_names_the_numbers(cluster):
    long = {"prompts": [question("x " * 300)], "images": [draw_picture(0)]}
    with pytest.raises(ValueError, match="prompt 0: it has .* max_prompt_length is 192"):
        make_learner(cluster).train([long])
