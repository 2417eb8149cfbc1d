# SPDX-License-Identifier: Apache-2.0
"""Tunix's PPO learner with our critic and our reward model, and rewards that are no integers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rl_setup import STEPS, Role, draw_picture, history, mesh_of, one_device, question, text_batch
from tunix.rl import rl_cluster
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout.base_rollout import RolloutConfig

import tunix_gemma4
from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.checkpoint.check import NonFiniteError
from tunix_gemma4.data.processor import Processor
from tunix_gemma4.lora import LoraConfig, apply_lora
from tunix_gemma4.model.gemma4 import Gemma4ForTokenScores
from tunix_gemma4.plugin.rl.learner import set_processor

MAX_TOKENS = 4
LORA = LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module", autouse=True)
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


def picture_batch(seed):
    """Four prompts, every other one with a picture: without it, its scores would be NaN."""
    pictures = [draw_picture(2 * seed), draw_picture(2 * seed + 1)]
    return {
        "prompts": [question("what", 1), question("hello")] * 2,
        "image": [pictures[0], None, pictures[1], None],
        "answer": ["a", "b", "c", "d"],
    }


def make_cluster(directory, mesh, *, micro=None, critic_optimizer=None, **models):
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(Role, mesh),
        rollout_engine="vanilla",
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-3),
            critic_optimizer=critic_optimizer or optax.adamw(1e-2),
            eval_every_n_steps=1000,
            max_steps=STEPS,
            mini_batch_size=None if micro is None else 4,
            train_micro_batch_size=micro,
        ),
        rollout_config=RolloutConfig(
            max_prompt_length=192,
            max_tokens_to_generate=MAX_TOKENS,
            kv_cache_size=192 + MAX_TOKENS,
            temperature=0.8,
        ),
    )
    processor = Processor.from_pretrained(directory, max_soft_tokens=70)
    cluster = rl_cluster.RLCluster(tokenizer=processor.tokenizer, cluster_config=config, **models)
    set_processor(cluster, processor)
    return cluster


def logged(cluster, name):
    """What the host logged of each step under `name`, whose first word is the prefix."""
    logger = cluster.actor_trainer.metrics_logger
    return np.array(logger.get_metric_history(*name.split("/", 1), "train"))


def weights_of(model, kind=nnx.Param):
    return jax.device_get(nnx.state(model, kind))


def moved(before, after):
    return np.mean(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), before, after)))


def assert_ppo_metrics(cluster):
    assert cluster.actor_trainer.train_steps == cluster.critic_trainer.train_steps == STEPS
    for prefix, names in {
        "actor": ("loss", "pg_clipfrac", "rollout_agreement/max"),
        "critic": ("loss", "vpred_mean", "vf_clipfrac"),
    }.items():
        for name in names:
            values = history(cluster, name, prefix)
            assert len(values) == STEPS and np.isfinite(values).all(), name
    assert history(cluster, "rollout_agreement/max").max() < 1e-3
    for name in ("rewards/score/mean", "advantages/mean", "generation/completions/mean_length"):
        assert len(logged(cluster, name)) >= STEPS - 1, name


def test_a_fractional_reward_arrives_whole_in_returns_and_values(tiny_checkpoint, monkeypatch):
    zeros = []
    original = ppo_learner.jnp.zeros_like

    def zeros_like(array, *args, **kwargs):
        zeros.append((array.shape, array.dtype, args, kwargs))
        return original(array, *args, **kwargs)

    monkeypatch.setattr(ppo_learner.jnp, "zeros_like", zeros_like)
    directory, mesh = tiny_checkpoint("demo"), one_device()
    actor = load_checkpoint(directory, mesh, text_only=False)
    critic = Gemma4ForTokenScores.from_policy(actor)
    cluster = make_cluster(directory, mesh, micro=2, actor=actor, critic=critic)
    models = cluster.actor_trainer.model, cluster.critic_trainer.model
    before = [weights_of(model) for model in models]
    config = ppo_learner.PPOConfig(beta=0.0, gae_lambda=1.0)

    def reward(prompts, completions, **columns):
        return [0.3 if answer < "c" else 0.7 for answer in columns["answer"]]

    seen, update = [], cluster.update_actor

    def update_actor(train_ds, *rest):
        seen.extend(train_ds)
        update(train_ds, *rest)

    cluster.update_actor = update_actor
    learner = ppo_learner.PPOLearner(cluster, config, [reward])
    learner.train([picture_batch(seed) for seed in range(STEPS)])
    assert_ppo_metrics(cluster)
    # White over both micro-batches of a step, and so not in the one whose rewards are lower.
    kept = [np.asarray(e.advantages)[np.asarray(e.completion_mask)] for e in seen]
    for low, high in zip(kept[::2], kept[1::2], strict=True):
        whole = np.concatenate([low, high])
        np.testing.assert_allclose([whole.mean(), whole.std(ddof=1)], [0, 1], atol=1e-3)
    assert kept[0].mean() < -0.5 < 0.5 < kept[1].mean()
    # A completion has the one reward or the other: returns are 0.3 or 0.7.
    for name in ("rewards/score", "rewards/reward", "advantages/returns"):
        np.testing.assert_allclose(logged(cluster, f"{name}/min"), 0.3, rtol=1e-6)
        np.testing.assert_allclose(logged(cluster, f"{name}/max"), 0.7, rtol=1e-6)
    np.testing.assert_allclose(logged(cluster, "rewards/reward/mean"), 0.5, rtol=1e-6)
    # A new critic expects nothing; then its values are those of the trained one, which swing
    # about the mean reward of 0.5 at this learning rate.
    values = logged(cluster, "advantages/old_values/mean")
    assert values[0] == 0 and (values[1:] > 0.05).all() and (values[1:] < 1).all()
    for old, model in zip(before, models, strict=True):
        assert moved(old, weights_of(model)) > 0.9
    # All that the learner asks of `zeros_like`; any new use of the host's has to be looked at.
    ids = ((4, MAX_TOKENS), jnp.dtype("int32"), (), {})
    assert zeros == [ids] * STEPS


def test_a_reward_model_scores_and_a_critic_shares_the_actors_backbone(tiny_checkpoint):
    directory, mesh = tiny_checkpoint("demo"), mesh_of(jax.devices(), fsdp=4, tp=2)
    base = load_checkpoint(directory, mesh)
    actor = apply_lora(base, LORA)
    critic = apply_lora(Gemma4ForTokenScores.from_policy(base, share_arrays=True), LORA)
    reward = Gemma4ForTokenScores.from_policy(base, share_arrays=True)
    kernel = reward.score.kernel
    head = 0.05 * np.sin(np.arange(kernel.size, dtype=np.float32))[:, None]
    kernel[...] = jax.device_put(head, kernel[...].sharding)
    models = {"actor": actor, "reference": base, "critic": critic, "reward": reward}
    cluster = make_cluster(directory, mesh, **models)
    frozen = weights_of(base)
    before = [weights_of(model, nnx.LoRAParam) for model in (actor, critic)]
    seen = []

    def scores(prompts, completions, advantages, rewards, **columns):
        seen.append((np.asarray(advantages), np.asarray(rewards)))
        return {}

    config = ppo_learner.PPOConfig(beta=0.1)
    learner = ppo_learner.PPOLearner(cluster, config, metric_fns=[scores])
    learner.train([text_batch(seed) for seed in range(STEPS)])
    assert_ppo_metrics(cluster)
    given = np.stack([rewards for _, rewards in seen])
    assert given.shape == (STEPS, 4) and np.ptp(given) > 0.01
    assert (np.abs(given - np.round(given)) > 1e-4).all()
    np.testing.assert_allclose(logged(cluster, "rewards/score/mean"), given.mean(1), rtol=1e-5)
    # The policy has not left the reference yet, so nothing is taken off the score.
    assert logged(cluster, "rewards/reward_kl_penalty")[0] < 1e-6
    np.testing.assert_allclose(
        logged(cluster, "rewards/reward/mean")[0], given[0].mean(), rtol=1e-4, atol=1e-6
    )
    for old, model in zip(before, (actor, critic), strict=True):
        assert moved(old, weights_of(model, nnx.LoRAParam)) > 0.9
    assert moved(frozen, weights_of(base)) == 0


def test_two_optimizer_steps_share_a_rollout(tiny_checkpoint):
    directory, mesh = tiny_checkpoint("demo"), one_device()
    base = load_checkpoint(directory, mesh)
    actor = apply_lora(base, LORA)
    critic = apply_lora(Gemma4ForTokenScores.from_policy(base, share_arrays=True), LORA)
    cluster = make_cluster(directory, mesh, actor=actor, critic=critic)
    seen = []

    def reward(prompts, completions, **columns):
        seen.append(completions)
        return [len(message["content"]) / 7 for (message,) in completions]

    config = ppo_learner.PPOConfig(beta=0.0, num_iterations=2)
    ppo_learner.PPOLearner(cluster, config, [reward]).train([text_batch(0), text_batch(1)])
    assert len(seen) == 2
    assert cluster.actor_trainer.train_steps == cluster.critic_trainer.train_steps == 4
    # That of the first update on each; the second is of a policy that has moved.
    assert len(history(cluster, "rollout_agreement/max")) == 2
    assert history(cluster, "rollout_agreement/max").max() < 1e-3
    for kind in ("actor", "critic"):
        losses = history(cluster, "loss", kind)
        assert np.isfinite(losses).all() and losses[0] != losses[1]


@pytest.mark.slow
def test_a_critic_that_is_no_longer_finite_ends_the_run(tiny_checkpoint):
    directory, mesh = tiny_checkpoint("demo"), one_device()
    actor = load_checkpoint(directory, mesh)
    critic = Gemma4ForTokenScores.from_policy(actor)
    spoilt = optax.chain(optax.sgd(1.0), optax.scale(1e30))
    cluster = make_cluster(directory, mesh, critic_optimizer=spoilt, actor=actor, critic=critic)
    learner = ppo_learner.PPOLearner(
        cluster, ppo_learner.PPOConfig(beta=0.0), [lambda prompts, completions, **_: [1.0] * 4]
    )
    with pytest.raises(NonFiniteError, match="^step [12]: .* is not finite"):
        learner.train([text_batch(seed) for seed in range(STEPS)])


def test_other_names_of_the_learners_numpy_are_the_modules_own():
    assert ppo_learner.jnp.concatenate is jnp.concatenate
    ids = jnp.ones((2, 3), jnp.int32)
    assert ppo_learner.jnp.zeros_like(ids).dtype == jnp.float32
    assert ppo_learner.jnp.zeros_like(ids, jnp.int8).dtype == jnp.int8
    assert ppo_learner.jnp.zeros_like(ids, dtype=bool).dtype == bool
    half = ppo_learner.jnp.zeros_like(ids.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16 and half.shape == (2, 3)
    tunix_gemma4.unregister()
    assert ppo_learner.jnp is jnp
    tunix_gemma4.register()
