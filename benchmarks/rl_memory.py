# SPDX-License-Identifier: Apache-2.0
"""Memory per chip of reinforcement learning on eight TPU v5e or eight Hopper GPUs.

    python benchmarks/rl_memory.py --size e2b --platform tpu

Compiles ahead of time, with the real compilers and shapes, and runs nothing; needs no chip, but
the extra `aot` for TPU or `aot-gpu` for GPU. Three programs, each on fsdp 8 and on fsdp 4 x tp 2:

    logps   compute_per_token_logps of the base model, through the wrapper that register() installs
    score   compute_score of a Gemma4ForTokenScores, likewise
    step    the RL trainer's step: GRPO loss, gradient, AdamW on adapters of rank 16; completions
            share their prompt's row, two of them on fsdp 4 x tp 2

8 rows, 4 completions for each of 2 prompts, of 256 prompt and 256 completion tokens, bfloat16, one
image a prompt, whose budget of 140 soft tokens is the largest that a prompt of 256 has room for.
Each line also says what the compiled program shows of the sharding of activations; see `facts`.
Layers are stacked (`scan_layers: true`). `--layers` cuts the depth, and the tower to one layer. For
a program that the compiler refuses as too large the line is its own message.

docs/how-to/choose_mesh.md says what for.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import math
import os
import re
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.rl import common

import tunix_gemma4
from tunix_gemma4 import LoraConfig, ModelConfig, apply_lora, sharding
from tunix_gemma4.model.gemma4 import (
    Gemma4ForConditionalGeneration,
    Gemma4ForTokenScores,
    stack_layers,
)
from tunix_gemma4.model.shared_prompt import completions_per_row
from tunix_gemma4.planning.hardware import hardware
from tunix_gemma4.plugin.rl import context as binding
from tunix_gemma4.plugin.rl.cluster import example_shapes, make_trainer
from tunix_gemma4.plugin.train_step import TrainStep
from tunix_gemma4.settings.grpo import GrpoRunConfig, PromptConfig

ROWS, GENERATIONS, RANK = 8, 4, 16
PROGRAMS = ("logps", "score", "step")
MESHES = ("8x1", "4x2")
GB = 1e9
# What a chip of each kind has, in GB, as its maker counts.
CAPACITY = {"tpu": (16,), "gpu": (80, 141)}
_CHIPS = {"tpu": "v5e:2x4", "gpu": "h200:8"}


def make_mesh(platform: str, shape: str) -> Mesh:
    """Eight chips that are not here, as fsdp x tp."""
    sizes = [int(size) for size in shape.split("x")]
    devices = np.array(hardware(_CHIPS[platform]).devices())
    return Mesh(devices.reshape(sizes), ("fsdp", "tp"))


def make_config(size: str, layers: int | None) -> ModelConfig:
    """The released size with its tower, cut to `layers` of alternating kinds if given."""
    source = copy.deepcopy(getattr(ModelConfig, f"gemma4_{size}")().source)
    fields = {"dtype": "bfloat16", "param_dtype": "bfloat16", "remat_config": "decoder"}
    if layers is not None:
        shares = source["text_config"]["num_kv_shared_layers"] > 0
        source["vision_config"]["num_hidden_layers"] = 1
        fields |= {
            "num_hidden_layers": layers,
            "num_kv_shared_layers": layers // 2 if shares and layers > 2 else 0,
            "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        }
    return ModelConfig.from_hf(source, text_only=False, **fields)


class Shapes:
    """Abstract arguments on a mesh."""

    def __init__(self, config: ModelConfig, mesh: Mesh, arguments: argparse.Namespace):
        self.config, self.mesh, self.arguments = config, mesh, arguments
        self.total = arguments.prompt + arguments.completion
        self.weights: set[tuple[int, ...]] = set()
        self.bytes = 0

    def placed(self, node):
        """The shapes of a module's or optimizer's variables, each where its sharding says."""
        graphdef, state = nnx.split(node)
        leaves = jax.tree.leaves(state)
        self.weights |= {leaf.shape for leaf in leaves}
        self.bytes += sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        return graphdef, sharding.shapes_on(state, self.mesh)

    def rows(self, *shape, dtype=jnp.int32):
        where = NamedSharding(self.mesh, PartitionSpec("fsdp"))
        return jax.ShapeDtypeStruct((ROWS, *shape), dtype, sharding=where)

    def prompts(self):
        return self.rows(self.arguments.prompt)

    def completions(self, dtype=jnp.int32):
        return self.rows(self.arguments.completion, dtype=dtype)

    def images(self, *, of_rows: bool = False):
        """One image per prompt, as log-probabilities and scores get them, or one per row.

        The host gives every chip all rows where `fsdp` does not divide them.
        """
        vision = self.config.vision_config
        patches = self.arguments.soft_tokens * vision.pooling_kernel_size**2
        count = ROWS if of_rows else ROWS // GENERATIONS
        spec = PartitionSpec(*() if count % self.mesh.shape["fsdp"] else ("fsdp",))
        shape = (count, 1, patches, vision.patch_dim + 2)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(self.mesh, spec))


def lower_logps(shapes: Shapes):
    model = nnx.eval_shape(lambda: Gemma4ForConditionalGeneration(shapes.config, rngs=nnx.Rngs(0)))
    graphdef, state = shapes.placed(stack_layers(model))

    def logps(state, prompts, completions, images):
        return common.compute_per_token_logps(
            graphdef, state, prompts, completions, 0, 1, images=images
        )

    return jax.jit(logps).lower(state, shapes.prompts(), shapes.completions(), shapes.images())


def lower_score(shapes: Shapes):
    model = nnx.eval_shape(lambda: Gemma4ForTokenScores(shapes.config, rngs=nnx.Rngs(0)))
    graphdef, state = shapes.placed(stack_layers(model))

    def score(state, prompts, completions, images):
        batch = binding.RolloutContext(images=images, image_repeats=GENERATIONS)
        with binding.bind(batch):
            return common.compute_score(nnx.merge(graphdef, state), prompts, completions, 0, 1)

    return jax.jit(score).lower(state, shapes.prompts(), shapes.completions(), shapes.images())


def lower_step(shapes: Shapes):
    """The step that `GRPOLearner` makes its actor's trainer take, as that jits it."""
    settings = GrpoRunConfig(
        data=PromptConfig(max_prompt_length=shapes.arguments.prompt),
        num_generations=GENERATIONS,
        beta=0.04,
        max_completion_length=shapes.arguments.completion,
        batch_size=ROWS // GENERATIONS,
    )
    made = []

    def build():
        model = Gemma4ForConditionalGeneration(shapes.config, rngs=nnx.Rngs(0))
        model = stack_layers(apply_lora(model, LoraConfig(rank=RANK)))
        made.append(make_trainer(model, optax.adamw(1e-5), settings, pad_id=0, eos_id=1))
        return made[0].model, made[0].optimizer

    model, optimizer = nnx.eval_shape(build)
    for node in (model, optimizer):
        nnx.update(node, shapes.placed(node)[1])
    step = TrainStep(made[0].create_train_step_fn(), model, optimizer)
    example = example_shapes(
        lambda *shape, dtype=jnp.int32: shapes.rows(*shape[1:], dtype=dtype),
        *(settings, shapes.images(of_rows=True), (0, shapes.config.image_token_id)),
    )
    return step.jitted_fn.lower(*step.arguments(), example)


LOWER = {"logps": lower_logps, "score": lower_score, "step": lower_step}


_RESULT = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = \(?(?:bf16|f32)\[([\d,]+)\]", re.MULTILINE)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Each chip looks up its own words for all rows.
_LOOKUP = "jit(_take)"


def facts(text: str, weights: set[tuple[int, ...]], shapes: Shapes, shared: int = 1) -> dict:
    """What the compiled program's text shows of the sharding of activations.

    Args:
        text: of the compiled program of one chip.
        weights: shapes of all parameters, unsharded.
        shapes: what the program was compiled for.
        shared: completions that share a row with their prompt.

    Returns:
        `own_rows`: instructions that give hidden states of a chip's own rows alone.
        `all_rows`: those that give activations of all rows at all positions, or a slice of their
            width, but for lookups in the vocabulary tables: there tables stay and states move.
        `all_words`: arrays other than tables with every word at several positions.
        `collectives`: how many of each.
    """
    config = shapes.config
    rows = ROWS // shared
    own = rows // shapes.mesh.shape["fsdp"]
    total = shapes.arguments.prompt + shared * shapes.arguments.completion
    lengths = (total, total - 1)
    tables = weights | {shape[::-1] for shape in weights}
    # A projection may be gathered head by head.
    tables |= {
        (heads, spec.head_dim, config.hidden_size)
        for spec in config.layers
        for heads in (config.num_attention_heads, spec.num_kv_heads)
    }
    # What begins with one of these is a parameter, or has its heads first.
    sizes = {size for shape in weights for size in shape}
    sizes |= {config.num_attention_heads, *(spec.num_kv_heads for spec in config.layers)} - {ROWS}
    own_rows, all_rows, all_words = 0, set(), set()
    for line in text.splitlines():
        match = _RESULT.match(line)
        if match is None:
            continue
        shape = tuple(int(size) for size in match[1].split(",") if size != "1")
        if shape in tables or len(shape) < 2 or shape[-1] in lengths:  # The last are masks.
            continue
        if config.vocab_size in shape:
            all_words.add(shape)
        positions = math.prod(shape[:-1])
        own_rows += shape[-1] == config.hidden_size and positions in [own * n for n in lengths]
        whole = positions in [rows * n for n in lengths] and shape[0] not in sizes
        # Heads of a chip's own rows, as many as there are shards.
        whole &= math.prod(shape[:-2]) not in [own * n for n in lengths]
        name = re.search(r'op_name="([^"]*)"', line)
        if whole and name is not None and _LOOKUP not in name[1]:
            all_rows.add(f"{name[1]} {list(shape)}")
    count = collections.Counter(re.findall(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(", text))
    return {
        "own_rows": own_rows,
        "all_rows": sorted(all_rows),
        "all_words": sorted(all_words),
        "collectives": dict(count),
    }


def measure(program: str, shapes: Shapes) -> dict:
    """Bytes per chip, or what the compiler says it lacks, and `facts`."""
    start = time.monotonic()
    with shapes.mesh:
        lowered = LOWER[program](shapes)
        try:
            compiled = lowered.compile(
                compiler_options=hardware(_CHIPS[shapes.arguments.platform]).compiler_options
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"fits": False, "needs": str(error).splitlines()[0]}
    memory = compiled.memory_analysis()
    sizes = {
        name: getattr(memory, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp")
    }
    sizes["weights"] = shapes.bytes
    sizes["total"] = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    text = compiled.as_text()
    if shapes.arguments.text is not None:
        shape = "x".join(map(str, shapes.mesh.devices.shape))
        name = f"{shapes.arguments.size}_{shapes.arguments.platform}_{shape}_{program}.txt"
        (shapes.arguments.text / name).write_text(text)
    shared = 1
    if program == "step":
        shared = completions_per_row(ROWS, GENERATIONS, shapes.mesh.shape["fsdp"])
    found = facts(text, shapes.weights, shapes, shared)
    return sizes | found | {"seconds": round(time.monotonic() - start)}


def describe(result: dict, platform: str) -> str:
    if result.get("fits") is False:
        return f"does not fit: {result['needs']}"
    total = result["total"] / GB
    sizes = "  ".join(
        f"{name} {result[name] / GB:6.2f}" for name in ("argument", "output", "alias", "temp")
    )
    fits = ", ".join(
        f"{'fits' if total < capacity else 'does not fit'} {capacity} GB"
        for capacity in CAPACITY[platform]
    )
    return f"{sizes}  total {total:6.2f} GB: {fits}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("e2b", "31b"), default="e2b")
    parser.add_argument("--platform", choices=tuple(CAPACITY), default="tpu")
    parser.add_argument("--mesh", nargs="+", choices=MESHES, default=MESHES)
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--layers", type=int, help="cut the decoder to this even number of layers")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=256)
    parser.add_argument("--soft-tokens", type=int, default=140, choices=(70, 140))
    parser.add_argument("--text", type=Path, help="directory to keep the compiled programs in")
    parser.add_argument("--json", action="store_true", help="print one JSON object per program")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    tunix_gemma4.register()
    config = make_config(arguments.size, arguments.layers)
    for shape in arguments.mesh:
        mesh = make_mesh(arguments.platform, shape)
        for program in arguments.program:
            shapes = Shapes(config, mesh, arguments)
            result = measure(program, shapes)
            name = f"{arguments.size} {arguments.platform} {shape} {program}"
            if arguments.json:
                print(
                    json.dumps({"name": name, "mesh": shape, "program": program} | result),
                    flush=True,
                )
                continue
            print(f"{name:<20}{describe(result, arguments.platform)}", flush=True)
            for key in ("own_rows", "all_rows", "all_words", "collectives", "seconds"):
                if key in result:
                    print(f"    {key}: {result[key]}", flush=True)


if __name__ == "__main__":
    main()
