# SPDX-License-Identifier: Apache-2.0
"""How much memory loading and saving take beyond the model itself.

    python benchmarks/load_memory.py                 one device
    python benchmarks/load_memory.py --mesh 4,2      on eight fake CPU devices, fsdp 4 and tp 2

Writes a synthetic directory of at least 2 GB (random bfloat16, experts included, several files),
then loads it in a fresh process and saves it again. Anonymous memory of that process is sampled
from outside; pages mapped from the files are not counted, the system can drop them at any time.
Exits with 1 if loading or saving needs more, beyond what the process and the finished model take,
than the largest tensor and 10 % of the total.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_GIB = 2**30
_TEXT = {
    "vocab_size": 65_536,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 32,
    "top_k_experts": 4,
    "moe_intermediate_size": 512,
}


def write_directory(directory: Path) -> tuple[int, int]:
    """Writes the synthetic checkpoint; returns the bytes of its largest tensor and of all."""
    import ml_dtypes
    import numpy as np

    from tunix_gemma4.checkpoint import files, names as weights
    from tunix_gemma4.config import ModelConfig
    from tunix_gemma4.model.gemma4 import abstract_model

    raw = {"model_type": "gemma4", "dtype": "bfloat16", "text_config": _TEXT}
    model = abstract_model(ModelConfig.from_hf(raw))
    shapes = {
        name: weights.hf_shape(path, variable.get_raw_value().shape)
        for name, (path, variable) in weights.named_parameters(model).items()
    }
    shapes |= {name: buffer.shape for name, buffer in weights.named_buffers(model).items()}
    rng = np.random.default_rng(0)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def random(shape):
        bits = rng.integers(0, 2**16, shape, np.uint16)
        return (bits & 0xBFFF).view(bfloat16)  # Without the highest exponents: all below 2.

    tensors = [
        files.new_tensor(name, shape, bfloat16, lambda shape=shape: random(shape))
        for name, shape in shapes.items()
    ]
    directory.mkdir()
    files.write_tensors(directory, tensors, max_shard_bytes=10**9)
    (directory / "config.json").write_text(json.dumps(raw), "utf-8")
    sizes = [tensor.nbytes for tensor in tensors]
    return max(sizes), sum(sizes)


def run_child(directory: Path, target: Path, mesh_shape: tuple[int, int] | None) -> None:
    """Loads and saves, telling the parent when each begins and ends."""
    import jax
    from flax import nnx

    from tunix_gemma4.checkpoint import load_checkpoint, save_checkpoint

    mesh = None
    if mesh_shape is not None:
        axis_types = (jax.sharding.AxisType.Auto,) * 2
        mesh = jax.make_mesh(mesh_shape, ("fsdp", "tp"), axis_types=axis_types)
    jax.block_until_ready(jax.numpy.ones(8) * 2)  # Start the backend before the count begins.

    def tell(**message):
        print(json.dumps(message), flush=True)
        sys.stdin.readline()  # The parent has taken its sample.

    tell(phase="load")
    model = load_checkpoint(directory, mesh)
    leaves = jax.tree.leaves(nnx.state(model))
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    tell(phase="save", model_bytes=held)
    save_checkpoint(model, target, max_shard_bytes=10**9)
    tell(phase="end")


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process now."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def measure(command: list[str], environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """Runs the child; per phase: bytes at its start, its peak, seconds, and what it told."""
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        phases, current = {}, None
        while child.poll() is None:
            # Each message is one line, after which the child waits: none is left in the buffer.
            told, _, _ = select.select([child.stdout], [], [], 0.002)
            line = child.stdout.readline() if told else ""
            if line:
                message = json.loads(line)
                if current is not None:
                    current["seconds"] = time.monotonic() - current["began"]
                now = anonymous_bytes(child.pid)
                current = {"start": now, "peak": now, "began": time.monotonic(), **message}
                phases[message["phase"]] = current
                child.stdin.write("\n")
                child.stdin.flush()
            elif current is not None:
                try:
                    current["peak"] = max(current["peak"], anonymous_bytes(child.pid))
                except (TypeError, OSError):  # Gone between the poll and the reading.
                    break
        if child.wait() or "end" not in phases:
            raise SystemExit("the measured process failed")
    return phases


def report(name: str, *, start: int, finished: int, phase: dict[str, float], bound: int) -> bool:
    """Prints one phase; whether it kept within `bound`."""
    extra = phase["peak"] - start - finished
    print(
        f"{name}: {phase['seconds']:.1f} s, start {start / _GIB:.3f} GiB, finished model "
        f"{finished / _GIB:.3f}, peak {phase['peak'] / _GIB:.3f}, beyond both {extra / _GIB:.3f}, "
        f"bound {bound / _GIB:.3f}: {'within' if extra <= bound else 'OVER'}"
    )
    return extra <= bound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", help="fsdp,tp: load onto fake CPU devices, as in 4,2")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    mesh = tuple(map(int, arguments.mesh.split(","))) if arguments.mesh else None
    if arguments.child:
        run_child(*arguments.child, mesh)
        return 0
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if mesh:
        devices = f"--xla_force_host_platform_device_count={mesh[0] * mesh[1]}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {devices}".strip()
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        largest, total = write_directory(source)
        if total < 2 * 10**9:
            raise SystemExit(f"the directory holds {total:,} bytes; at least 2 GB are wanted")
        bound = largest + total // 10
        print(f"directory {total / _GIB:.3f} GiB, largest tensor {largest / _GIB:.3f} GiB")
        command = [sys.executable, __file__, "--child", str(source), str(target)]
        if arguments.mesh:
            command += ["--mesh", arguments.mesh]
        phases = measure(command, environment)
    start, finished = phases["load"]["start"], phases["save"]["model_bytes"]
    fine = [
        report(name, start=start, finished=finished, phase=phases[name], bound=bound)
        for name in ("load", "save")
    ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
