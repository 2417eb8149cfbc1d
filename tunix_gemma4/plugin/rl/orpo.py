# SPDX-License-Identifier: Apache-2.0
"""ORPO's loss by mean log-probabilities, as the paper has it.

The host takes their sums, so that an answer's length decides what is preferred, and the logarithm
of 0 where an answer is sure.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tunix.sft.dpo import dpo_trainer

from ...model.gemma4 import Gemma4Model

# The odds of an answer are no larger than those of this log-probability: rounding gives a sure
# answer 0 or a little more, where odds are infinite.
_SURE = -float(jnp.finfo(jnp.float32).eps)


def wrap_dpo_loss_fn(original: Callable) -> Callable:
    """ORPO's loss for Gemma 4; DPO's, and other models, are the host's."""
    # Newer hosts take means themselves, where they are asked to.
    takes_means = "average_log_prob_orpo" in inspect.signature(original).parameters

    @functools.wraps(original)
    def dpo_loss_fn(
        model: Any, train_example: Any, algorithm: str = "dpo", *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if algorithm == "orpo" and isinstance(model, Gemma4Model) and not takes_means:
            return _orpo_loss(model, train_example, *args, **kwargs)
        return original(model, train_example, algorithm, *args, **kwargs)

    return dpo_loss_fn


def _orpo_loss(
    model: Any,
    train_example: Any,
    beta: float = 0.1,
    lambda_orpo: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean over rows of -log P(chosen) - lambda * log sigmoid(log odds ratio), and metrics.

    P is the geometric mean of the answer's token probabilities. `beta` is DPO's.
    """
    del beta
    sums = dpo_trainer.compute_logps(
        model,
        train_example.input_ids,
        train_example.positions,
        train_example.attention_mask,
        train_example.logits_to_keep,
        train_example.completion_mask,
        images=train_example.images,
    )
    lengths = jnp.split(jnp.maximum(train_example.completion_mask.sum(axis=-1), 1), 2)
    chosen, rejected = (total / length for total, length in zip(sums, lengths, strict=True))
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    preferred = jax.nn.log_sigmoid(log_odds) * (1 - label_smoothing)
    preference_loss = -(preferred + jax.nn.log_sigmoid(-log_odds) * label_smoothing)
    loss = (lambda_orpo * preference_loss - chosen).mean()
    return loss, {
        "rewards/chosen": lambda_orpo * chosen.mean(),
        "rewards/rejected": lambda_orpo * rejected.mean(),
        "rewards/margin": lambda_orpo * (chosen - rejected).mean(),
        "rewards/accuracy": (chosen > rejected).mean(),
        "log_probs/chosen": chosen.mean(),
        "log_probs/rejected": rejected.mean(),
        "odds_ratio": jnp.exp(log_odds).mean(),
        "sft_loss": -chosen.mean(),
        "or_loss": preference_loss.mean(),
    }


def _log_odds(logp: jax.Array) -> jax.Array:
    """log(p / (1 - p)) from log p, exact for p near 0 and near 1, and finite for p = 1."""
    logp = jnp.minimum(logp, _SURE)
    near_one = logp > -jnp.log(2.0)
    # Each branch gets arguments that it can take, because gradients pass through both.
    by_expm1 = jnp.log(-jnp.expm1(jnp.where(near_one, logp, -1.0)))
    by_log1p = jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, logp)))
    return logp - jnp.where(near_one, by_expm1, by_log1p)
