# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts beside the dense MLP of 26B-A4B: each token pays for its own alone.

Pairs of a token and one of its experts are sorted by expert and met in blocks of one expert each,
in a loop as long as the routing makes it; XLA's own ragged product, compiled for TPU or GPU, has
every expert meet every token. On a mesh each chip runs the loop for its own experts over the tokens
of all chips, and what they give is summed: tokens travel, experts do not. No token is dropped,
however uneven the routing.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata

from ..config import ModelConfig
from ..sharding import constrain, map_shards, metadata
from .layers import RMSNorm, as_array, gelu, linear, over_chunks

# Pairs in a block; fewer where experts have fewer.
LARGEST_BLOCK, SMALLEST_BLOCK = 512, 8
# Of tokens' activations that every chip holds at once: 128 MiB in bfloat16.
MIX_ELEMENTS = 2**26


class Router(nnx.Module):
    """Chooses `top_k_experts` per token, in float32.

    Fed the raw residual, with a norm of its own. The softmax runs over all experts; the chosen
    weights are renormalised and only then scaled per expert, so they need not sum to 1.

    Source: transformers 5.12 `Gemma4TextRouter`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        size, (experts, self.top_k, _) = config.hidden_size, config.experts
        self.root = size**-0.5
        self.norm = RMSNorm(None, config=config)
        make: dict[str, Any] = {"config": config, "rngs": rngs, "dtype": jnp.float32}
        self.proj = linear(size, experts, axes=("embed", None), **make)
        ones = lambda count: jnp.ones((count,), config.param_dtype)  # noqa: E731
        self.scale = nnx.Param(ones(size), **metadata(None))
        self.per_expert_scale = nnx.Param(ones(experts), **metadata(None))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., D] to weights float32 and expert indices int32, both [..., top_k]."""
        x = self.norm(x.astype(jnp.float32)) * self.scale[...].astype(jnp.float32) * self.root
        probabilities = jax.nn.softmax(self.proj(x), axis=-1)
        weights, indices = jax.lax.top_k(probabilities, self.top_k)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights * self.per_expert_scale[...].astype(jnp.float32)[indices], indices


class Experts(nnx.Module):
    """All experts' gated MLPs; see `expert_mix`.

    `gate_up_proj` is [E, D, 2F], gate first; `down_proj` is [E, F, D]: HF's with the last two
    axes exchanged. On a mesh each chip holds some of the experts, whole.

    Source: transformers 5.12 `Gemma4TextExperts`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        size, (experts, _, width) = config.hidden_size, config.experts
        init = nnx.initializers.lecun_normal(batch_axis=(0,))

        def make(*shape: int) -> nnx.Param:
            value = init(rngs.params(), shape, config.param_dtype)
            return nnx.Param(value, **metadata("experts", None, None))

        self.gate_up_proj = make(experts, size, 2 * width)
        self.down_proj = make(experts, width, size)

    def __call__(self, x: jax.Array, weights: jax.Array, indices: jax.Array) -> jax.Array:
        """x [B, T, D], weights and indices [B, T, top_k] to [B, T, D]."""
        return expert_mix(x, weights, indices, self.gate_up_proj[...], self.down_proj[...])


@jax.custom_vjp
def expert_mix(
    x: jax.Array, weights: jax.Array, indices: jax.Array, gate_up: jax.Array, down: jax.Array
) -> jax.Array:
    """Sum over a token's experts of `weight * down(gelu(gate(x)) * up(x))`.

    Products are in the dtype of x [B, T, D], which the result has, sums and weights in float32. An
    expert is among a token's `indices` [B, T, top_k] once at most. Matrices are as in `Experts`.
    """

    def some(_, *rows):
        (out,) = _on_chips(_forward, rows, (gate_up, down), ())
        return None, out.astype(x.dtype)

    return over_chunks(some, _chunk_size(x), x, weights, indices)[1]


def _mix_forward(*primals):
    inputs = [primal.value for primal in primals]
    # A frozen expert gets no gradient.
    trained = () if primals[3].perturbed or primals[4].perturbed else None
    return expert_mix(*inputs), (inputs, trained)


def _mix_backward(saved, d_out):
    (x, weights, indices, gate_up, down), trained = saved

    def some(d_experts, *rows):
        d_x, d_weights, *d_experts = _on_chips(_backward, rows, (gate_up, down), d_experts)
        return tuple(d_experts), (d_x.astype(x.dtype), d_weights)

    d_experts = () if trained is None else (jnp.zeros_like(gate_up), jnp.zeros_like(down))
    rows = (x, weights, indices, as_array(d_out))
    d_experts, (d_x, d_weights) = over_chunks(some, _chunk_size(x), *rows, carry=d_experts)
    return d_x, d_weights, None, *(d_experts or (None, None))


expert_mix.defvjp(_mix_forward, _mix_backward, symbolic_zeros=True)


def _chunk_size(x: jax.Array) -> int:
    return max(1, MIX_ELEMENTS // (x.shape[0] * x.shape[2]))


def _on_chips(function, rows, experts, carry) -> list[jax.Array]:
    """`function` on every chip for its own experts and all rows; what it gives for rows, summed.

    It takes a `_Plan`, rows [tokens, ...], the chip's experts and its `carry`, and gives results
    for rows and then the next `carry`, which is like `experts` or nothing. Of `rows` [B, T, ...]
    the third are the experts of each.
    """
    shape, num_experts = rows[0].shape[:2], experts[0].shape[0]
    flat = [constrain(x.reshape(-1, x.shape[-1]), None, None) for x in rows]
    matrices = [*experts, *carry]

    def of_chip(ids, *arrays):
        matrices, rows = arrays[: -len(flat)], arrays[-len(flat) :]
        plan = _Plan.of(rows[2], ids, num_experts)
        results = function(plan, rows, matrices[: len(experts)], matrices[len(experts) :])
        ends = len(results) - len(carry)
        # A leading axis, split over chips: the sum over it is what brings chips' parts together.
        return *(x[None] for x in results[:ends]), *results[ends:]

    axes = [("experts",), *[("experts", None, None)] * len(matrices), *[(None, None)] * len(flat)]
    results = map_shards(of_chip, [jnp.arange(num_experts), *matrices, *flat], axes)
    ends = len(results) - len(carry)
    summed = [x.sum(axis=0).reshape(*shape, -1) for x in results[:ends]]
    return [*(constrain(x, "batch", None, None) for x in summed), *results[ends:]]


class _Plan(NamedTuple):
    """Which pairs of a token and one of a chip's experts meet in which block.

    Attributes:
        block: pairs in a block.
        top_k: experts of a token.
        order: int [pairs + block], the pairs sorted by expert.
        sizes: int [E], pairs of each expert.
        ends: int [E], those of all experts up to it.
        last: int [E], blocks of all experts up to it.
        trips: blocks if every expert had as many pairs.
    """

    block: int
    top_k: int
    order: jax.Array
    sizes: jax.Array
    ends: jax.Array
    last: jax.Array
    trips: int

    @classmethod
    def of(cls, indices: jax.Array, ids: jax.Array, num_experts: int) -> _Plan:
        """For `indices` [tokens, top_k] and a chip's experts `ids`, of `num_experts` in all."""
        count = ids.shape[0]
        mean = indices.size / num_experts
        block = 2 ** math.ceil(math.log2(max(mean, 1)))
        block = min(max(block, SMALLEST_BLOCK), LARGEST_BLOCK)
        own = indices.reshape(-1) - ids[0]
        # Pairs with other chips' experts sort behind all of this chip's, where no loop gets.
        own = jnp.where((own >= 0) & (own < count), own, count)
        sizes = jnp.bincount(own, length=count + 1)[:count].astype(jnp.int32)
        # Padded, so that the last block's slice does not start earlier than it should.
        order = jnp.pad(jnp.argsort(own, stable=True), (0, block))
        blocks = -(-sizes // block)
        trips = count * math.ceil(mean / block)
        shape = block, indices.shape[1]
        return cls(*shape, order, sizes, jnp.cumsum(sizes), jnp.cumsum(blocks), trips)

    def pairs(self, index: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Expert of a block, its pairs and their tokens; a pair that is none has no token."""
        # The first one whose blocks end behind this one.
        expert = (self.last <= index).sum()
        end, size = self.ends[expert], self.sizes[expert]
        before = self.last[expert] - -(-size // self.block)
        start = end - size + (index - before) * self.block
        places = jnp.arange(self.block)
        pairs = jax.lax.dynamic_slice_in_dim(self.order, start, self.block)
        # Beyond all rows, and each another one: rows written to are then unique.
        none = tokens + places
        return expert, pairs, jnp.where(start + places < end, pairs // self.top_k, none)

    def loop(self, step: Any, carry: Any) -> Any:
        """`carry` after `step(index, carry)` for every block."""
        # Says how long the loop is to who counts operations.
        with set_xla_metadata(trip_count=str(self.trips)):
            return jax.lax.fori_loop(0, self.last[-1], step, carry)


_dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def _read(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x.at[rows].get(mode="fill", fill_value=0)


def _add(x: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    return x.at[rows].add(values, mode="drop", unique_indices=True)


def _one(stacked: jax.Array, expert: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, expert, keepdims=False).astype(dtype)


def _gated(x: jax.Array) -> jax.Array:
    gate, up = jnp.split(x, 2, axis=-1)
    return gelu(gate) * up


def _forward(plan, rows, experts, carry):
    x, weights, _ = rows

    def step(index, out):
        expert, pairs, tokens = plan.pairs(index, x.shape[0])
        gate_up, down = (_one(matrix, expert, x.dtype) for matrix in experts)
        values = _dot(_gated(_dot(_read(x, tokens), gate_up).astype(x.dtype)), down)
        return _add(out, tokens, weights.reshape(-1)[pairs][:, None] * values)

    return (plan.loop(step, jnp.zeros(x.shape, jnp.float32)),)


def _backward(plan, rows, experts, carry):
    x, weights, _, d_rows = rows

    def step(index, carry):
        d_x, d_weights, *d_experts = carry
        expert, pairs, tokens = plan.pairs(index, x.shape[0])
        gate_up, down = (_one(matrix, expert, x.dtype) for matrix in experts)
        inputs, d_out = _read(x, tokens), _read(d_rows, tokens)
        weight = weights.reshape(-1)[pairs][:, None]
        inner, pull = jax.vjp(_gated, _dot(inputs, gate_up).astype(x.dtype))
        # An expert's answer is `inner @ down`; with `d_out` it makes the weight's gradient, which
        # is the same sum as `d_inner` with `inner`, so the answer is not made again.
        d_inner = _dot(d_out, down.T)
        d_weight = (d_inner * inner).sum(axis=-1)
        (d_gate_up,) = pull((weight * d_inner).astype(x.dtype))
        d_x = _add(d_x, tokens, _dot(d_gate_up, gate_up.T))
        # A weight belongs to one pair, so each is written once; none of them beyond all.
        pair_rows = jnp.where(tokens < x.shape[0], pairs, d_weights.size + tokens)
        d_weights = _add(d_weights, pair_rows, d_weight)
        if d_experts:
            scaled = (weight * d_out).astype(x.dtype)
            parts = _dot(inputs.T, d_gate_up), _dot(inner.T, scaled)
            sums = zip(d_experts, parts, strict=True)
            d_experts = [d.at[expert].add(part.astype(d.dtype)) for d, part in sums]
        return d_x, d_weights, *d_experts

    zeros = jnp.zeros(x.shape, jnp.float32), jnp.zeros(weights.size, jnp.float32)
    d_x, d_weights, *d_experts = plan.loop(step, (*zeros, *carry))
    return d_x, d_weights.reshape(weights.shape), *d_experts
