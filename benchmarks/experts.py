# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer of 26B-A4B: XLA's ragged products, and blocks of one expert each.

    python benchmarks/experts.py --topology v5e:2x4

Compiles ahead of time the mix of experts for one row of 2,048 tokens a chip, bfloat16, on fsdp
alone, and its gradient for tokens and weights of the mix; needs no chip, but the extra `aot`, or
for GPUs `aot-gpu`. Temporaries are the compiler's. So are the operations of `ragged`, which has no
loop (the GPU's compiler does not say); those of `blocks` are counted in the jaxpr for balanced
routing.

What it printed is in docs/how-to/shard.md.
"""

from __future__ import annotations

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tunix_gemma4 import ModelConfig
from tunix_gemma4.model.layers import gelu
from tunix_gemma4.model.moe import expert_mix
from tunix_gemma4.planning.hardware import hardware
from tunix_gemma4.planning.measure import count_flops
from tunix_gemma4.sharding import constrain

LENGTH = 2048


def ragged_mix(x, weights, indices, gate_up, down):
    """The same as `expert_mix`."""
    top_k = indices.shape[-1]
    order = jnp.argsort(indices.reshape(-1), stable=True)
    sizes = jnp.bincount(indices.reshape(-1), length=len(down)).astype(jnp.int32)
    rows = x.reshape(-1, x.shape[-1])[order // top_k]
    gate, up = jnp.split(jax.lax.ragged_dot(rows, gate_up, sizes), 2, axis=-1)
    out = jax.lax.ragged_dot(gelu(gate) * up, down, sizes)
    out = jnp.zeros_like(out).at[order].set(out).reshape(*indices.shape, -1)
    return (out * weights[..., None].astype(out.dtype)).sum(axis=-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x4")
    devices = hardware(parser.parse_args().topology).devices()
    mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"))
    config = ModelConfig.gemma4_26b_a4b()
    size, width, count = config.hidden_size, config.moe_intermediate_size, config.num_experts

    def shape(*sizes, dtype=jnp.bfloat16, axes=("fsdp",)):
        where = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    rows = mesh.size, LENGTH
    tokens = shape(*rows, size)
    weights = shape(*rows, config.top_k_experts, dtype=jnp.float32)
    indices = shape(*rows, config.top_k_experts, dtype=jnp.int32)
    # As each stores them: a part of every expert, and whole experts.
    parts = (None, "fsdp"), (None, None, "fsdp")
    for name, mix, axes in (("ragged", ragged_mix, parts), ("blocks", expert_mix, [("fsdp",)] * 2)):
        matrices = [
            shape(count, *sizes, axes=where)
            for sizes, where in zip(((size, 2 * width), (width, size)), axes, strict=True)
        ]

        def forward(x, weights, indices, *matrices, mix=mix):
            return constrain(mix(x, weights, indices, *matrices), "batch", None, None)

        def gradient(x, weights, *rest, forward=forward):
            out, pull = jax.vjp(lambda *xs: forward(*xs, *rest), x, weights)
            return pull(out)

        for what, function in (("forward", forward), ("gradient", gradient)):
            with mesh:
                traced = jax.jit(function).trace(tokens, weights, indices, *matrices)
                compiled = traced.lower().compile()
            if name == "ragged":
                flops = (compiled.cost_analysis() or {}).get("flops", float("nan"))
            else:
                flops = count_flops(traced.jaxpr) / mesh.size
            temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e9
            print(f"{name} {what:<9} temporaries {temporaries:6.2f} GB  {flops:.2e} FLOP a chip")


if __name__ == "__main__":
    main()
