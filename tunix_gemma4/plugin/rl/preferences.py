# SPDX-License-Identifier: Apache-2.0
"""DPO and ORPO: log-probabilities of two answers to one prompt, and ORPO's loss.

Nothing of size [B, T, V] exists, and the prompt of a pair is computed once, with its images.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx, struct
from tunix.sft.dpo import dpo_trainer

from ...losses import per_token_logps
from ...model.gemma4 import Gemma4ForConditionalGeneration, Gemma4Model
from ...model.shared_prompt import SharedPrompt
from ...sharding import batch_shards
from ..hooks import around, call_of
from .context import RolloutContext, bind, current
from .gate import gated

# ---- Log-probabilities.


@around
def wrap_get_per_token_logps(original, *args: Any, **kwargs: Any) -> jax.Array:
    """DPO and ORPO without a [B, T, V] array."""
    given = call_of(original, *args, **kwargs)
    model = given.arguments["model"]
    if isinstance(model, Gemma4ForConditionalGeneration):
        given.apply_defaults()
        return _completion_logps(**given.arguments)
    given.arguments["model"] = gated(model)
    return original(*given.args, **given.kwargs)


@nnx.jit(static_argnames=("logits_to_keep",))
def _completion_logps(model, input_tokens, positions, attn_mask, logits_to_keep, images):
    """Log-probabilities float32 [B, logits_to_keep] of the last tokens."""
    hidden, _ = model(input_tokens, positions, None, attn_mask, images=images, skip_lm_head=True)
    targets = input_tokens[:, -logits_to_keep:]
    logps, _ = per_token_logps(model, hidden[:, -logits_to_keep - 1 : -1], targets)
    return logps


# ---- Both answers in one row with their prompt.


@functools.cache
def _paired(kind: type) -> type:
    """The host's example `kind`, of pairs that the host has made."""

    @struct.dataclass
    class Pairs(kind):
        pairs: bool = struct.field(pytree_node=False, default=True)

    return Pairs


@around
def wrap_prepare_inputs(original, self, training_input: Any) -> Any:
    """Here alone it is known that the first and the second half of the rows have the same prompts.

    The host puts each prompt, and its images, into both.
    """
    if not isinstance(self.model, Gemma4ForConditionalGeneration):
        return original(self, training_input)
    with bind(RolloutContext(group=2)):
        example = original(self, training_input)
    fields = {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
    return _paired(type(example))(**fields)


@around
def wrap_compute_logps(original, *args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
    """The prompt of a chosen and a rejected answer is computed once."""
    given, context = call_of(original, *args, **kwargs), current()
    call = given.arguments
    model: Any = call["model"]
    is_pairs = context is not None and context.group == 2
    if not (is_pairs and isinstance(model, Gemma4ForConditionalGeneration)):
        return original(*args, **kwargs)
    rows, length = call["input_ids"].shape
    mask, shards = call["attention_mask"], batch_shards()
    obstacle = None
    if model.config.wants_kernel:
        obstacle = "attention_implementation asks for a kernel, which takes no such rows"
    elif mask.shape != (rows, length, length):
        obstacle = f"attention_mask has the shape {mask.shape}"
    elif rows // 2 % shards:
        obstacle = f"{rows // 2} pairs do not divide among {shards} parts of the mesh"
    if obstacle is not None:
        message = "Chosen and rejected answers are computed with their prompt each: %s."
        logging.log_first_n(logging.WARNING, message, 1, obstacle)
        return original(*args, **kwargs)
    return _pair_logps(**call)


@nnx.jit(static_argnames=("logits_to_keep",))
def _pair_logps(
    model, input_ids, positions, attention_mask, logits_to_keep, completion_mask, images=None
) -> tuple[jax.Array, jax.Array]:
    """As the host's `compute_logps`: sums over the answers, chosen and rejected, float32 [B] each.

    Where the prompts of a pair are not the same, theirs are NaN.
    """
    pairs, prompt = input_ids.shape[0] // 2, input_ids.shape[1] - logits_to_keep
    layout = SharedPrompt(prompt, logits_to_keep, 2)

    def rows(x: jax.Array) -> jax.Array:
        """[2 B, T], all chosen before all rejected, as prompt, chosen and rejected [B, P + 2 C]."""
        return jnp.concatenate([x[:pairs], x[pairs:, prompt:]], axis=1)

    # The last token may see all that are real.
    real = attention_mask[:, -1].astype(jnp.int32)
    hidden, _ = model(
        rows(input_ids),
        positions=rows(positions),
        segment_ids=rows(real),
        images=None if images is None else images[:pairs],
        skip_lm_head=True,
        shared_prompt=layout,
    )
    answers = input_ids[:, prompt:].reshape(2, pairs, -1).swapaxes(0, 1)
    logps, _ = per_token_logps(
        model, layout.before_completions(hidden), answers.reshape(2 * pairs, -1)
    )
    logps = logps.reshape(pairs, 2, -1).swapaxes(0, 1)
    sums = (logps * completion_mask.reshape(logps.shape)).sum(axis=-1)
    both = jnp.where(real[:, :prompt] != 0, input_ids[:, :prompt], -1).reshape(2, pairs, -1)
    equal = (both[0] == both[1]).all(axis=-1)
    chosen, rejected = jnp.where(equal, sums, jnp.nan)
    return chosen, rejected


# ---- ORPO.

# The odds of an answer are no larger than those of this log-probability: rounding gives a sure
# answer 0 or a little more, where odds are infinite.
_SURE = -float(jnp.finfo(jnp.float32).eps)


@around
def wrap_dpo_loss_fn(original, model, train_example, algorithm: str = "dpo", *args, **kwargs):
    """ORPO compares mean log-probabilities, and stays finite where an answer is sure.

    The host takes their sums, so that an answer's length decides what is preferred, and the
    logarithm of 0. DPO's loss, and other models, are the host's.
    """
    with bind(RolloutContext(group=2 if getattr(train_example, "pairs", False) else 1)):
        return _dpo_loss(original, model, train_example, algorithm, *args, **kwargs)


def _dpo_loss(original, model, train_example, algorithm, *args, **kwargs):
    # Newer hosts take means themselves, where they are asked to.
    takes_means = "average_log_prob_orpo" in inspect.signature(original).parameters
    if algorithm == "orpo" and isinstance(model, Gemma4Model) and not takes_means:
        return _orpo_loss(model, train_example, *args, **kwargs)
    return original(model, train_example, algorithm, *args, **kwargs)


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
