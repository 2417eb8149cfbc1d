# SPDX-License-Identifier: Apache-2.0
"""Attention by XLA and by kernels: memory per chip and compile time on TPU and GPU.

    python benchmarks/attention.py layer logps gradient vision --topology v5e:2x4 --length 2048 8192
    python benchmarks/attention.py layer forward --topology h200:1 --implementation xla triton

Compiles ahead of time, with the real compiler and shapes, and runs nothing; needs no chip, but the
extra `aot`, or for GPUs `aot-gpu`. One row of tokens a chip on fsdp alone, bfloat16, with segments.
The programs:

    layer     gradient of one attention of E2B for queries, keys and values, sliding and full
    forward   that attention alone
    logps     per_token_logps of E2B, layers stacked
    gradient  next_token_loss of E2B and its gradient for adapters of rank 16 on every projection,
              layers stacked, decoder remat
    pairs     compiles nothing: pairs of tokens that meet in one attention of E2B, over all pairs
    vision    gradient of one layer of E2B's tower for its input, one image of 280 soft tokens
              (2,520 patches) a chip; `xla` is a block of queries at a time, `dense` all at once

What it printed is in docs/explanation/attention.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tunix_gemma4 import LoraConfig, ModelConfig, apply_lora, sharding
from tunix_gemma4.config import LayerSpec
from tunix_gemma4.losses import next_token_loss, per_token_logps
from tunix_gemma4.model import attention
from tunix_gemma4.model.blockwise import block_pairs
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration, stack_layers
from tunix_gemma4.model.kernels import splash
from tunix_gemma4.model.masks import AttentionMask
from tunix_gemma4.model.vision import VisionLayer
from tunix_gemma4.planning.hardware import hardware

PROGRAMS = ("layer", "forward", "logps", "gradient", "pairs", "vision")
PATCHES = 2520


def make_config(implementation: str, **fields) -> ModelConfig:
    return ModelConfig.from_hf(
        ModelConfig.gemma4_e2b().source,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat_config="decoder",
        attention_implementation=implementation,
        **fields,
    )


def rows(mesh: Mesh, *shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """One row per chip."""
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    return jax.ShapeDtypeStruct((mesh.size, *shape), dtype, sharding=where)


def placed(model: nnx.Module, mesh: Mesh):
    graphdef, state = nnx.split(model)
    return graphdef, sharding.shapes_on(state, mesh)


def lower_layer(config: ModelConfig, mesh: Mesh, length: int, spec: LayerSpec, *, backward: bool):
    heads = (config.num_attention_heads, spec.num_kv_heads, spec.num_kv_heads)
    arrays = [rows(mesh, length, count, spec.head_dim) for count in heads]

    def forward(q, k, v, segments):
        mask = AttentionMask(segments=segments, window=spec.window, own=0)
        return attention.attend(config, q, k, v, mask)

    def loss(*inputs):
        return jnp.square(forward(*inputs).astype(jnp.float32)).sum()

    function = jax.value_and_grad(loss, (0, 1, 2)) if backward else forward
    return jax.jit(function).lower(*arrays, rows(mesh, length, dtype=jnp.int32))


def lower_logps(config: ModelConfig, mesh: Mesh, length: int):
    model = nnx.eval_shape(lambda: Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
    graphdef, state = placed(stack_layers(model), mesh)

    def logps(state, tokens, segments):
        model = nnx.merge(graphdef, state)
        hidden, _ = model(tokens, segment_ids=segments, skip_lm_head=True)
        return per_token_logps(model, hidden[:, :-1], tokens[:, 1:])

    tokens = rows(mesh, length, dtype=jnp.int32)
    return jax.jit(logps).lower(state, tokens, tokens)


def lower_gradient(config: ModelConfig, mesh: Mesh, length: int):
    model = nnx.eval_shape(lambda: Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
    graphdef, state = placed(stack_layers(apply_lora(model, LoraConfig(rank=16))), mesh)

    def step(state, tokens, segments):
        def loss(model):
            return next_token_loss(model, tokens, tokens, segment_ids=segments)

        find = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))
        return find(nnx.merge(graphdef, state))

    tokens = rows(mesh, length, dtype=jnp.int32)
    return jax.jit(step).lower(state, tokens, tokens)


def lower_vision(mesh: Mesh):
    config = make_config("xla", text_only=False)
    model = nnx.eval_shape(lambda: VisionLayer(config, rngs=nnx.Rngs(0)))
    graphdef, state = placed(model, mesh)
    half = config.vision_config.head_dim // 4

    def loss(x, state, angles, valid):
        by_axis = ((angles, angles), (angles, angles))
        out = nnx.merge(graphdef, state)(x, by_axis, valid)
        return jnp.square(out.astype(jnp.float32)).sum()

    x = rows(mesh, PATCHES, config.vision_config.hidden_size)
    angles = rows(mesh, PATCHES, half, dtype=jnp.float32)
    valid = rows(mesh, PATCHES, dtype=jnp.bool_)
    return jax.jit(jax.grad(loss)).lower(x, state, angles, valid)


def pairs(spec: LayerSpec, length: int, implementation: str) -> float:
    """Pairs of tokens that meet, over all pairs; `length` is a multiple of the blocks'."""
    if implementation == "xla":
        block = 2 * attention.BLOCK if spec.window is None else attention.BLOCK
        mask = AttentionMask(window=spec.window, own=0)
        found = block_pairs(mask, block, length, length)
        return found.queries * found.keys * len(found.starts) / length**2
    kernel = splash.make_kernel(length, 1, spec.window, splash.BLOCKS[0])
    blocks = np.asarray(kernel.fwd_mask_info.block_mask)
    return np.count_nonzero(blocks) * (splash.BLOCKS[0] / length) ** 2


def report(name: str, mesh: Mesh, lower) -> None:
    """Prints a line. Compile time is of this machine; all else is the compiler's own."""
    start = time.process_time()
    with mesh:
        compiled = lower().compile()
    seconds = time.process_time() - start
    memory = compiled.memory_analysis()
    print(
        f"{name:<40} temp {memory.temp_size_in_bytes / 1e9:7.3f} GB"
        f"  arguments {memory.argument_size_in_bytes / 1e9:6.2f} GB"
        f"  compiled in {seconds:6.1f} s of CPU",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", nargs="+", choices=PROGRAMS)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--length", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--implementation", nargs="+", default=["xla", "splash"])
    arguments = parser.parse_args()
    implementations = arguments.implementation
    devices = np.array(hardware(arguments.topology).devices())
    mesh = Mesh(devices.reshape(-1, 1), ("fsdp", "tp"))
    lowerings = {"logps": lower_logps, "gradient": lower_gradient}
    for program in arguments.program:
        name = f"{arguments.topology} {program}"
        if program == "vision":
            lower = functools.partial(lower_vision, mesh)
            report(f"{name} xla", mesh, lower)
            kept, attention.BLOCK = attention.BLOCK, PATCHES
            report(f"{name} dense", mesh, lower)
            attention.BLOCK = kept
            continue
        for length, implementation in itertools.product(arguments.length, implementations):
            config = make_config(implementation)
            what = f"{length} {implementation}"
            if program in lowerings:
                lower = functools.partial(lowerings[program], config, mesh, length)
                report(f"{name} {what}", mesh, lower)
                continue
            for spec in config.layers[3:5]:  # A sliding one and a full one.
                if program == "pairs":
                    share = pairs(spec, length, implementation)
                    print(f"pairs {spec.kind} {what:<30} {share:.3f}", flush=True)
                else:
                    lower = functools.partial(
                        lower_layer, config, mesh, length, spec, backward=program == "layer"
                    )
                    report(f"{name} {spec.kind} {what}", mesh, lower)


if __name__ == "__main__":
    main()
