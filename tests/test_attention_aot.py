# SPDX-License-Identifier: Apache-2.0
"""The kernels, compiled forward and backward by the real compilers at the real sizes."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

_PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tunix_gemma4 import ModelConfig
from tunix_gemma4.model.attention import attend
from tunix_gemma4.model.masks import AttentionMask
from tunix_gemma4.planning.hardware import hardware

mesh = Mesh(np.array(hardware("{topology}").devices()).reshape(4, 2), ("fsdp", "tp"))
rows = NamedSharding(mesh, P("fsdp"))
config = getattr(ModelConfig, "gemma4_{size}")()
config.use_flash_attention = True
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
        ahead = {images} and spec.window is not None
        images = segments if ahead else None
        mask = AttentionMask(None, segments, images, spec.window, own=0, looks_ahead=ahead)
        out = attend(config, q, k, v, mask)
        return jnp.square(out.astype(jnp.float32)).sum()

    with mesh:
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, segments).compile()
    kernels = compiled.as_text().count("{call}")
    print("kernels", spec.head_dim, spec.window, kernels)
"""


def compiled_layers(**names) -> list[str]:
    """A line about each kind of layer."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    program = _PROGRAM
    for name, value in names.items():
        program = program.replace(f"{{{name}}}", str(value))
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return [line for line in run.stdout.splitlines() if line.startswith("kernels")]


_SIZES = pytest.mark.parametrize(
    ("size", "dtype", "layers"),
    [
        ("e2b", "bfloat16", ["256 512", "512 None"]),
        ("e2b", "float32", ["256 512", "512 None"]),
        ("31b", "bfloat16", ["256 1024", "512 None"]),
    ],
)


@_SIZES
def test_splash_compiles_for_eight_tpu_chips(size, dtype, layers):
    names = {"topology": "v5e:2x4", "call": "tpu_custom_call", "images": False}
    # Forward, keys and values, queries.
    expected = [f"kernels {layer} 3" for layer in layers]
    assert compiled_layers(size=size, dtype=dtype, **names) == expected


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="no CUDA compiler: needs the extra `aot-gpu`",
)
@pytest.mark.parametrize("topology", ["h200:8", "a100:8"])
@_SIZES
def test_triton_compiles_for_eight_gpus(topology, size, dtype, layers):
    """Also where tokens of an image look both ways. The compiler refuses what does not fit."""
    names = {"topology": topology, "call": "__gpu$xla.gpu.triton", "images": size == "31b"}
    expected = [f"kernels {layer} 1" for layer in layers]
    assert compiled_layers(size=size, dtype=dtype, **names) == expected
