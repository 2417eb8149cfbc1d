# SPDX-License-Identifier: Apache-2.0
"""The text decoder. Source: transformers 5.12 `Gemma4TextModel`, `Gemma4TextDecoderLayer`."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import LayerSpec, ModelConfig, RematConfig
from ..sharding import constrain, metadata
from .attention import Attention, KeysValues
from .cache import Cache, LayerCache, cache_name
from .layers import MLP, HasBuffers, RMSNorm, angles, frequencies, gelu, linear, remat_call
from .masks import AttentionMask
from .moe import Experts, Router
from .scan import LayerStack
from .vocabulary import lookup


class DecoderLayer(nnx.Module, HasBuffers):
    """Attention, dense MLP, then what the size adds: experts, per-layer input, layer scalar."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        self.config, self.spec = config, spec
        size = config.hidden_size
        norm = lambda: RMSNorm(size, config=config)  # noqa: E731
        self.self_attn = Attention(config, spec, rngs=rngs)
        self.mlp = MLP(size, spec.mlp_dim, config=config, rngs=rngs)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        if spec.moe:
            self.router = Router(config, rngs=rngs)
            self.experts = Experts(config, rngs=rngs)
            self.post_feedforward_layernorm_1 = norm()
            self.post_feedforward_layernorm_2 = norm()
            self.pre_feedforward_layernorm_2 = norm()
        if width := config.hidden_size_per_layer_input:
            make = {"config": config, "rngs": rngs}
            self.per_layer_input_gate = linear(size, width, axes=("embed", None), **make)
            self.per_layer_projection = linear(width, size, axes=(None, "embed"), **make)
            self.post_per_layer_input_norm = norm()
        self.layer_scalar = 1.0

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"layer_scalar": (1,)}

    def __call__(
        self,
        x: jax.Array,
        per_layer_input: jax.Array | None,
        cos_sin: tuple[jax.Array, jax.Array],
        mask: AttentionMask,
        cache: LayerCache | None,
        shared: KeysValues | None,
    ) -> tuple[jax.Array, KeysValues, LayerCache | None]:
        """x [B, T, D], per_layer_input [B, T, P] to the next x, keys and values, and the cache."""
        block_remat = cache is None and self.config.remat is RematConfig.BLOCK
        attended, kv, cache = remat_call(
            self.self_attn, block_remat, self.input_layernorm(x), cos_sin, mask, cache, shared
        )
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self._feed_forward(x))
        if per_layer_input is not None:
            gated = gelu(self.per_layer_input_gate(x)) * per_layer_input
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        # The scalar multiplies the residual too: it is no gate of a branch.
        return x * self.layer_scalar, kv, cache

    def _feed_forward(self, x: jax.Array) -> jax.Array:
        dense = self.mlp(self.pre_feedforward_layernorm(x))
        if not self.spec.moe:
            return dense
        # The router sees the residual itself, the experts its norm.
        weights, indices = self.router(x)
        mixed = self.experts(self.pre_feedforward_layernorm_2(x), weights, indices)
        mixed = self.post_feedforward_layernorm_2(mixed)
        return self.post_feedforward_layernorm_1(dense) + mixed


def _embed(num: int, features: int, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Embed:
    dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    placed = metadata("vocab", None)
    return nnx.Embed(num, features, **dtypes, embedding_metadata=placed, rngs=rngs)


class TextModel(nnx.Module):
    """Embeddings, decoder layers and the final norm."""

    stacks: nnx.List[LayerStack]  # In place of `layers`, once they are stacked.

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, per_layer = config.hidden_size, config.hidden_size_per_layer_input
        self.embed_tokens = _embed(config.vocab_size, size, config, rngs)
        if per_layer:
            packed, make = config.num_hidden_layers * per_layer, {"config": config, "rngs": rngs}
            self.embed_tokens_per_layer = _embed(config.vocab_size_per_layer_input, packed, **make)
            self.per_layer_model_projection = linear(size, packed, axes=("embed", "mlp"), **make)
            self.per_layer_projection_norm = RMSNorm(per_layer, config=config)
        self.layers = nnx.List([DecoderLayer(config, spec, rngs=rngs) for spec in config.layers])
        self.norm = RMSNorm(size, config=config)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Scaled embeddings [B, T, D]; the scale is rounded to the activations' dtype, as HF's."""
        return self._rows(self.embed_tokens, tokens) * self._root(self.config.hidden_size)

    def _rows(self, table: nnx.Embed, tokens: jax.Array) -> jax.Array:
        """Rows of `table`, without gradient for the padding row, which images look up too.

        HF's embeddings are built with `padding_idx`, so that row trains through the head alone.
        """
        rows = lookup(table, tokens)
        padding = (tokens == self.config.pad_token_id)[..., None]
        return jnp.where(padding, jax.lax.stop_gradient(rows), rows)

    def _root(self, size: int) -> jax.Array:
        return jnp.asarray(math.sqrt(size), self.config.dtype)

    def per_layer_inputs(self, tokens: jax.Array, x: jax.Array) -> jax.Array | None:
        """[B, T, L, P] for tokens whose media placeholders are pads, and merged embeddings x."""
        width = self.config.hidden_size_per_layer_input
        if not width:
            return None
        shape = (*tokens.shape, self.config.num_hidden_layers, width)
        of_token = self._rows(self.embed_tokens_per_layer, tokens) * self._root(width)
        of_token = of_token.reshape(shape)
        of_context = self.per_layer_model_projection(x) * self.config.hidden_size**-0.5
        of_context = constrain(of_context, "batch", None, None)
        of_context = self.per_layer_projection_norm(of_context.reshape(shape))
        return (of_context + of_token) * 2**-0.5

    def __call__(
        self,
        x: jax.Array,
        per_layer_inputs: jax.Array | None,
        positions: jax.Array,
        masks: dict[str, AttentionMask],
        cache: Cache | None,
        *,
        keep_outputs: bool = False,
    ) -> tuple[jax.Array, Cache | None, list[jax.Array]]:
        """x [B, T, D] to the normed output, the new cache, and every layer's output if asked."""
        remat = cache is None and self.config.remat is RematConfig.DECODER
        inputs = self._inputs(positions, masks, remat)
        if hasattr(self, "stacks") and cache is None and not keep_outputs:
            for stack in self.stacks:
                x = self._run(stack, x, per_layer_inputs, inputs)
            return self.norm(x), None, []
        new_cache: Cache = {}
        outputs = []
        for layer in self.single_layers():
            spec, name = layer.spec, cache_name(layer.spec.index)
            entry = cache[name] if cache is not None and not spec.shares_kv else None
            extra = None if per_layer_inputs is None else per_layer_inputs[:, :, spec.index]
            x, entry = inputs.call(layer, x, extra, entry)
            if entry is not None:
                new_cache[name] = entry
            if keep_outputs:
                outputs.append(x)
        return self.norm(x), (new_cache if cache is not None else None), outputs

    def single_layers(self) -> list[DecoderLayer]:
        """Every layer, those of stacks as slices."""
        if not hasattr(self, "stacks"):
            return list(self.layers)
        return [layer for stack in self.stacks for layer in stack.unstacked(self.config.layers)]

    def _inputs(self, positions, masks, remat) -> _Inputs:
        turned = {}
        for kind, spec in {spec.kind: spec for spec in self.config.layers}.items():
            turning = {"fraction": spec.rope_fraction, "factor": spec.rope_factor}
            frequency = frequencies(spec.head_dim, spec.rope_theta, **turning)
            turned[kind] = angles(positions, frequency)
        shared = {spec.kind for spec in self.config.layers if spec.shares_kv}
        return _Inputs(remat, turned, masks, shared, {})

    def _run(
        self, stack: LayerStack, x: jax.Array, extras: jax.Array | None, inputs: _Inputs
    ) -> jax.Array:
        """The layers of `stack`; leaves in `inputs` the keys and values that they kept."""
        if extras is not None:
            extras = jnp.moveaxis(extras[:, :, stack.pattern.first : stack.pattern.end], 2, 0)
        kept = {}
        for layer in stack.layers:
            spec = layer.spec
            if spec.kind in inputs.shared and not spec.shares_kv:
                # Each layer writes its own, so that the last one's are left.
                empty = jnp.zeros((*x.shape[:2], spec.num_kv_heads, spec.head_dim), x.dtype)
                kept[spec.kind] = (constrain(empty, "batch", None, "kv_heads", None),) * 2

        def call(layer, carry, extra):
            # A loop may hand on what it carries alone, so what layers keep is carried too.
            x, kept = carry
            here = dataclasses.replace(inputs, kept=inputs.kept | kept)
            x, _ = here.call(layer, x, extra, None)
            return x, {kind: here.kept[kind] for kind in kept}

        x, kept = stack.scan(call, (x, kept), extras, dtype=x.dtype)
        inputs.kept.update(kept)
        return x


@dataclasses.dataclass
class _Inputs:
    """What layers are called with besides their own input.

    Attributes:
        remat: whether the backward pass makes a layer's activations again.
        turned: cosines and sines by kind of layer.
        masks: by kind of layer.
        shared: kinds whose keys and values later layers read.
        kept: those keys and values. They travel as values of the graph: a checkpointed layer that
            read them from anywhere else would cut their gradient.
    """

    remat: bool
    turned: dict[str, tuple[jax.Array, jax.Array]]
    masks: dict[str, AttentionMask]
    shared: set[str]
    kept: dict[str, KeysValues]

    def call(
        self, layer: DecoderLayer, x: jax.Array, extra: jax.Array | None, entry: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """The next x and cache entry."""
        spec = layer.spec
        x, kv, entry = remat_call(
            layer, self.remat, constrain(x, "batch", None, None), extra,
            self.turned[spec.kind], self.masks[spec.kind], entry,
            self.kept[spec.kind] if spec.shares_kv else None,
        )  # fmt: skip
        if spec.kind in self.shared and not spec.shares_kv:
            self.kept[spec.kind] = kv
        return x, entry
