# SPDX-License-Identifier: Apache-2.0
"""The splash kernel, compiled forward and backward by the real TPU compiler at the real sizes."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tunix_gemma4 import ModelConfig
from tunix_gemma4.model.attention import attend_rows
from tunix_gemma4.model.masks import Visibility
from tunix_gemma4.planning.hardware import hardware

mesh = Mesh(np.array(hardware("v5e:2x4").devices()).reshape(4, 2), ("fsdp", "tp"))
rows = NamedSharding(mesh, P("fsdp"))
config = getattr(ModelConfig, "gemma4_{size}")()
config.attention_implementation = "splash"
for spec in config.layers[:6]:
    if spec.kind == "sliding" and spec.index:
        continue
    heads = (config.num_attention_heads, spec.num_kv_heads, spec.num_kv_heads)
    arrays = [
        jax.ShapeDtypeStruct((4, 2048, count, spec.head_dim), jnp.{dtype}, sharding=rows)
        for count in heads
    ]
    segments = jax.ShapeDtypeStruct((4, 2048), jnp.int32, sharding=rows)

    def loss(q, k, v, segments):
        out = attend_rows(config, q, k, v, Visibility(None, segments, None), spec.window)
        return jnp.square(out.astype(jnp.float32)).sum()

    with mesh:
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, segments).compile()
    print("kernels", spec.head_dim, spec.window, compiled.as_text().count("tpu_custom_call"))
"""


@pytest.mark.parametrize(
    ("size", "dtype", "layers"),
    [
        ("e2b", "bfloat16", ["256 512", "512 None"]),
        ("e2b", "float32", ["256 512", "512 None"]),
        ("31b", "bfloat16", ["256 1024", "512 None"]),
    ],
)
def test_the_kernel_compiles_for_eight_tpu_chips(size, dtype, layers):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    program = _PROGRAM.replace("{size}", size).replace("{dtype}", dtype)
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("kernels")]
    # Forward, keys and values, queries.
    assert lines == [f"kernels {layer} 3" for layer in layers]
