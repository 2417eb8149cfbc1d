# SPDX-License-Identifier: Apache-2.0
"""Layers stacked, so that one compiled block serves them all.

A released decoder repeats one block: four or five sliding layers and a full one. Stacked, the
sliding layers are one module and the full ones another, whose parameters have leading axes for the
block and the layer in it, and the decoder is a loop over blocks. So is the vision tower, whose
layers are all alike. Equal layers are then compiled once: of E2B's 35 the compiler sees four.

Checkpoints, adapters and LoRA targets speak of single layers, `layers.3.self_attn.q_proj`. They
are loaded, added and saved on a model that is not stacked; `gemma4.stack_layers` and
`unstack_layers` lead from one form to the other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from ..config import LayerSpec
from ..sharding import is_variable
from .layers import HasBuffers


class BlockPattern(NamedTuple):
    """Consecutive layers that are equal blocks; a block is groups of equal layers in a row.

    Attributes:
        first: index of the first layer.
        layers_per_block: of each group, in order.
        blocks: how many there are.
    """

    first: int
    layers_per_block: tuple[int, ...]
    blocks: int

    @property
    def end(self) -> int:
        """Index behind the last layer."""
        return self.first + sum(self.layers_per_block) * self.blocks

    def indices(self, group: int) -> list[int]:
        """Layers of a group, counted from the first, block by block."""
        size, start = sum(self.layers_per_block), sum(self.layers_per_block[:group])
        numbers = range(start, start + self.layers_per_block[group])
        return [block * size + number for block in range(self.blocks) for number in numbers]


def block_patterns(layers: tuple[LayerSpec, ...]) -> list[BlockPattern]:
    """The smallest blocks that repeat to give `layers`: those with keys of their own, then others.

    Layers that others read keys and values from are all in the last block of their pattern, since
    a loop over blocks leaves what its last round made.
    """
    sources = {spec.kv_from for spec in layers if spec.shares_kv}
    own = sum(not spec.shares_kv for spec in layers)
    found = []
    for first, end in ((0, own), (own, len(layers))):
        # Two layers are equal if they differ in nothing but where they stand.
        part = [dataclasses.replace(spec, index=0, kv_from=0) for spec in layers[first:end]]
        for size in range(1, len(part) + 1):
            block = part[:size]
            repeats = len(part) % size == 0 and part == block * (len(part) // size)
            in_last = all(index >= end - size for index in sources if index >= first)
            if repeats and (in_last or first == own):
                groups = tuple(len(list(group)) for _, group in itertools.groupby(block))
                found.append(BlockPattern(first, groups, len(part) // size))
                break
    return found


class LayerStack(nnx.Module):
    """The layers of a `BlockPattern`: one module for each group of its block.

    Attributes:
        pattern: which layers these are.
        layers: one for each group; its parameters have [blocks, layers of the group] as leading
            axes.
        buffers: of each group, the values of every buffer, layer by layer.
    """

    def __init__(self, pattern: BlockPattern, layers: list[Any]):
        self.pattern = pattern
        count = len(pattern.layers_per_block)
        groups = [[layers[i] for i in pattern.indices(group)] for group in range(count)]
        # Whoever holds a single layer holds its arrays too: what is stacked must be let go.
        layers.clear()
        of_groups = [map(_buffers, group) for group in groups]
        self.buffers = tuple(tuple(zip(*layers, strict=True)) for layers in of_groups)
        self.layers: Any = nnx.List([_stack(pattern, *one) for one in enumerate(groups)])

    def scan(
        self, body: Callable[[Any, Any, Any], Any], carry: Any, extras: Any = None, *, dtype: Any
    ) -> Any:
        """`carry` after `body(layer, carry, extra)` gave the next for every layer in order.

        Two loops, one in the other: over blocks, and in each group over its layers. A compiler
        sees each group's layer once. Of `extras` [layers, ...], if given, each layer gets its own;
        `dtype` is that of buffers.
        """
        blocks, counts = self.pattern.blocks, self.pattern.layers_per_block
        of_groups = [None] * len(counts)
        if extras is not None:
            # Cut as the parameters are: by blocks first, which are alike, then by groups.
            extras = extras.reshape(blocks, -1, *extras.shape[1:])
            of_groups = jnp.split(extras, list(itertools.accumulate(counts))[:-1], axis=1)
        # Numbers of Python in a single layer; in a loop each round has its own, so arrays.
        array = lambda values: jnp.array(values, dtype).reshape(blocks, -1)  # noqa: E731
        buffers = [list(map(array, group)) for group in self.buffers]
        states = [nnx.state(layer) for layer in self.layers]

        def block(carry: Any, of_block: Any) -> tuple[Any, None]:
            for layer, of_group in zip(self.layers, of_block, strict=True):

                def single(carry: Any, xs: Any, layer: nnx.Module = layer) -> tuple[Any, None]:
                    state, buffers, extra = xs
                    # Merged anew in each round: a module that outlived it would leak tracers.
                    module = nnx.merge(nnx.graphdef(layer), state)
                    _set_buffers(module, buffers)
                    return body(module, carry, extra), None

                carry, _ = jax.lax.scan(single, carry, of_group)
            return carry, None

        xs = list(zip(states, buffers, of_groups, strict=True))
        return jax.lax.scan(block, carry, xs)[0]

    def unstacked(self, specs: tuple[LayerSpec, ...] | None = None) -> list[Any]:
        """The layers one by one, with slices of the parameters; `specs` are the decoder's."""
        found: dict[int, Any] = {}
        for group, layer in enumerate(self.layers):
            graphdef, state = nnx.split(layer)
            count = self.pattern.layers_per_block[group]
            for number, index in enumerate(self.pattern.indices(group)):
                single = nnx.merge(graphdef, _unstack(state, divmod(number, count)))
                _set_buffers(single, [values[number] for values in self.buffers[group]])
                if specs is not None:
                    _name(single, specs[self.pattern.first + index])
                found[index] = single
        # Groups take turns in the decoder, so one after the other is not its order.
        return [found[index] for index in sorted(found)]


def _name(layer: Any, spec: LayerSpec) -> None:
    """Tells a decoder layer which one it is."""
    layer.spec = layer.self_attn.spec = spec


def _buffer_names(layer: nnx.Module) -> list[tuple[nnx.Module, str]]:
    """Where the buffers of `layer` are, always in the same order."""
    return [
        (module, name)
        for _, module in nnx.iter_modules(layer)
        if isinstance(module, HasBuffers)
        for name in module.buffer_shapes()
    ]


def _buffers(layer: nnx.Module) -> list[float]:
    return [getattr(module, name) for module, name in _buffer_names(layer)]


def _set_buffers(layer: nnx.Module, values: list[Any]) -> None:
    for (module, name), value in zip(_buffer_names(layer), values, strict=True):
        setattr(module, name, value)


def _stack(pattern: BlockPattern, group: int, layers: list[Any]) -> nnx.Module:
    """One module from the equal ones of a group."""
    # Before they are compared, all get the buffers and the name of the first: these are static
    # attributes, and would make equal layers differ.
    buffers, spec = _buffers(layers[0]), getattr(layers[0], "spec", None)
    for layer in layers:
        _set_buffers(layer, buffers)
        if spec is not None:
            _name(layer, spec)
    graphdefs, states = zip(*(nnx.split(layer) for layer in layers), strict=True)
    indices = [pattern.first + index for index in pattern.indices(group)]
    for index, graphdef in zip(indices, graphdefs, strict=True):
        if graphdef != graphdefs[0]:
            raise ValueError(
                f"layers {indices[0]} and {index}: they cannot be stacked, because they differ in "
                "more than their values, as adapters on some layers alone make them. Leave the "
                "layers as they are (scan_layers: false)"
            )
    layers.clear()
    axes = (pattern.blocks, pattern.layers_per_block[group])
    stacked = _stack_values(axes, [jax.tree.leaves(state) for state in states])
    variables, structure = jax.tree.flatten(states[0], is_leaf=is_variable)
    both = zip(variables, stacked, strict=True)
    variables = [_with_axes(*pair, lambda names: (None, None, *names)) for pair in both]
    return nnx.merge(graphdefs[0], jax.tree.unflatten(structure, variables))


def _stack_values(axes: tuple[int, int], layers: list[list[Any]]) -> list[Any]:
    """[*axes, ...] of every parameter, each placed as those of the layers are.

    One program for all of them: reading dozens from the compilation cache takes longer.
    """

    def stack(layers: list[list[jax.Array]]) -> list[jax.Array]:
        return [jnp.stack(xs).reshape(*axes, *xs[0].shape) for xs in zip(*layers, strict=True)]

    def stacked(value: jax.Array) -> NamedSharding | None:
        where = getattr(value, "sharding", None)
        if not isinstance(where, NamedSharding):
            return None
        return NamedSharding(where.mesh, PartitionSpec(None, None, *where.spec))

    if isinstance(layers[0][0], jax.ShapeDtypeStruct):
        return jax.eval_shape(stack, layers)
    if isinstance(layers[0][0], Tracer):
        return stack(layers)
    # The compiler would else put what it makes anew wherever it likes.
    return jax.jit(stack, out_shardings=list(map(stacked, layers[0])))(layers)


def _unstack(state: nnx.State, index: tuple[int, int]) -> nnx.State:
    def one(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_raw_value()
        if isinstance(value, jax.ShapeDtypeStruct):
            value = jax.ShapeDtypeStruct(value.shape[2:], value.dtype)
        else:
            value = value[index]
        return _with_axes(variable, value, lambda names: names[2:])

    return jax.tree.map(one, state, is_leaf=is_variable)


def _with_axes(variable: nnx.Variable, value: Any, change: Callable) -> nnx.Variable:
    """`variable` with another value and, in its metadata, other mesh axes."""
    metadata = variable.get_metadata()
    if metadata.get("out_sharding") is not None:
        metadata["out_sharding"] = change(tuple(metadata["out_sharding"]))
    return type(variable)(value, **metadata)


def stacked_axes(path: tuple[Any, ...]) -> int:
    """How many axes stacking has put before those of the parameter at `path` of a state."""
    return 2 * any(getattr(key, "key", None) in ("stack", "stacks") for key in path)
