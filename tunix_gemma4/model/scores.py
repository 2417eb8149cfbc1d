# SPDX-License-Identifier: Apache-2.0
"""A number for every token: PPO's critic, and reward models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from ..config import ModelConfig
from ..sharding import metadata, shard_model
from .cache import Cache
from .gemma4 import Gemma4ForConditionalGeneration, Gemma4Model, abstract_model


class Gemma4ForTokenScores(Gemma4Model):
    """The policy's body under a head of one output, `score`.

    It is no kind of policy (no `Gemma4ForConditionalGeneration`): it has no logits, so nothing may
    sample from it or ask it for log-probabilities.

    The head starts at zero, so that a new critic expects nothing, and its first step moves the
    head alone. It is float32 in every model: small changes of a bfloat16 head would be rounded
    away, and it has only `hidden_size` numbers.

    Args:
        config: what to build, as of a policy.
        rngs: source of the random initial weights of the body.
        text_only: in place of the `text_only` of `config`, which decides if this is None.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, text_only: bool | None = None):
        super().__init__(config, rngs=rngs, text_only=text_only)
        self.score = _head(config)

    @classmethod
    def from_policy(
        cls, policy: Gemma4ForConditionalGeneration, *, share_arrays: bool = False
    ) -> Gemma4ForTokenScores:
        """A model with the policy's body and a new head, on the policy's devices.

        Training either of the two never changes the other.

        Args:
            policy: a model without adapters; it is left as it is.
            share_arrays: hold the policy's own arrays in place of copies, until one of both is
                trained. Saves the memory of a second model for a reward model or a critic with
                adapters; not for trainers that donate a policy's parameters (Tunix's do not).

        Raises:
            ValueError: for a policy with adapters, which `merge_lora` removes.
        """
        if jax.tree.leaves(nnx.state(policy, nnx.LoRAParam)):
            raise ValueError(
                "policy: it has adapters. from_policy(merge_lora(policy)) starts from what it "
                "computes, from_policy of the model that apply_lora was given from what that "
                "computes; apply_lora then gives the result adapters of its own"
            )
        body = nnx.clone(policy)
        if not share_arrays:
            nnx.update(body, jax.tree.map(jnp.copy, nnx.state(body)))
        scores = abstract_model(policy.config, cls)
        for name in ("language_model", "vision_tower", "embed_vision"):
            if name in vars(body):
                setattr(scores, name, getattr(body, name))
        scores.score = _head(policy.config)
        placed = body.language_model.norm.weight.get_raw_value()
        if not isinstance(placed, jax.core.Tracer) and isinstance(placed.sharding, NamedSharding):
            shard_model(scores.score, placed.sharding.mesh)
        return scores

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        images: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Scores float32 [B, T, 1] and the new cache, or None without one.

        Arguments and errors are those of `Gemma4ForConditionalGeneration`'s call. A token's score
        depends on it and what it sees before it.
        """
        hidden, cache = self.hidden_states(
            tokens, positions, cache, attention_mask, segment_ids, images
        )
        return self.score(hidden), cache


def _head(config: ModelConfig) -> nnx.Linear:
    return nnx.Linear(
        config.hidden_size,
        1,
        use_bias=False,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.zeros_init(),
        kernel_metadata=metadata("embed", None),
        rngs=nnx.Rngs(0),
    )
