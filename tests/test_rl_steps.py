# SPDX-License-Identifier: Apache-2.0
"""A rollout step is one algorithm, however it is cut and wherever it is sampled."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from rl_setup import history, low_ids, make_cluster, mesh_of, text_batch

import tunix_gemma4
from tunix_gemma4.checkpoint.check import NonFiniteError
from tunix_gemma4.plugin.rl.cluster import make_algorithm
from tunix_gemma4.settings.grpo import GrpoRunConfig

GENERATIONS, STEPS = 2, 4


@pytest.fixture(scope="module", autouse=True)
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


# Adam would make steps of a whole learning rate out of rounding.
SGD = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))


def train(directory, loss_type, *, micro, apart, optimizer=SGD):
    """Two rollouts of four prompts, each with two optimizer steps; returns what it saw.

    Args:
        micro: prompts of a micro-batch of training and of sampling.
        apart: whether sampling has a mesh of its own.
        optimizer: of the policy.
    """
    devices = jax.devices()
    cluster = make_cluster(
        directory,
        text_only=True,
        mesh=mesh_of(devices[:1]),
        rollout_mesh=mesh_of(devices[1:2]) if apart else None,
        micro=micro,
        mini_batch_size=2,
        steps=STEPS,
        max_prompt_length=32,
        max_tokens=6,
        optimizer=optimizer,
    )
    asked, examples, update = [], [], cluster.update_actor

    def reward(prompts, completions, **columns):
        asked.append(len(completions))
        return low_ids(prompts, completions)

    def update_actor(train_ds, *rest):
        examples.extend(train_ds)
        return update(train_ds, *rest)

    cluster.update_actor = update_actor
    settings = GrpoRunConfig(loss_type=loss_type, num_generations=GENERATIONS)
    learner, algorithm = make_algorithm(settings)
    learner = learner(rl_cluster=cluster, algo_config=algorithm, reward_fns=[reward])
    learner.train([text_batch(0), text_batch(1)], [text_batch(7)])
    assert cluster.actor_trainer.train_steps == STEPS
    return cluster, asked, examples


METRICS = ("loss", "entropy", "pg_clipfrac", "grad_norm", "rollout_agreement/mean")


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_same_settings_are_one_algorithm_on_one_mesh_and_on_two(tiny_checkpoint, loss_type):
    directory = tiny_checkpoint("demo")
    whole, asked, examples = train(directory, loss_type, micro=2, apart=False)
    pieces, _, more = train(directory, loss_type, micro=1, apart=True)
    # All prompts of a batch are sampled at once; the first four completions are an evaluation's.
    assert sorted(asked) == [8, 8, 8, 8] and len(examples) == STEPS and len(more) == 2 * STEPS
    for name in METRICS:
        found, expected = history(pieces, name), history(whole, name)
        updates = STEPS // 2 if name.startswith("rollout_agreement") else STEPS
        assert len(expected) == updates, name
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5, err_msg=name)
    # The second update on a rollout is off-policy: its ratios are not 1.
    assert max(history(whole, "pg_clipfrac")[[0, 2]]) == 0 < max(history(whole, "pg_clipfrac"))
    assert history(whole, "rollout_agreement/max").max() < 1e-3
    for example in examples + more:
        np.testing.assert_array_equal(example.old_per_token_logps, example.rollout_logps)
    tokens = [np.concatenate([e.completion_ids for e in seen]) for seen in (examples, more)]
    np.testing.assert_array_equal(*tokens)
    # What is trained in the end is the same policy, and it is evaluated in the end.
    states = [nnx.state(cluster.actor_trainer.model, nnx.Param) for cluster in (whole, pieces)]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for cluster in (whole, pieces):
        logger = cluster.actor_trainer.metrics_logger
        for prefix, name in (("rewards", "score/mean"), ("actor", "loss")):
            assert len(logger.get_metric_history(prefix, name, "eval")) == 2, name
        cut = logger.get_metric_history("completions", "truncated", "train")
        assert len(cut) == 2
    ends = np.concatenate([np.asarray(e.completion_mask)[:, -1] for e in examples])
    stops = whole.rollout.processor.stop_ids
    last = np.concatenate([np.asarray(e.completion_ids)[:, -1] for e in examples])
    shares = (ends & ~np.isin(last, stops)).reshape(2, -1).mean(1)
    logged = whole.actor_trainer.metrics_logger.get_metric_history(
        "completions", "truncated", "train"
    )
    np.testing.assert_allclose(logged, shares)


@pytest.mark.slow
def test_a_policy_that_is_no_longer_finite_ends_the_run(tiny_checkpoint):
    # One step of 1e30 is finite still; what comes of it is not.
    spoilt = optax.chain(SGD, optax.scale(1e30))
    with pytest.raises(NonFiniteError, match="^step 2: .* is not finite"):
        train(tiny_checkpoint("demo"), "grpo", micro=2, apart=False, optimizer=spoilt)
