# SPDX-License-Identifier: Apache-2.0
"""The training step, compiled by the real TPU compiler for a mesh that is not here.

Real widths, vocabulary and image budget of E2B; four decoder layers, one of each kind and one of
each kind that shares keys and values, and two vision layers.
"""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

_STEP = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tunix_gemma4 import ModelConfig, Gemma4ForConditionalGeneration, losses, sharding

source = ModelConfig.gemma4_e2b().source
source["vision_config"]["num_hidden_layers"] = 2
config = ModelConfig.from_hf(
    source, text_only=False, num_hidden_layers=4, num_kv_shared_layers=2,
    layer_types=["sliding_attention", "full_attention"] * 2, remat_config="decoder",
)
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = Mesh(np.array(devices).reshape({shape}), ("fsdp", "tp"))
model = nnx.eval_shape(lambda: Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
graphdef, state = nnx.split(model)
shardings = sharding.param_shardings(state, mesh)
place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
state = jax.tree.map(place, state, shardings)
rows = NamedSharding(mesh, P("fsdp"))
tokens = jax.ShapeDtypeStruct(({batch}, 1024), jnp.int32, sharding=rows)
images = jax.ShapeDtypeStruct(({batch}, 1, 2520, 770), jnp.float32, sharding=rows)

def step(state, tokens, images):
    def loss(state):
        return losses.next_token_loss(
            nnx.merge(graphdef, state), tokens, tokens, images=images, segment_ids=tokens
        )
    return jax.value_and_grad(loss)(state)

with mesh:
    compiled = jax.jit(step, out_shardings=(None, shardings)).lower(state, tokens, images).compile()
parameters = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
memory = compiled.memory_analysis()
print("parameters", parameters)
print("arguments", memory.argument_size_in_bytes)
print("temporaries", memory.temp_size_in_bytes)
"""


@pytest.mark.parametrize("shape", [(8, 1), (4, 2)], ids=["fsdp8", "fsdp4_tp2"])
def test_the_training_step_compiles_for_eight_tpu_chips(shape):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "XLA_FLAGS": "",
    }
    program = _STEP.replace("{shape}", str(shape)).replace("{batch}", "8")
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    figures = {
        name: int(value) for name, value in (line.split() for line in run.stdout.splitlines())
    }
    # The parameters are spread over all eight chips, but for what does not divide.
    images = 8 * 2520 * 770 * 4 / shape[0]
    assert figures["arguments"] < figures["parameters"] / 8 * 1.02 + images * 1.1
    # One float32 copy of the logits of a chip's rows would be 8 * 1024 MiB / fsdp, and a plain
    # loss holds five of them.
    assert figures["temporaries"] < 2 * 8 * 1024 * 2**20 / shape[0]
