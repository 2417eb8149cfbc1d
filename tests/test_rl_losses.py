# SPDX-License-Identifier: Apache-2.0
"""Losses of reinforcement learning and of preferences against their published formulas, in numpy.

The "model" is a table of log-probabilities, so a gradient is that of the formula by finite
differences in float64. Nothing here imports what it tests against.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import random_model
from tunix.rl import algo_core, common, function_registry, rl_cluster
from tunix.rl.grpo.grpo_learner import TrainExample
from tunix.rl.ppo import ppo_learner
from tunix.sft.dpo import dpo_trainer

import tunix_gemma4
from tunix_gemma4.model.gemma4 import Gemma4Model
from tunix_gemma4.plugin.rl import losses as hooks, preferences
from tunix_gemma4.plugin.rl.cluster import make_algorithm
from tunix_gemma4.plugin.rl.context import RolloutContext, bind
from tunix_gemma4.settings.grpo import KL_ESTIMATORS, GrpoRunConfig

ROWS, LENGTH, GROUP = 4, 5, 2
LENGTHS = np.array([5, 2, 1, 4])
MASK = np.arange(LENGTH) < LENGTHS[:, None]
REWARDS = np.array([1.0, 0.25, 0.0, 0.5])


def draw(seed, low=-3.0):
    return np.random.default_rng(seed).uniform(low, -0.05, (ROWS, LENGTH))


OLD, REFERENCE = draw(1), draw(2)
# Near the old policy in some places, and beyond the clip on either side in others.
LOGPS = OLD + np.random.default_rng(3).choice([-0.5, -0.05, 0.0, 0.03, 0.6], (ROWS, LENGTH))


class Table(Gemma4Model):
    """A model whose log-probabilities are its parameters."""

    def __init__(self, logps):
        self.logps = nnx.Param(jnp.asarray(logps, jnp.float32))


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    tunix_gemma4.register()
    table = lambda model: model.logps[...]  # noqa: E731

    def logps_and_entropy(graphdef, state, completion_tokens, **options):
        # An example's tokens are the number of its row.
        logps = table(nnx.merge(graphdef, state))[completion_tokens[:, 0]]
        return logps, 1 + jnp.abs(logps)

    def scores(model, prompt_ids, completion_ids, *rest, **options):
        return jnp.pad(table(model)[completion_ids[:, 0]], ((0, 0), (0, 1)))

    monkeypatch.setattr(common, "compute_per_token_logps", logps_and_entropy)
    monkeypatch.setattr(common, "compute_score", scores)
    monkeypatch.setattr(common, "get_per_token_logps", lambda model, **options: table(model))
    yield
    monkeypatch.undo()
    tunix_gemma4.unregister()


def slopes(formula, at, step=1e-6):
    """The gradient of a formula, by central differences."""
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        found[index] = (formula(at + shift) - formula(at - shift)) / (2 * step)
    return found


def assert_is(loss, formula, at):
    """`loss(model)` has the value and the gradient of `formula(log-probabilities)`."""
    value, gradient = nnx.value_and_grad(loss)(Table(at))
    np.testing.assert_allclose(value, formula(at), rtol=1e-5, atol=1e-6)
    expected = slopes(formula, at)
    found = np.asarray(gradient["logps"][...])
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6)
    assert np.abs(found).max() > 1e-3


def example(advantages, *, old=OLD, reference=REFERENCE, kind=TrainExample, **more):
    zeros = jnp.zeros((ROWS, LENGTH), jnp.int32)
    array = lambda x: None if x is None else jnp.asarray(x, jnp.float32)  # noqa: E731
    return hooks.extended(kind)(
        prompt_ids=zeros,
        prompt_mask=zeros,
        completion_ids=zeros + jnp.arange(ROWS)[:, None],
        completion_mask=jnp.asarray(MASK),
        advantages=array(advantages),
        ref_per_token_logps=array(reference),
        old_per_token_logps=array(old),
        rollout_logps=array(OLD),
        **{name: array(value) for name, value in more.items()},
    )


def over_micro_batches(loss, algorithm, batch, size):
    """The mean over micro-batches, as the host's optimizer takes it of their gradients."""
    rows = lambda first: jax.tree.map(lambda x: x[first : first + size], batch)  # noqa: E731
    parts = [rows(first) for first in range(0, ROWS, size)]
    learner = types.SimpleNamespace(algo_config=algorithm)
    parts = hooks.share_step(learner, parts)
    return lambda model: sum(loss(algorithm, part)(model) for part in parts) / len(parts)


def grpo_loss(algorithm, batch):
    if hasattr(algorithm, "loss_agg_mode"):
        algorithm.temperature = 1.0
    loss = hooks.with_images(function_registry.get_policy_loss_fn(algorithm.policy_loss_fn))
    return lambda model: loss(model, batch, algo_config=algorithm, pad_id=0, eos_id=1)[0]


def normalised(rewards):
    groups = rewards.reshape(-1, GROUP)
    centred = groups - groups.mean(1, keepdims=True)
    return (centred / (groups.std(1, ddof=1, keepdims=True) + 1e-6)).ravel()


def centred(rewards):
    groups = rewards.reshape(-1, GROUP)
    return (groups - groups.mean(1, keepdims=True)).ravel()


def clipped(ratio, advantages, low=0.2, high=0.2):
    return -np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)


def mean_of_means(tokens):
    return ((tokens * MASK).sum(1) / LENGTHS).mean()


KL = {
    "k1": lambda logps: logps - REFERENCE,
    "k2": lambda logps: (logps - REFERENCE) ** 2 / 2,
    "k3": lambda logps: np.exp(REFERENCE - logps) - (REFERENCE - logps) - 1,
}


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_grpo_with_each_estimator_of_the_kl_penalty(estimator):
    advantages = normalised(REWARDS)

    def formula(logps):
        tokens = clipped(np.exp(logps - OLD), advantages[:, None])
        return mean_of_means(tokens + 0.3 * KL[estimator](logps))

    settings = GrpoRunConfig(
        loss_type="grpo", num_generations=GROUP, beta=0.3, kl_estimator=estimator
    )
    _, algorithm = make_algorithm(settings)
    estimate = function_registry.get_advantage_estimator(algorithm.advantage_estimator)
    found = estimate(rewards=REWARDS, num_generations=GROUP)
    np.testing.assert_allclose(found, advantages, rtol=1e-6)
    assert_is(grpo_loss(algorithm, example(advantages)), formula, LOGPS)


def test_the_penalty_pulls_towards_the_reference_unless_told_otherwise():
    """k3 by default: its gradient is 0 at the reference alone, and k1's is 1 everywhere."""
    _, algorithm = make_algorithm(GrpoRunConfig(loss_type="grpo", num_generations=GROUP, beta=1.0))
    loss = grpo_loss(algorithm, example(np.zeros(ROWS), old=None))
    pulls = nnx.grad(loss)(Table(LOGPS))["logps"][...]
    np.testing.assert_array_equal(np.sign(pulls)[MASK], np.sign(LOGPS - REFERENCE)[MASK])
    np.testing.assert_allclose(nnx.grad(loss)(Table(REFERENCE))["logps"][...], 0, atol=1e-6)


def test_gspo_has_one_ratio_for_each_sequence():
    advantages = normalised(REWARDS)

    def formula(logps):
        ratio = np.exp(((logps - OLD) * MASK).sum(1) / LENGTHS)
        penalty = mean_of_means(KL["k3"](logps))
        return clipped(ratio, advantages, 0.1, 0.15).mean() + 0.05 * penalty

    settings = GrpoRunConfig(
        loss_type="gspo", num_generations=GROUP, beta=0.05, epsilon=0.1, epsilon_high=0.15
    )
    _, algorithm = make_algorithm(settings)
    assert_is(grpo_loss(algorithm, example(advantages)), formula, LOGPS)


def test_dr_grpo_sums_over_a_fixed_length_and_keeps_the_scale_of_rewards():
    advantages = centred(REWARDS)

    def formula(logps):
        tokens = clipped(np.exp(logps - OLD), advantages[:, None])
        return ((tokens + 0.1 * KL["k3"](logps)) * MASK).sum() / (ROWS * LENGTH)

    settings = GrpoRunConfig(loss_type="dr_grpo", num_generations=GROUP, beta=0.1)
    _, algorithm = make_algorithm(settings)
    estimate = function_registry.get_advantage_estimator(algorithm.advantage_estimator)
    np.testing.assert_allclose(estimate(rewards=REWARDS, num_generations=GROUP), advantages)
    assert_is(grpo_loss(algorithm, example(advantages)), formula, LOGPS)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_dapo_is_a_mean_over_the_tokens_of_the_step(size):
    advantages = normalised(REWARDS)

    def formula(logps):
        tokens = clipped(np.exp(logps - OLD), advantages[:, None], 0.2, 0.28)
        return (tokens * MASK).sum() / MASK.sum()

    _, algorithm = make_algorithm(GrpoRunConfig(loss_type="dapo", num_generations=GROUP))
    batch = example(advantages, reference=None)
    assert_is(over_micro_batches(grpo_loss, algorithm, batch, size), formula, LOGPS)


# ---- PPO.

VALUES, TOKEN_REWARDS = draw(6), np.where(np.arange(LENGTH) == LENGTHS[:, None] - 1, 1.0, 0)
TOKEN_REWARDS *= REWARDS[:, None]


def gae(gamma, decay):
    """Advantages that are not whitened, and returns."""
    advantages = np.zeros((ROWS, LENGTH))
    for row, length in enumerate(LENGTHS):
        following = next_value = 0.0
        for t in reversed(range(length)):
            delta = TOKEN_REWARDS[row, t] + gamma * next_value - VALUES[row, t]
            advantages[row, t] = following = delta + gamma * decay * following
            next_value = VALUES[row, t]
    return advantages, advantages + VALUES


@pytest.mark.parametrize("size", [4, 1])
def test_ppo_whitens_and_averages_over_the_mini_batch(size):
    config = ppo_learner.PPOConfig(beta=0.0, entropy_coef=0.05, gamma=0.9, gae_lambda=0.8)
    raw, returns = gae(0.9, 0.8)
    kept = raw[MASK]
    white = (raw - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)

    def policy_formula(logps):
        tokens = clipped(np.exp(logps - OLD), white) - 0.05 * (1 + np.abs(logps))
        return (tokens * MASK).sum() / MASK.sum()

    def value_formula(values):
        near = np.clip(values, VALUES - 0.2, VALUES + 0.2)
        worse = np.maximum((values - returns) ** 2, (near - returns) ** 2)
        return 0.5 * (worse * MASK).sum() / MASK.sum()

    # The host whitens over the whole rollout step, of which the mini-batch is a part.
    estimate = function_registry.get_advantage_estimator(config.advantage_estimator)
    rows = [(part, 3 * part) for part in (TOKEN_REWARDS, VALUES * MASK)] + [(MASK, MASK)]
    step = (jnp.asarray(np.concatenate(pair)) for pair in rows)
    found = estimate(*step, gamma=0.9, gae_lambda=0.8)
    advantages, sums = (np.asarray(part[:ROWS]) for part in found)
    np.testing.assert_allclose(sums[MASK], returns[MASK], rtol=1e-5, atol=1e-6)
    batch = example(
        advantages, reference=None, kind=ppo_learner.TrainExample, returns=sums, old_values=VALUES
    )

    def value_loss(algorithm, part):
        loss = hooks.with_images(algo_core.ppo_value_loss_fn)
        return lambda model: loss(model, part, clip_range_value=0.2, pad_id=0, eos_id=1)[0]

    assert_is(over_micro_batches(grpo_loss, config, batch, size), policy_formula, LOGPS)
    moved = VALUES + np.random.default_rng(7).choice([-0.4, -0.1, 0.1, 0.4], VALUES.shape)
    assert_is(over_micro_batches(value_loss, config, batch, size), value_formula, moved)


def test_a_mean_over_a_piece_of_what_is_sampled_counts_by_its_rows():
    cluster = object.__new__(rl_cluster.RLCluster)
    cluster._buffered_train_metrics, cluster._buffered_eval_metrics = [], []
    cluster.global_steps = 0
    mode = rl_cluster.Mode.EVAL
    cluster.buffer_metrics({}, mode=rl_cluster.Mode.TRAIN)
    for count, value in ((3, 1.0), (1, 5.0)):
        with bind(RolloutContext(count=count)):
            told = {"mean": (value, np.mean), "most": (value, np.max), "said": ("yes", None)}
            cluster.buffer_metrics(told, mode=mode)
    (buffer,) = cluster._buffered_eval_metrics
    assert {name: len(values) for name, (values, _) in buffer.metrics.items()} == {
        "mean": 4,
        "most": 2,
        "said": 2,
    }
    assert np.mean(buffer.metrics["mean"][0]) == 2


# ---- Preferences. Rows 0 and 1 are chosen, 2 and 3 the answers rejected for them.


def orpo_loss(**settings):
    batch = types.SimpleNamespace(
        input_ids=None,
        positions=None,
        attention_mask=None,
        logits_to_keep=LENGTH,
        completion_mask=jnp.asarray(MASK),
        images=None,
    )
    return lambda model: dpo_trainer.dpo_loss_fn(model, batch, algorithm="orpo", **settings)[0]


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_orpo_compares_mean_log_probabilities(smoothing):
    def formula(logps):
        mean = (logps * MASK).sum(1) / LENGTHS
        odds = mean - np.log(1 - np.exp(mean))
        ratio = odds[:2] - odds[2:]
        preference = (1 - smoothing) * log_sigmoid(ratio) + smoothing * log_sigmoid(-ratio)
        return -(mean[:2] + 0.5 * preference).mean()

    assert_is(orpo_loss(lambda_orpo=0.5, label_smoothing=smoothing), formula, draw(4))
    # Odds of answers that are nearly sure, and of very unlikely ones.
    sure = draw(5) * np.array([1e-3, 10, 10, 1e-3])[:, None]
    assert_is(orpo_loss(lambda_orpo=0.5, label_smoothing=smoothing), formula, sure)


def test_orpo_is_the_hosts_own_where_that_takes_means():
    def newer(model, train_example, algorithm="dpo", beta=0.1, average_log_prob_orpo=False):
        return model, train_example, algorithm, beta, average_log_prob_orpo

    model = random_model("demo", text_only=True)
    given = model, "example", "orpo", 0.2, True
    assert preferences.wrap_dpo_loss_fn(newer)(*given) == given


def test_orpo_stays_finite_where_an_answer_is_sure():
    for logps in (np.zeros((ROWS, LENGTH)), np.full((ROWS, LENGTH), 1e-7)):
        value, gradient = nnx.value_and_grad(orpo_loss())(Table(logps))
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
