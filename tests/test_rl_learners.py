# SPDX-License-Identifier: Apache-2.0
"""Tunix's own learners take real steps on tiny Gemma 4 models."""

import jax
import numpy as np
import pytest
from flax import nnx
from rl_setup import STEPS, history, low_ids, make_cluster, mesh_of, mixed_batch, text_batch
from tunix.rl.agentic import agentic_grpo_learner
from tunix.rl.grpo import dapo_learner, drgrpo_learner, grpo_learner

import tunix_gemma4
from tunix_gemma4.plugin.rl.prompts import ChatParser


@pytest.fixture(scope="module", autouse=True)
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


@pytest.fixture(scope="module")
def directory(tiny_checkpoint):
    return tiny_checkpoint("demo")


def train(cluster, learner_class, config, batches):
    """Trains, and returns the state before and after, on the host."""
    kind = nnx.LoRAParam if nnx.state(cluster.actor_trainer.model, nnx.LoRAParam) else nnx.Param
    before = jax.device_get(nnx.state(cluster.actor_trainer.model, kind))
    learner = learner_class(rl_cluster=cluster, algo_config=config, reward_fns=[low_ids])
    learner.train(batches)
    return before, jax.device_get(nnx.state(cluster.actor_trainer.model, kind))


def assert_trained(cluster, before, after, *, rollouts=STEPS):
    """Enough steps, moved weights, and the metrics one expects, as finite numbers."""
    assert cluster.actor_trainer.train_steps >= STEPS
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert np.mean(jax.tree.leaves(moved)) > 0.5
    for name in ("loss", "entropy", "pg_clipfrac", "kl"):
        values = history(cluster, name)
        assert len(values) >= STEPS and np.isfinite(values).all(), name
    for prefix, name in (
        ("rewards", "score/mean"),
        ("rewards", "score/std"),
        ("completions", "mean_length"),
        ("perf", "step_time_sec"),
    ):
        logger = cluster._rl_metrics_logger
        assert len(logger.get_metric_history(prefix, name, "train")) >= rollouts, name
    assert history(cluster, "rollout_agreement/max").max() < 1e-3


def grpo(**fields):
    return grpo_learner.GRPOConfig(**{"num_generations": 4, "beta": 0.0} | fields)


def test_grpo_trains_everything_in_micro_batches(directory):
    cluster = make_cluster(directory, micro=2, mini_batch_size=4)
    batches = [mixed_batch(seed) for seed in range(STEPS)]
    before, after = train(cluster, grpo_learner.GRPOLearner, grpo(), batches)
    assert_trained(cluster, before, after)
    tower = [
        bool(np.any(a[...] != b[...]))
        for (path, a), (_, b) in zip(
            nnx.to_flat_state(before), nnx.to_flat_state(after), strict=True
        )
        if path[0] == "vision_tower"
    ]
    assert tower and np.mean(tower) > 0.9


def test_gspo_trains_adapters_that_share_the_reference_twice_a_batch(directory):
    cluster = make_cluster(directory, lora=True, reference=True)
    shared = nnx.state(cluster.inference_worker.get_model("reference"))
    backbone = nnx.state(cluster.actor_trainer.model, nnx.Not(nnx.LoRAParam))
    for ours, theirs in zip(jax.tree.leaves(backbone), jax.tree.leaves(shared), strict=True):
        assert ours is theirs
    config = grpo(beta=0.05, num_iterations=2, loss_algo="gspo-token")
    batches = [mixed_batch(seed) for seed in range(3)]
    before, after = train(cluster, grpo_learner.GRPOLearner, config, batches)
    assert_trained(cluster, before, after, rollouts=3)
    assert history(cluster, "kl")[0] == pytest.approx(0, abs=1e-4)
    assert np.abs(history(cluster, "kl")[2:]).max() > 1e-5


def test_dr_grpo_trains_on_text(directory):
    cluster = make_cluster(directory, text_only=True, reference=True)
    config = drgrpo_learner.DrGRPOConfig(num_generations=4)
    batches = [text_batch(seed) for seed in range(STEPS)]
    before, after = train(cluster, drgrpo_learner.DrGRPOLearner, config, batches)
    assert_trained(cluster, before, after)


def test_dapo_trains_adapters(directory):
    # The host asks for a reference wherever beta is not 0, and DAPO's is None.
    cluster = make_cluster(directory, lora=True, reference=True)
    buffer = {"overlong_buffer_length": 2, "overlong_buffer_penalty": 1.0}
    config = dapo_learner.DAPOConfig(
        num_generations=4, overlong_buffer=buffer | {"enable": True, "max_response_length": 4}
    )
    batches = [mixed_batch(seed) for seed in range(STEPS)]
    before, after = train(cluster, dapo_learner.DAPOLearner, config, batches)
    assert_trained(cluster, before, after)


def test_grpo_on_eight_devices_with_adapters(directory):
    mesh = mesh_of(jax.devices(), 4, 2)
    cluster = make_cluster(directory, lora=True, reference=True, mesh=mesh)
    batches = [mixed_batch(seed) for seed in range(STEPS)]
    before, after = train(cluster, grpo_learner.GRPOLearner, grpo(beta=0.05), batches)
    assert_trained(cluster, before, after)


def test_grpo_with_actor_and_rollout_on_meshes_of_their_own(directory):
    devices = jax.devices()
    actor, rollout = mesh_of(devices[:4], 4), mesh_of(devices[4:], 4)
    cluster = make_cluster(directory, mesh=actor, rollout_mesh=rollout)
    batches = [mixed_batch(seed) for seed in range(STEPS)]
    before, after = train(cluster, grpo_learner.GRPOLearner, grpo(), batches)
    assert_trained(cluster, before, after)
    used = {
        device
        for leaf in jax.tree.leaves(nnx.state(cluster.rollout.model()))
        for device in leaf.devices()
    }
    assert used == set(devices[4:])


def test_agentic_grpo_trains_on_text(directory):
    cluster = make_cluster(directory, text_only=True, return_logprobs=True, top_p=1.0)
    config = agentic_grpo_learner.GRPOConfig(
        num_generations=2, beta=0.0, max_response_length=4, max_concurrency=2
    )

    learner = agentic_grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=config,
        reward_fns=[low_ids],
        chat_parser=ChatParser(cluster.rollout.processor),
    )
    batches = [{"prompts": np.array(["one", "two"])} for _ in range(STEPS)]
    learner.train(batches)
    assert cluster.actor_trainer.train_steps >= STEPS
    assert np.isfinite(history(cluster, "loss")).all()


def test_grpo_evaluates_on_images_and_trains_on_packed_text(directory):
    """Evaluation sees images in one run; another packs its text, which needs no padding."""
    cluster = make_cluster(directory, steps=2)
    cluster.cluster_config.training_config.eval_every_n_steps = 1
    learner = grpo_learner.GRPOLearner(rl_cluster=cluster, algo_config=grpo(), reward_fns=[low_ids])
    learner.train([mixed_batch(seed) for seed in range(2)], [mixed_batch(7)])
    logger = cluster.actor_trainer.metrics_logger
    losses = logger.get_metric_history("actor", "loss", "eval")
    agreement = logger.get_metric_history("actor", "rollout_agreement/max", "eval")
    assert np.isfinite(losses).all() and 0 < np.max(agreement) < 1e-3

    packed = make_cluster(directory, text_only=True)
    packed.cluster_config.training_config.max_seq_token_per_tpu = 128
    batches = [text_batch(seed) for seed in range(STEPS)]
    before, after = train(packed, grpo_learner.GRPOLearner, grpo(num_iterations=2), batches)
    assert packed.actor_trainer.train_steps >= STEPS
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    ratios = history(packed, "pg_clipfrac")
    assert np.isfinite(history(packed, "loss")).all() and np.isfinite(ratios).all()
