# SPDX-License-Identifier: Apache-2.0
"""Compile time of a LoRA step on TPU, beside Tunix 0.1.7's own model and trainer.

    taskset -c 1 python benchmarks/compile_time.py --size e2b

Compiles ahead of time, with the real TPU compiler and shapes, and runs nothing; needs no chip, but
the extra `aot`. Two sizes, bfloat16, rank 16 on all language projections, decoder remat, AdamW:

    e2b     4 rows of 2,048 tokens, v5p, fsdp 4
    31b     1 row of 3,072 tokens, v5p, tp 4

and three programs of each:

    stacked     the supervised recipe's step with layers stacked (`scan_layers: true`)
    unstacked   the same, layers as they are
    tunix       `PeftTrainer`'s step of `tunix.models.gemma4`, its default loss; remat is switched
                on once the adapters are there, because with it they cannot be added

Each is compiled in a process of its own, in turns, so that nothing is cached and all see the same
machine. Times are medians over the rounds: `build` of the abstract model with adapters, `lower` of
its step (tracing included), `compile`; then the processor's own seconds in all three, which other
programs disturb less. `temp` is the compiled program's memory of temporaries on one chip, `lines`
the length of the program that the compiler is given.

What has been measured is in docs/how-to/compile_time.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from memory import CASES

from tunix_gemma4.planning.hardware import hardware
from tunix_gemma4.sharding import shapes_on

PROGRAMS = ("stacked", "unstacked", "tunix")
# Of memory.py.
SIZES = {"e2b": CASES["lora-2048"], "31b": CASES["31b-lora-3072"]}
# Rows, tokens, fsdp, tp.
SHAPES = {"e2b": (4, 2048, 4, 1), "31b": (1, 3072, 1, 4)}
RANK, RATE = 16, 1e-4
TIMES = ("build", "lower", "compile", "cpu")

Program = tuple[Callable[[], jax.stages.Traced], Mesh]


def ours(size: str, *, stacked: bool) -> Program:
    """What traces the step of the supervised recipe, and its mesh."""
    from tunix_gemma4.planning.command import load_settings
    from tunix_gemma4.planning.plan import model_source
    from tunix_gemma4.planning.programs import Shapes, sft_programs
    from tunix_gemma4.recipes import common

    case = SIZES[size]
    settings = [*case.settings.split(), f"scan_layers={stacked}", f"lora.rank={RANK}"]
    config = load_settings(case.recipe.split(), settings)
    mesh = common.device_mesh(config.mesh, devices=hardware(case.topology).devices())
    shapes = Shapes(common.model_config(config, model_source(config.model)), mesh)
    (program,) = sft_programs(config, shapes, 0)
    return program.trace, mesh


def place(node: nnx.Module, mesh: Mesh) -> None:
    """Says of each abstract variable of a module or optimizer, in place, where it lies."""
    nnx.update(node, shapes_on(nnx.state(node), mesh))


def tunix(size: str) -> Program:
    """What traces the host's step of its own model, and its mesh."""
    import qwix
    from tunix.models.gemma4 import model as gemma4
    from tunix.sft import peft_trainer, utils

    config = getattr(gemma4.ModelConfig, f"gemma4_{size}")()
    config.dtype = config.param_dtype = jnp.bfloat16
    targets = "q_einsum|kv_einsum|k_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj"
    provider = qwix.LoraProvider(module_path=f".*({targets})", rank=RANK, alpha=RANK)
    made = []

    def build() -> tuple[nnx.Module, nnx.Optimizer]:
        model = gemma4.Gemma4(config, rngs=nnx.Rngs(0))
        model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
        training = peft_trainer.TrainingConfig(eval_every_n_steps=1)
        made.append(peft_trainer.PeftTrainer(model, optax.adamw(RATE), training))
        return model, made[0].optimizer

    model, optimizer = nnx.eval_shape(build)
    config.remat_config = gemma4.RematConfig.DECODER

    def model_input(tokens: jax.Array) -> dict[str, jax.Array]:
        mask = tokens != 0
        return {
            "input_tokens": tokens,
            "input_mask": mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    made[0].with_gen_model_input_fn(model_input)
    rows, length, *sizes = SHAPES[size]
    devices = np.array(hardware(SIZES[size].topology).devices())
    mesh = Mesh(devices.reshape(sizes), ("fsdp", "tp"))
    place(model, mesh)
    place(optimizer, mesh)
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=where)
    step = nnx.jit(made[0].create_train_step_fn(), donate_argnames=("optimizer",))
    return lambda: step.trace(model, optimizer, tokens), mesh


def measure(size: str, program: str) -> dict[str, float]:
    """Seconds and bytes of one program."""
    start, cpu = time.monotonic(), time.process_time()
    trace, mesh = tunix(size) if program == "tunix" else ours(size, stacked=program == "stacked")
    built = time.monotonic()
    with mesh:
        lowered = trace().lower()
    lowered_at = time.monotonic()
    compiled = lowered.compile()
    end = time.monotonic()
    memory = compiled.memory_analysis()
    return {
        "build": built - start,
        "lower": lowered_at - built,
        "compile": end - lowered_at,
        "cpu": time.process_time() - cpu,
        "temp": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "lines": lowered.as_text().count("\n"),
    }


def in_own_process(size: str, program: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--size", size, "--only", program]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{size} {program} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="e2b")
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=PROGRAMS, help="one program in this process, as JSON")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    if arguments.only:
        print(json.dumps(measure(arguments.size, arguments.only)))
        return
    runs = {program: [] for program in arguments.program}
    for _ in range(arguments.rounds):
        for program, results in runs.items():
            results.append(in_own_process(arguments.size, program))
    for program, results in runs.items():
        median = {name: statistics.median(run[name] for run in results) for name in results[0]}
        times = "  ".join(f"{name} {median[name]:6.1f} s" for name in TIMES)
        sizes = "  ".join(f"{name} {median[name] / 1e9:5.2f} GB" for name in ("temp", "arguments"))
        name = f"{arguments.size} {program}"
        print(f"{name:<15}{times}  {sizes}  {median['lines']:,.0f} lines", flush=True)


if __name__ == "__main__":
    main()
