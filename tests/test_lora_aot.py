# SPDX-License-Identifier: Apache-2.0
"""What QLoRA costs on a TPU, by the real compiler."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

_STEP = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, Mesh, PartitionSpec as P
from tunix_gemma4 import LoraConfig, apply_lora
from tunix_gemma4.planning.hardware import hardware

LAYERS, SIZE = 8, 2048

class Stack(nnx.Module):
    def __init__(self):
        kinds = {"use_bias": False, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.layers = nnx.List(
            [nnx.Linear(SIZE, SIZE, **kinds, rngs=nnx.Rngs(i)) for i in range(LAYERS)]
        )
    def __call__(self, x):
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        return x

config = LoraConfig(rank=8, targets=r"layers\\..*", quantize="nf4")
graphdef, state = nnx.split(apply_lora(nnx.eval_shape(Stack), config))
devices = hardware("v5e:2x4").devices()
place = NamedSharding(Mesh(np.array(devices)[:1], ("fsdp",)), P())
abstract = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
state = jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype), state)

def step(state, x):
    loss = lambda model: jnp.mean(jnp.square(model(x).astype(jnp.float32)))
    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(nnx.merge(graphdef, state))

compiled = jax.jit(step).lower(state, abstract((64, SIZE), jnp.bfloat16)).compile()
memory = compiled.memory_analysis()
print("figures", memory.argument_size_in_bytes, memory.temp_size_in_bytes)
"""


def test_4_bit_kernels_are_stored_in_4_bits_and_never_all_dequantised_at_once():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    run = subprocess.run(
        [sys.executable, "-c", _STEP], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    figures = next(line for line in run.stdout.splitlines() if line.startswith("figures"))
    arguments, temporaries = map(int, figures.split()[1:])
    kernels = 8 * 2048 * 2048 * 2  # In bfloat16.
    # 4 bits, and one float32 scale per 64 input features.
    assert arguments < kernels * (4.5 / 16 + 0.03)
    # Kept for the backward pass, the dequantised kernels took more than half of this.
    assert temporaries < kernels / 4
