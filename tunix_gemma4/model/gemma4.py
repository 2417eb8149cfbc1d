# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: tokens and images in, logits out, or a number for every token.

Source: transformers 5.12 `Gemma4ForConditionalGeneration`.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import ModelConfig, refuse_float16
from ..sharding import constrain, eval_shape, mesh_of, metadata, shard_model
from .backend_names import BackendNames
from .cache import Cache, cache_name, end_index, init_cache
from .layers import HasBuffers
from .masks import Tokens, attention_masks, full_mask, segment_positions, visible_pairs
from .scan import BlockPattern, LayerStack, block_patterns
from .shared_prompt import SharedPrompt
from .soft_tokens import check_images, merge_soft_tokens
from .text import DecoderLayer, TextModel
from .vision import VisionProjector, VisionTower
from .vocabulary import soft_cap, uncapped_logits


class Gemma4Model(nnx.Module):
    """Everything below the head: what a policy and a model of scores have in common.

    Args:
        config: what to build; every sub-module reads this one object.
        rngs: source of the random initial weights.
        text_only: in place of the `text_only` of `config`, which decides if this is None.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, text_only: bool | None = None):
        if text_only is not None and text_only != config.text_only:
            config = dataclasses.replace(config, text_only=text_only)
        config.validate()  # Fields may have been assigned, in any order.
        refuse_float16(config)
        self.config = config
        self.language_model = TextModel(config, rngs=rngs)
        if config.has_vision:
            self.vision_tower = VisionTower(config, rngs=rngs)
            self.embed_vision = VisionProjector(config, rngs=rngs)

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        images: jax.Array | None = None,
        *,
        output_hidden_states: bool = False,
        image_repeats: int = 1,
        shared_prompt: SharedPrompt | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states [B, T, D] and the new cache, or None without one.

        Arguments and errors are those of `Gemma4ForConditionalGeneration`'s call.
        """
        config = self.config
        attention_mask = self._check_call(tokens, cache, attention_mask, segment_ids)
        check_images(config, tokens, images, image_repeats)
        if shared_prompt is not None:
            _check_shared(shared_prompt, tokens, (cache, attention_mask), positions)
        first_slot = 0 if cache is None else end_index(config, cache)
        if positions is None:
            positions = self._positions(tokens, first_slot, segment_ids)
        masks = attention_masks(config, tokens, attention_mask, segment_ids, cache, shared_prompt)
        x, text_tokens = self._embed(tokens, images, image_repeats)
        x = constrain(x, "batch", None, None)
        per_layer_inputs = self.language_model.per_layer_inputs(text_tokens, x)
        x, cache, outputs = self.language_model(
            *(x, per_layer_inputs, positions, masks, cache), keep_outputs=output_hidden_states
        )
        if output_hidden_states:
            for hidden in (*outputs[:-1], x):
                self.sow(nnx.Intermediate, "all_hidden_states", hidden)
        return x, cache

    def encode_images(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Soft tokens [B, I * S, D] of images [B, I, M, C], and which are valid [B, I * S]."""
        batch = images.shape[0]
        soft, valid = self.vision_tower(images.reshape(-1, *images.shape[2:]))
        soft = constrain(self.embed_vision(soft), "batch", None, None)
        return soft.reshape(batch, -1, soft.shape[-1]), valid.reshape(batch, -1)

    def _embed(
        self, tokens: jax.Array, images: jax.Array | None, image_repeats: int
    ) -> tuple[jax.Array, jax.Array]:
        """Merged embeddings [B, T, D], and tokens with media placeholders turned into pads."""
        config = self.config
        media = jnp.array([config.image_token_id, config.video_token_id, config.audio_token_id])
        text_tokens = jnp.where(jnp.isin(tokens, media), config.pad_token_id, tokens)
        x = self.language_model.embed(text_tokens)
        if config.has_vision and (tokens.shape[1] > 1 or images is not None):
            soft_tokens = None
            if images is not None and images.shape[1]:
                values, valid = self.encode_images(images)
                if image_repeats > 1:
                    values, valid = (jnp.repeat(x, image_repeats, axis=0) for x in (values, valid))
                soft_tokens = values, valid
            x = merge_soft_tokens(x, tokens == config.image_token_id, soft_tokens)
        return x, text_tokens

    @staticmethod
    def _positions(tokens, first_slot, segment_ids):
        if segment_ids is not None:
            return segment_positions(segment_ids)
        slots = first_slot + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return jnp.broadcast_to(slots, tokens.shape)

    def _check_call(self, tokens, cache, attention_mask, segment_ids) -> jax.Array | None:
        """The caller's mask, bool [B, T, S]."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens: expected [B, T], found shape {tokens.shape}")
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids: packed rows cannot be decoded with a cache; pass one")
        if attention_mask is None:
            return None
        length = tokens.shape[1]
        if cache is not None:
            full = [spec for spec in self.config.layers if spec.kind == "full"]
            length = cache[cache_name(full[0].index)]["k"].shape[1] if full else None
        return full_mask(attention_mask, (*tokens.shape, length or attention_mask.shape[-1]))

    # ---- What Tunix asks of a model besides calling it.

    @property
    def num_embed(self) -> int:
        """Size of the vocabulary."""
        return self.config.vocab_size

    @property
    def embedder(self) -> nnx.Module:
        """The embedding, by Tunix's name."""
        return self.language_model.embed_tokens

    @property
    def vision_encoder(self) -> nnx.Module | None:
        """The tower, by Tunix's name; None of a text-only model."""
        return getattr(self, "vision_tower", None)

    def get_attention_mask(
        self, tokens: jax.Array, inputs_mask: jax.Array | None = None
    ) -> jax.Array:
        """Causal and not padding: bool [B, T, T].

        Args:
            tokens: int [B, T].
            inputs_mask: bool or int [B, T], true at real tokens; None: where not the pad token.
        """
        real = tokens != self.config.pad_token_id if inputs_mask is None else inputs_mask
        slots = Tokens(jnp.arange(tokens.shape[1]))
        return visible_pairs(slots, slots, None)[None] & jnp.asarray(real, bool)[:, None, :]

    def init_cache(self, batch_size: int, max_seq_len: int, dtype: Any) -> Cache:
        """Fresh, empty caches; see `cache.init_cache`."""
        return init_cache(self.config, batch_size, max_seq_len, dtype)

    def get_model_input(self) -> dict[str, Any]:
        """The smallest input that reaches every projection: Qwix traces it to place adapters.

        Keyword arguments of the call for two rows; with vision, each row holds the smallest
        legal image, which is one soft token.
        """
        tokens = jnp.full((2, 4), self.config.bos_token_id, jnp.int32)
        inputs: dict[str, Any] = {"positions": None, "cache": None, "attention_mask": None}
        if self.config.has_vision:
            vision = self.config.tower
            tokens = tokens.at[:, 1].set(self.config.image_token_id)
            kernel = vision.pooling_kernel_size
            grid = jnp.stack(jnp.meshgrid(jnp.arange(kernel), jnp.arange(kernel)), axis=-1)
            patches = jnp.zeros((kernel**2, vision.patch_dim), jnp.float32)
            image = jnp.concatenate([patches, grid.reshape(-1, 2).astype(jnp.float32)], axis=-1)
            inputs["images"] = jnp.broadcast_to(image, (2, 1, *image.shape))
        return {"tokens": tokens, **inputs}


def _check_shared(layout: SharedPrompt, tokens, refused, positions) -> None:
    if any(given is not None for given in refused) or positions is None:
        raise ValueError(
            "shared_prompt: expected positions, and neither cache nor attention_mask; segment_ids "
            "say which tokens are padding"
        )
    if tokens.shape[1] != layout.length:
        raise ValueError(
            f"shared_prompt: expected rows of {layout.length} tokens, found {tokens.shape[1]}"
        )


class Gemma4ForConditionalGeneration(Gemma4Model, BackendNames):
    """The policy, with the call that Tunix's trainers and samplers make."""

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        images: jax.Array | None = None,
        decode_only_last_token: bool = False,
        skip_lm_head: bool = False,
        output_hidden_states: bool = False,
        image_repeats: int = 1,
        shared_prompt: SharedPrompt | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the model.

        Args:
            tokens: int [B, T], images expanded to one placeholder per soft token.
            positions: int [B, T]; None counts from 0 within each segment, or on from the cache.
            cache: from `init_cache`; the new tokens are stored behind those in it.
            attention_mask: bool or int [B, T, S], S = T or the cache's length, true where a key
                may be seen: causal and not padding. Any axis may be 1, for all alike. None means
                causal. Causality, windows, segments and image blocks are added here.
            segment_ids: int [B, T]; tokens see their own segment alone. Not with a cache.
            images: float32 [B, I, M, 3 * patch_size**2 + 2], patches and their (x, y), (-1, -1)
                for padding. The k-th placeholder of a row takes the row's k-th soft token. A row
                whose counts differ raises, or under jit becomes NaN.
            decode_only_last_token: logits of the last token alone.
            skip_lm_head: return the final hidden states [B, T, D] in place of logits.
            output_hidden_states: as in Tunix, not as in transformers: logits are returned all the
                same, and every layer's output is sown as `all_hidden_states`, the final normed one
                last. For transformers' values of tokens:

                    last, _ = model(tokens, skip_lm_head=True, output_hidden_states=True)
                    states = nnx.pop(model, nnx.Intermediate)["all_hidden_states"].get_value()

                `last` is its `last_hidden_state`, and `(embeddings, *states)` its `hidden_states`,
                with `embeddings = model.language_model.embed(tokens)` where there are no images.
                Without the pop the next call's are added to them.
            image_repeats: n: each of B / n rows of images serves n rows of tokens in turn.
            shared_prompt: how several completions share their row's prompt, in T columns. With
                positions, without cache and mask; segment_ids say which tokens are padding.

        Returns:
            Logits float32 [B, T, V], soft-capped, and the new cache, or None without one.

        Raises:
            ValueError: for shapes that do not fit, images to a text-only model, or placeholders
                and soft tokens that disagree.
        """
        x, cache = self.hidden_states(
            *(tokens, positions, cache, attention_mask, segment_ids, images),
            output_hidden_states=output_hidden_states,
            image_repeats=image_repeats,
            shared_prompt=shared_prompt,
        )
        if decode_only_last_token:
            x = x[:, -1:]
        return (x if skip_lm_head else self.compute_final_logits(x)), cache

    def compute_final_logits(self, hidden: jax.Array) -> jax.Array:
        """Soft-capped logits, float32 [..., V], of final hidden states [..., D]."""
        table = self.language_model.embed_tokens.embedding[...]
        return soft_cap(uncapped_logits(table, hidden, self.config), self.config)


Gemma4 = Gemma4ForConditionalGeneration  # What Tunix calls it.


class Gemma4ForTokenScores(Gemma4Model):
    """The policy's body under a head of one output, `score`.

    It is no kind of policy (no `Gemma4ForConditionalGeneration`): it has no logits, so nothing may
    sample from it or ask it for log-probabilities.

    The head starts at zero, so that a new critic expects nothing, and its first step moves the
    head alone. It is float32 in every model: small changes of a bfloat16 head would be rounded
    away, and it has only `hidden_size` numbers. Arguments are those of `Gemma4Model`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, text_only: bool | None = None):
        super().__init__(config, rngs=rngs, text_only=text_only)
        self.score = _score_head(config)

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
        scores.score = _score_head(policy.config)
        mesh = mesh_of(body.language_model.embed_tokens.embedding.get_raw_value())
        if mesh is not None:
            shard_model(scores.score, mesh)
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


def _score_head(config: ModelConfig) -> nnx.Linear:
    return nnx.Linear(
        *(config.hidden_size, 1),
        use_bias=False,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.zeros_init(),
        kernel_metadata=metadata("embed", None),
        rngs=nnx.Rngs(0),
    )


def num_parameters(model: nnx.Module) -> int:
    """Numbers in all parameters and buffers, the tied head counted once; works on shapes too."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    for _, module in nnx.iter_modules(model):
        if isinstance(module, HasBuffers):
            shapes += module.buffer_shapes().values()
    return sum(map(math.prod, shapes))


AnyModel = TypeVar("AnyModel", bound=Gemma4Model)


def abstract_model(
    config: ModelConfig, model_class: type[AnyModel] = Gemma4ForConditionalGeneration
) -> AnyModel:
    """A model of shapes and dtypes only; costs no memory."""
    # Any key will do, and a real source of keys, which counts them, takes seconds to trace.
    key = jax.random.key(0)
    rngs: Any = types.SimpleNamespace(params=lambda: key)
    return eval_shape(lambda: model_class(config, rngs=rngs))


def is_stacked(model: nnx.Module) -> bool:
    """Whether `model` is what `stack_layers` leaves."""
    return hasattr(getattr(model, "language_model", None), "stacks")


def stack_layers(model: AnyModel) -> AnyModel:
    """Stacks the layers of the decoder and of the tower, in place, and returns the model.

    `generate`, the losses and Tunix's trainers take either form. What names single layers wants
    the other one: adapters, checkpoints in Hugging Face's format, rollouts with vLLM or SGLang.

    Args:
        model: with adapters or without, of arrays or shapes.

    Raises:
        ValueError: if equal layers of a block differ, as with adapters on some only.
    """
    if is_stacked(model):
        return model
    text = model.language_model
    layers = list(text.layers)
    del text.layers
    text.stacks = nnx.List([])
    for pattern in block_patterns(model.config.layers):
        count = pattern.end - pattern.first
        # No list may keep single layers: their arrays would stay beside the stacked ones.
        text.stacks.append(LayerStack(pattern, layers[:count]))
        del layers[:count]
    if model.config.has_vision:
        encoder = model.vision_tower.encoder
        layers = list(encoder.layers)
        del encoder.layers
        encoder.stack = LayerStack(BlockPattern(0, (len(layers),), 1), layers)
    return model


def unstack_layers(model: AnyModel) -> AnyModel:
    """Undoes `stack_layers`, in place, and returns the model."""
    if not is_stacked(model):
        return model
    text = model.language_model
    layers: list[DecoderLayer] = []
    while text.stacks:
        layers += text.stacks.pop(0).unstacked(model.config.layers)
    del text.stacks
    text.layers = nnx.List(layers)
    if model.config.has_vision:
        encoder = model.vision_tower.encoder
        encoder.layers = nnx.List(encoder.stack.unstacked())
        del encoder.stack
    return model


def require_single_layers(model: nnx.Module) -> None:
    """Raises ValueError if the layers of `model` are stacked, for what speaks of single ones."""
    if is_stacked(model):
        single = "the model's decoder layers are stacked, and this names single ones"
        raise ValueError(f"{single}: call unstack_layers(model) first")
