# SPDX-License-Identifier: Apache-2.0
"""The LoRA training step, compiled by the real TPU compiler for a mesh that is not here.

Real widths, vocabulary and image budget of E2B; four decoder layers, one of each kind and one of
each kind that shares keys and values, and one vision layer.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

_STEP = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tunix_gemma4 import (
    Gemma4ForConditionalGeneration, LoraConfig, ModelConfig, apply_lora, losses, sharding
)
from tunix_gemma4.planning.hardware import hardware

source = ModelConfig.gemma4_e2b().source
source["vision_config"]["num_hidden_layers"] = 1
config = ModelConfig.from_hf(
    source, text_only=False, num_hidden_layers=4, num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2, remat_config="decoder",
)
devices = hardware("v5e:2x4").devices()
mesh = Mesh(np.array(devices).reshape({shape}), ("fsdp", "tp"))
model = nnx.eval_shape(lambda: Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
graphdef, state = nnx.split(apply_lora(model, LoraConfig(targets="all")))
state = sharding.shapes_on(state, mesh)
rows = NamedSharding(mesh, P("fsdp"))
tokens = jax.ShapeDtypeStruct(({batch}, 1024), jnp.int32, sharding=rows)
images = jax.ShapeDtypeStruct(({batch}, 1, 2520, 770), jnp.float32, sharding=rows)

def step(state, tokens, images):
    def loss(model):
        return losses.next_token_loss(
            model, tokens, tokens, images=images, segment_ids=tokens
        )
    return nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(nnx.merge(graphdef, state))

with mesh:
    compiled = jax.jit(step).lower(state, tokens, images).compile()
parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
memory = compiled.memory_analysis()
print("figures", parameters, memory.argument_size_in_bytes, memory.temp_size_in_bytes)
"""


SHAPE = (4, 2)


def test_the_training_step_compiles_for_eight_tpu_chips():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    program = _STEP.replace("{shape}", str(SHAPE)).replace("{batch}", "8")
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("figures"))
    parameters, arguments, temporaries = map(int, line.split()[1:])
    # The parameters are spread over all eight chips, but for the few that only fsdp or tp divides.
    images = 8 * 2520 * 770 * 4 / SHAPE[0]
    assert arguments < parameters / 8 * 1.1 + images * 1.1
    # One float32 copy of the logits of a chip's rows would be 8 * 1024 MiB / fsdp, and a plain
    # loss holds five of them.
    assert temporaries < 8 * 1024 * 2**20 / SHAPE[0]
