# SPDX-License-Identifier: Apache-2.0
"""Memory of the GRPO step of Tunix 0.1.7's own Gemma 4, beside case `grpo-2048-v5p` of memory.py.

    python benchmarks/grpo_peer.py

E2B, bfloat16, LoRA of rank 16 on all projections, decoder remat, AdamW; 8 rows of 1,024 prompt and
1,024 completion tokens, fsdp 8; the host's trainer, loss and log-probabilities as they are,
compiled by the TPU's compiler, which is not here. Where that refuses, its own message is printed.
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from compile_time import RANK, RATE, place
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma4 import model as gemma4
from tunix.rl.grpo.grpo_learner import TrainExample

from tunix_gemma4.planning.hardware import hardware
from tunix_gemma4.plugin.rl.cluster import make_trainer
from tunix_gemma4.settings.grpo import GrpoRunConfig

ROWS, LENGTH = 8, 1024
TOPOLOGY = "v5p:2x2x2"


def example(mesh: Mesh) -> TrainExample:
    """What the host's learner hands its trainer."""
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=where)
    return TrainExample(
        prompt_ids=ids,
        prompt_mask=ids,
        completion_ids=ids,
        completion_mask=ids,
        advantages=jax.ShapeDtypeStruct((ROWS,), jnp.float32, sharding=where),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )


def main() -> None:
    mesh = Mesh(np.array(hardware(TOPOLOGY).devices()).reshape(8, 1), ("fsdp", "tp"))
    config = gemma4.ModelConfig.gemma4_e2b()
    config.dtype = config.param_dtype = jnp.bfloat16
    targets = "q_einsum|kv_einsum|k_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj"
    provider = qwix.LoraProvider(module_path=f".*({targets})", rank=RANK, alpha=RANK)
    settings = GrpoRunConfig(num_generations=ROWS, batch_size=1)
    made = []

    def build() -> tuple[nnx.Module, nnx.Optimizer]:
        model = gemma4.Gemma4(config, rngs=nnx.Rngs(0))
        model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
        made.append(make_trainer(model, optax.adamw(RATE), settings, pad_id=0, eos_id=1))
        return model, made[0].optimizer

    model, optimizer = nnx.eval_shape(build)
    # With remat the adapters could not be added.
    config.remat_config = gemma4.RematConfig.DECODER
    place(model, mesh)
    place(optimizer, mesh)
    step = nnx.jit(made[0].create_train_step_fn(), donate_argnames=("optimizer",))
    try:
        with mesh:
            compiled = step.lower(model, optimizer, example(mesh)).compile()
    except jax.errors.JaxRuntimeError as error:
        print(f"Tunix 0.1.7, GRPO step: {str(error).splitlines()[0]}")
        return
    memory = compiled.memory_analysis()
    print(f"Tunix 0.1.7, GRPO step: temporaries {memory.temp_size_in_bytes / 1e9:.2f} GB per chip")


if __name__ == "__main__":
    main()
