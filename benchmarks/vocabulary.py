# SPDX-License-Identifier: Apache-2.0
"""Memory of a step with the vocabulary tables spread over every chip, and over `tp` alone.

    python benchmarks/vocabulary.py

Compiles, for eight CPU devices that it pretends to have, a gradient step and the log-probabilities
of a model with E2B's widths and two layers, 8 rows of 1,024 tokens; runs neither. Prints bytes of
temporaries per device by `memory_analysis()`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tunix_gemma4 import Gemma4ForConditionalGeneration, ModelConfig, losses, sharding

ROWS, LENGTH = 8, 1024
SHAPES = ((8, 1), (4, 2))


def compiled(mesh, step, spread):
    """`step(model, tokens)` compiled for `mesh`."""
    config = ModelConfig.from_hf(
        ModelConfig.gemma4_e2b().source,
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        remat_config="decoder",
    )
    sharding._MESH_AXIS["vocab"] = ("fsdp", "tp") if spread else "tp"
    model = nnx.eval_shape(lambda: Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    state = sharding.shapes_on(state, mesh)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=rows)
    with jax.set_mesh(mesh):
        return jax.jit(lambda s, t: step(nnx.merge(graphdef, s), t)).lower(state, tokens).compile()


def gradient(model, tokens):
    return nnx.grad(lambda model: losses.next_token_loss(model, tokens, tokens))(model)


def logps(model, tokens):
    hidden, _ = model(tokens, skip_lm_head=True)
    return losses.per_token_logps(model, hidden[:, :-1], tokens[:, 1:])


def main():
    print(f"{'mesh fsdp x tp':<16}{'step':<12}{'over tp':>10}{'over all':>10}   GB per device")
    for shape in SHAPES:
        mesh = jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
        for step in (gradient, logps):
            sizes = [
                compiled(mesh, step, spread).memory_analysis().temp_size_in_bytes / 1e9
                for spread in (False, True)
            ]
            name = f"{shape[0]} x {shape[1]}"
            print(f"{name:<16}{step.__name__:<12}{sizes[0]:>10.2f}{sizes[1]:>10.2f}")


if __name__ == "__main__":
    main()
