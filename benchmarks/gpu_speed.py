# SPDX-License-Identifier: Apache-2.0
"""Decoding and LoRA steps of the released sizes on one GPU, beside transformers with PEFT.

    python benchmarks/gpu_speed.py                       # on the GPU that JAX finds
    python benchmarks/gpu_speed.py --only decode --sizes e2b
    python benchmarks/gpu_speed.py --only step --sides ours --attention triton
    JAX_PLATFORMS=cpu python benchmarks/gpu_speed.py --tiny      # tries the script out

No run on a GPU is recorded yet: the script is tested on a CPU, with tiny models.

Weights are random, of the real shapes, bfloat16, made on the device. Every row is a process of its
own, so that each finds the whole memory. Transformers has rows where torch sees the same GPU (its
QLoRA wants bitsandbytes as well).

    decode   greedy tokens per second of E2B at batch 1, 8 and 64, from the difference between 128
             tokens more and one, and what share that is of the limit: the bandwidth of reading a
             large bfloat16 array, measured in the same process, over the bytes of all weights that
             a token needs (all but the per-layer embeddings, of which it looks up one row)
    step     LoRA rank 16 on the seven projections, AdamW, decoder remat, T=2048: tokens per second
             and model-FLOPs utilisation. Model FLOPs are those of products with the weights, one
             forward and one backward to the activations (4 per weight and token: frozen weights
             have no gradient), and of attention within causality and windows, 3 times the forward.
             What remat computes again does not count. Utilisation is of the datasheet's dense
             bfloat16 rate where the device is known, else of a large product measured beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCHES, TINY_BATCHES = (1, 8, 64), (1, 2)
PROMPT, MORE, TINY_PROMPT, TINY_MORE = 128, 128, 8, 120
LENGTH, TINY_LENGTH = 2048, 16
# Rows of a step. The largest is trained on a base of 4 bits.
STEP_ROWS = {"e2b": 4, "e4b": 4, "31b": 1}
QUANTIZE = {"31b": "nf4"}
RANK, ALPHA = 16, 32.0
# Dense bfloat16 FLOP/s of the datasheets (SXM).
RATES = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
SIDES = ("ours", "transformers")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("decode", "step"), default=("decode", "step"))
    parser.add_argument("--sizes", nargs="+", choices=STEP_ROWS, default=tuple(STEP_ROWS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--attention", default="auto", help="this package's: auto, xla, triton")
    parser.add_argument("--scan-layers", action="store_true", help="stack this package's layers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # What a process of `main` is to do.
    return parser.parse_args(argv)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be measured."""
    found = []
    for side in options.sides:
        if "decode" in options.only and "e2b" in options.sizes:
            batches = TINY_BATCHES if options.tiny else BATCHES
            found += [{"work": "decode", "size": "e2b", "side": side, "batch": b} for b in batches]
        if "step" in options.only:
            for size in options.sizes:
                batch = 1 if options.tiny else STEP_ROWS[size]
                found.append({"work": "step", "size": size, "side": side, "batch": batch})
    return found


def make_config(size: str, tiny: bool) -> Any:
    """The config of a size, text only, bfloat16."""
    import jax.numpy as jnp

    import tunix_gemma4 as g4
    from tunix_gemma4.testing.tiny import tiny_config

    if tiny:
        return tiny_config(size, text_only=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return getattr(g4.ModelConfig, f"gemma4_{size}")()


def make_model(config: Any) -> Any:
    """A model with random matrices and norms of one, each array made on the device."""
    import functools

    import jax
    import jax.numpy as jnp
    from flax import nnx

    import tunix_gemma4 as g4

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def make(key, shape, dtype):
        if len(shape) < 2:
            return jnp.ones(shape, dtype)
        return jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5

    model = nnx.eval_shape(lambda: g4.Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    arrays = [make(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, structure.unflatten(arrays))


def weights_per_token(config: Any) -> int:
    """Numbers that a token's forward pass reads: all but the per-layer embeddings."""
    from flax import nnx

    import tunix_gemma4 as g4
    from tunix_gemma4.model.gemma4 import num_parameters

    model = nnx.eval_shape(lambda: g4.Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
    per_layer = config.num_hidden_layers * config.hidden_size_per_layer_input
    return num_parameters(model) - per_layer * config.vocab_size_per_layer_input


def model_flops(config: Any, batch: int, length: int) -> float:
    """Of one LoRA step; see the module's first lines."""
    attention = 0
    for spec in config.layers:
        window = min(spec.window or length, length)
        pairs = length * window - window * (window - 1) // 2
        attention += 2 * 2 * pairs * config.num_attention_heads * spec.head_dim
    return batch * (4.0 * weights_per_token(config) * length + 3.0 * attention)


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of `call`, which returns when its work is done, after one call that may compile."""
    import statistics

    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def bandwidth(tiny: bool, repeats: int) -> float:
    """Bytes per second at which JAX's device reads a large bfloat16 array."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones((2**20 if tiny else 2**31) // 2, jnp.bfloat16)
    read = jax.jit(lambda x: x.max())
    seconds = median_seconds(lambda: jax.block_until_ready(read(array)), max(repeats, 5))
    return array.nbytes / seconds


def product_rate(tiny: bool, repeats: int) -> float:
    """FLOP/s of a large bfloat16 product on JAX's device."""
    import jax
    import jax.numpy as jnp

    size = 256 if tiny else 8192
    square = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    seconds = median_seconds(lambda: jax.block_until_ready(product(square)), max(repeats, 5))
    return 2 * size**3 / seconds


def measure(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table, in this process."""
    import jax
    import numpy as np

    config = make_config(row["size"], options.tiny)
    device = jax.devices()[0].device_kind
    known = next((rate for name, rate in RATES.items() if name in device), None)
    if row["side"] == "ours":
        work = ours(row, config, options)
    else:
        import gpu_transformers

        missing = gpu_transformers.missing(options.tiny, QUANTIZE.get(row["size"]))
        if missing:
            return row | {"skipped": missing}
        work = gpu_transformers.work(row, config, options, rank=RANK, alpha=ALPHA)
    rng = np.random.default_rng(0)
    length = TINY_LENGTH if options.tiny else LENGTH
    prompt, more = (TINY_PROMPT, TINY_MORE) if options.tiny else (PROMPT, MORE)
    columns = prompt if row["work"] == "decode" else length
    # No special token is among the words of either tokenizer drawn here.
    first, end = (32, 256) if options.tiny else (1024, 200_000)
    tokens = rng.integers(first, end, (row["batch"], columns), dtype=np.int32)
    if row["work"] == "decode":
        one = median_seconds(lambda: work(tokens, 1), options.repeats)
        all_of_them = median_seconds(lambda: work(tokens, 1 + more), options.repeats)
        found = {"tokens_per_second": row["batch"] * more / (all_of_them - one)}
        found["bandwidth"] = bandwidth(options.tiny, options.repeats)
        limit = row["batch"] * found["bandwidth"] / (2 * weights_per_token(config))
        found["share_of_limit"] = found["tokens_per_second"] / limit
    else:
        seconds = median_seconds(lambda: work(tokens), options.repeats)
        rate = known or product_rate(options.tiny, options.repeats)
        found = {"tokens_per_second": tokens.size / seconds, "rate": rate}
        found["rate_from"] = "datasheet" if known else "measured"
        found["utilisation"] = model_flops(config, *tokens.shape) / seconds / rate
    return row | found | {"device": device}


def ours(row: dict[str, Any], config: Any, options: argparse.Namespace) -> Callable[..., Any]:
    """`work(tokens, count)` that decodes, or `work(tokens)` that trains."""
    import numpy as np
    from cpu_models import TARGETS, Inputs, lora_step

    import tunix_gemma4 as g4

    config.remat_config, config.attention_implementation = "decoder", options.attention
    model = make_model(config)
    if row["work"] == "step":
        quantize = QUANTIZE.get(row["size"])
        lora = g4.LoraConfig(rank=RANK, alpha=ALPHA, targets=TARGETS, quantize=quantize)
        step = lora_step(model, lora, scan_layers=options.scan_layers)
        return lambda tokens: step(Inputs(tokens))

    def decode(tokens: np.ndarray, count: int) -> np.ndarray:
        ones = np.ones_like(tokens)
        batch = g4.Batch(tokens=tokens, loss_mask=0 * ones, padding_mask=ones)
        return np.asarray(g4.generate(model, batch, max_new_tokens=count, stop_ids=[]).tokens)

    return decode


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    name = f"{row['work']:<7}{row['size']:<5}{row['side']:<13} batch {row['batch']:<3}"
    if "skipped" in row:
        return f"{name} skipped: {row['skipped']}"
    line = f"{name}{row['tokens_per_second']:>12,.1f} tokens/s  "
    if row["work"] == "decode":
        line += f"{row['share_of_limit']:.1%} of the limit at {row['bandwidth'] / 1e9:,.0f} GB/s"
    else:
        line += (
            f"{row['utilisation']:.1%} of {row['rate'] / 1e12:,.1f} TFLOP/s ({row['rate_from']})"
        )
    return f"{line}  {row['device']}"


def in_process(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own; a row that does not fit says so."""
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--row", json.dumps(row)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "RESOURCE_EXHAUSTED" in done.stderr or "OutOfMemory" in done.stderr:
        return row | {"skipped": "it does not fit this device's memory"}
    raise SystemExit(done.stderr)


def main() -> None:
    options = parse()
    # Torch and JAX share the device; neither may take all of it beforehand.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.row:
        print(json.dumps(measure(json.loads(options.row), options)))
        return
    for row in rows(options):
        found = measure(row, options) if options.tiny else in_process(row, options)
        print(json.dumps(found) if options.json else describe(found), flush=True)


if __name__ == "__main__":
    main()
