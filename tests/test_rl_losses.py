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
from tunix.rl import common, function_registry
from tunix.rl.grpo.grpo_learner import TrainExample
from tunix.sft.dpo import dpo_trainer

import tunix_gemma4
from tunix_gemma4.host import learner as hooks
from tunix_gemma4.host.grpo import KL_ESTIMATORS, make_algorithm
from tunix_gemma4.model.gemma4 import Gemma4Model

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

    def logps_and_entropy(graphdef, state, **options):
        logps = table(nnx.merge(graphdef, state))
        return logps, jnp.ones_like(logps)

    monkeypatch.setattr(common, "compute_per_token_logps", logps_and_entropy)
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


def example(advantages, *, old=OLD, reference=REFERENCE):
    zeros = jnp.zeros((ROWS, LENGTH), jnp.int32)
    array = lambda x: None if x is None else jnp.asarray(x, jnp.float32)  # noqa: E731
    plain = TrainExample(
        prompt_ids=zeros,
        prompt_mask=zeros,
        completion_ids=zeros,
        completion_mask=jnp.asarray(MASK),
        advantages=array(advantages),
        ref_per_token_logps=array(reference),
        old_per_token_logps=array(old),
    )
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    return hooks.extended(TrainExample)(**fields, rollout_logps=array(OLD))


def grpo_loss(algorithm, batch):
    algorithm.temperature = 1.0
    loss = hooks._with_images(function_registry.get_policy_loss_fn(algorithm.policy_loss_fn))
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

    _, algorithm = make_algorithm("grpo", num_generations=GROUP, beta=0.3, kl_estimator=estimator)
    estimate = function_registry.get_advantage_estimator(algorithm.advantage_estimator)
    found = estimate(rewards=REWARDS, num_generations=GROUP)
    np.testing.assert_allclose(found, advantages, rtol=1e-6)
    assert_is(grpo_loss(algorithm, example(advantages)), formula, LOGPS)


def test_the_penalty_pulls_towards_the_reference_unless_told_otherwise():
    """k3 by default: its gradient is 0 at the reference alone, and k1's is 1 everywhere."""
    _, algorithm = make_algorithm("grpo", num_generations=GROUP, beta=1.0)
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

    _, algorithm = make_algorithm(
        "gspo", num_generations=GROUP, beta=0.05, epsilon=0.1, epsilon_high=0.15
    )
    assert_is(grpo_loss(algorithm, example(advantages)), formula, LOGPS)


def test_dr_grpo_sums_over_a_fixed_length_and_keeps_the_scale_of_rewards():
    advantages = centred(REWARDS)

    def formula(logps):
        tokens = clipped(np.exp(logps - OLD), advantages[:, None])
        return ((tokens + 0.1 * KL["k3"](logps)) * MASK).sum() / (ROWS * LENGTH)

    _, algorithm = make_algorithm("dr_grpo", num_generations=GROUP, beta=0.1)
    estimate = function_registry.get_advantage_estimator(algorithm.advantage_estimator)
    np.testing.assert_allclose(estimate(rewards=REWARDS, num_generations=GROUP), advantages)
    assert_is(grpo_loss(algorithm, example(advantages)), formula, LOGPS)


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


def test_orpo_stays_finite_where_an_answer_is_sure():
    for logps in (np.zeros((ROWS, LENGTH)), np.full((ROWS, LENGTH), 1e-7)):
        value, gradient = nnx.value_and_grad(orpo_loss())(Table(logps))
        assert np.isfinite(value)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
