# SPDX-License-Identifier: Apache-2.0
"""Meshes of learners: where the host puts models and optimizers, and under which context."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from rl_setup import low_ids, make_cluster, mesh_of, text_batch
from tunix.rl import common, rl_cluster
from tunix.rl.grpo import grpo_learner

import tunix_gemma4
from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.sharding import param_shardings


@pytest.fixture(scope="module", autouse=True)
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


def assert_placed(node, kind, mesh) -> None:
    """Every array of `kind` lies where the model's own rules say."""
    state = nnx.state(node, kind)
    wanted = jax.tree.leaves(param_shardings(state, mesh))
    found = [leaf.sharding for leaf in jax.tree.leaves(state)]
    assert found and all(
        a.is_equivalent_to(b, leaf.ndim)
        for a, b, leaf in zip(found, wanted, jax.tree.leaves(state), strict=True)
    )


def test_grpo_under_jax_set_mesh_trains_as_without_it(tiny_checkpoint):
    # The mesh has no axis tp, which the parameters name.
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    results = []
    for context in (mesh, jax.set_mesh(mesh)):
        with context:
            cluster = make_cluster(tiny_checkpoint("demo"), mesh=mesh, steps=1, text_only=True)
            learner = grpo_learner.GRPOLearner(
                rl_cluster=cluster,
                algo_config=grpo_learner.GRPOConfig(num_generations=2, beta=0.0),
                reward_fns=[low_ids],
            )
            learner.train([text_batch()])
        assert_placed(cluster.actor_trainer.optimizer, nnx.optimizer.OptState, mesh)
        results.append(jax.device_get(nnx.state(cluster.actor_trainer.model, nnx.Param)))
    for expected, found in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.fixture
def unplaced(tiny_checkpoint):
    """Makes a cluster of a model that is on no mesh."""

    def make(monkeypatch, mesh, **options):
        load = lambda directory, mesh, text_only: load_checkpoint(directory, None, text_only)  # noqa: E731
        monkeypatch.setattr("rl_setup.load_checkpoint", load)
        return make_cluster(tiny_checkpoint("e2b"), mesh=mesh, **options)

    return make


def test_the_cluster_places_models_by_the_rules_of_the_model(unplaced, monkeypatch):
    mesh = mesh_of(jax.devices()[:8], 2, 4)
    cluster = unplaced(monkeypatch, mesh)
    model = cluster.actor_trainer.model
    attention = model.language_model.layers[0].self_attn
    # One key/value head: four parts would cut it, so the other side is split.
    assert attention.k_proj.kernel[...].sharding.spec == PartitionSpec(("fsdp", "tp"))
    assert attention.q_proj.kernel[...].sharding.spec == PartitionSpec("fsdp", "tp")
    assert_placed(model, nnx.Param, mesh)


def test_the_cluster_refuses_query_heads_that_the_mesh_would_cut(unplaced, monkeypatch):
    with pytest.raises(ValueError, match="sizes of tp that work: 1, 2, 4"):
        unplaced(monkeypatch, mesh_of(jax.devices()[:8], 1, 8))


def test_another_mesh_of_jax_set_mesh_is_refused_by_name(tiny_checkpoint):
    around, mesh = mesh_of(jax.devices()[:8], 4, 2), mesh_of(jax.devices()[:2], 2)
    directory = tiny_checkpoint("e2b")
    model = load_checkpoint(directory, mesh)
    roles = dict.fromkeys((rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT), mesh)
    config = rl_cluster.ClusterConfig(
        role_to_mesh=roles, rollout_config=None, training_config=None, rollout_engine="vanilla"
    )
    with jax.set_mesh(around), pytest.raises(ValueError, match="jax.set_mesh.*role 'actor' is on"):
        rl_cluster.RLCluster(actor=model, tokenizer=None, cluster_config=config)


def test_a_plain_reference_of_a_quantised_policy_is_a_model_of_its_own(tiny_checkpoint, caplog):
    directory = tiny_checkpoint("demo")
    with caplog.at_level("WARNING", logger="absl"):
        cluster = make_cluster(directory, lora="nf4", reference=True, text_only=True)
    assert "lora.reference_model(policy)" in caplog.text
    prompts, completions = jnp.arange(20, 36).reshape(2, 8), jnp.arange(40, 48).reshape(2, 4)
    found = cluster.get_ref_per_token_logps(prompts, completions, pad_id=0, eos_id=1)
    base = load_checkpoint(directory, None)
    expected = common.compute_per_token_logps(
        *nnx.split(base), prompts, completions, pad_id=0, eos_id=1, temperature=0.8
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # The policy's own base says something else.
    policy = cluster.actor_trainer.model
    quantised = common.compute_per_token_logps(
        *nnx.split(policy), prompts, completions, pad_id=0, eos_id=1, temperature=0.8
    )
    assert np.abs(found - quantised).max() > 1e-4
