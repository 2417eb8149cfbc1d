# SPDX-License-Identifier: Apache-2.0
"""Speed on a CPU beside Tunix 0.1.7's own Gemma 4 and transformers with PEFT, in one process.

    python benchmarks/cpu_speed.py                     # 2 threads, float32, B=2 T=512
    python benchmarks/cpu_speed.py --scaling           # how cost grows; CSV and plot

Needs the extras `parity` and `demo` (for the plot). All three run the same weights: E2B's structure
(15 layers, hidden size 512, vocabulary 32,768; see `cpu_models.TEXT`). Before a time is taken the
numbers of parameters must be equal and results must agree.

    forward    logits of every token
    logps      log-probability of every next token
    step       LoRA of rank 8 on the seven projections of every layer, AdamW, loss on all tokens
    decode     greedy, prompt of 128 tokens and 64 more

Each side runs as its own trainer, sampler or `generate` does it; the work of a round is done by one
after the other, and the table shows medians over rounds. Ratios are what counts on a machine that
others use too; `--clock cpu` counts seconds of processors instead of those on the wall. `limit` is
what the products with the weights alone take, of as many numbers in square matrices and the same
rows, at the fastest of several sizes and calls in the same run; with the few rows of decoding that
is the rate at which weights are read. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKS = ("forward", "logps", "step", "decode")
# How much faster than whom this package is to be.
TARGETS = {
    ("forward", "Tunix"): 1.3,
    ("logps", "Tunix"): 1.3,
    ("step", "Tunix"): 2.0,
    ("step", "transformers"): 1.4,
    ("decode", "Tunix"): 1.3,
}
ROWS, LENGTH, PROMPT, MORE = 2, 512, 128, 64
TINY_LENGTH, TINY_PROMPT, TINY_MORE = 24, 8, 4
# Of the largest value. Fifteen layers of random weights multiply rounding: Tunix and transformers
# differ by 3e-4.
AGREEMENT = 1e-3
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--remat", default="none", help="this package's, in the step")
    parser.add_argument("--scan-layers", action="store_true", help="stack this package's layers")
    parser.add_argument("--tiny", action="store_true", help="a model for trying the script out")
    parser.add_argument("--scaling", action="store_true", help="curves instead of the table")
    parser.add_argument(
        "--limit", type=float, default=60, help="seconds of a call that end a curve"
    )
    axes = ("tokens", "images")
    parser.add_argument("--axes", nargs="+", choices=axes, default=axes, help="of --scaling")
    parser.add_argument("--results", type=Path, help="of --scaling, instead of cpu_speed/")
    parser.add_argument("--point", nargs=4, help=argparse.SUPPRESS)  # See cpu_scaling.
    return parser.parse_args(argv)


def keep_to(threads: int) -> None:
    """Gives this process `threads` processors; JAX and torch then start as many threads."""
    allowed = sorted(os.sched_getaffinity(0))
    if threads > len(allowed):
        raise SystemExit(f"--threads {threads}: this process may use {len(allowed)} processors")
    os.sched_setaffinity(0, allowed[:threads])


def table(options: argparse.Namespace) -> bool:
    """Prints a row for each work; whether every target was met."""
    import cpu_models
    import cpu_peers

    with tempfile.TemporaryDirectory() as name:
        directory = cpu_models.write_checkpoint(Path(name), tiny=options.tiny)
        config = cpu_models.read_config(directory)
        ours = {"remat": options.remat, "scan_layers": options.scan_layers}
        sides = [
            cpu_models.Ours(directory, **ours),
            cpu_peers.Tunix(directory),
            cpu_peers.Transformers(directory),
        ]
        counts = {side.name: side.parameters for side in sides}
        if len(set(counts.values())) > 1:
            raise SystemExit(f"the models differ in their number of parameters: {counts}")
        length = TINY_LENGTH if options.tiny else LENGTH
        prompt, more = (TINY_PROMPT, TINY_MORE) if options.tiny else (PROMPT, MORE)
        inputs = cpu_models.draw_inputs(config, ROWS, length)
        prompts = cpu_models.Inputs(inputs.tokens[:, :prompt].copy())
        print(
            f"{counts[sides[0].name]:,} parameters, B={ROWS} T={length}, decode {prompt} + {more}, "
            f"{options.threads} threads, {options.clock} seconds, remat {options.remat}, "
            f"scan_layers {options.scan_layers}"
        )
        header = "".join(f"{side.name:>14}" for side in sides)
        print(f"{'work':<10}{header}{'limit':>14}", flush=True)
        met = True
        for work in options.only:
            calls = {}
            for side in sides:
                if work == "step":
                    side.prepare_step()
                arguments = (prompts, more) if work == "decode" else (inputs,)
                calls[side.name] = _bound(getattr(side, work), *arguments)
            # One product takes `count` rows; each weight is met forward, in steps backward too.
            count = ROWS if work == "decode" else ROWS * length
            times = {"decode": more, "step": 2}.get(work, 1)
            clock = CLOCKS[options.clock]
            met &= _row(work, calls, times * _least(sides[0].factors, count, clock), options)
    return met


def _least(factors: int, rows: int, clock: Callable[[], float]) -> float:
    """Seconds in which `rows` rows meet as many numbers, at the fastest."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    chain = jax.jit(lambda x, matrices: functools.reduce(jnp.matmul, matrices, x))
    found = []
    for size in (512, 1024, 2048):
        shape = (max(1, round(factors / size**2)), size, size)
        # Scaled so that the rows keep their size.
        matrices = np.random.default_rng(0).standard_normal(shape, np.float32) / np.sqrt(size)
        inputs = jnp.ones((rows, size), jnp.float32), [jnp.array(matrix) for matrix in matrices]
        call = _bound(chain, *inputs)
        times = [_seconds(lambda call=call: jax.block_until_ready(call()), clock) for _ in range(6)]
        found.append(min(times) * factors / matrices.size)
    return min(found)


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _row(
    work: str, calls: dict[str, Callable[[], Any]], limit: float, options: argparse.Namespace
) -> bool:
    results = {name: call() for name, call in calls.items()}
    difference = agree(work, results)
    for call in calls.values():
        call()  # Tunix compiles its step twice.
    seconds = medians(calls, options.repeats, CLOCKS[options.clock])
    ours, *peers = seconds
    columns = [*seconds.values(), limit]
    print(f"{work:<10}" + "".join(f"{value:>13.3f}s" for value in columns), end="")
    met = True
    for name in peers:
        ratio = seconds[name] / seconds[ours]
        target = TARGETS.get((work, name))
        verdict = "" if target is None else f" (wanted {target}: {_met(ratio >= target)})"
        met &= target is None or ratio >= target
        print(f"   {name} / ours {ratio:.2f}{verdict}", end="")
    print(f"   {difference}", flush=True)
    return met


def _met(good: bool) -> str:
    return "met" if good else "MISSED"


def agree(work: str, results: dict[str, Any]) -> str:
    """How far results are apart; SystemExit if they are not the same but for rounding."""
    import numpy as np

    first, *others = (np.asarray(result) for result in results.values())
    if work == "decode":
        # A word may tip over where two are equally likely; all behind it then differs.
        same = min(float((first == other).mean()) for other in others)
        return f"same tokens {same:.0%}"
    most = np.abs(first).max()
    apart = max(float(np.abs(first - other).max()) for other in others) / most
    if not apart <= AGREEMENT:
        raise SystemExit(f"{work}: results are {apart:.1e} of the largest apart")
    return f"apart {apart:.0e}"


def medians(
    calls: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of each call, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, clock))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    options = parse()
    keep_to(options.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.point:
        import cpu_scaling

        return cpu_scaling.point(options)
    if options.scaling:
        import cpu_scaling

        return cpu_scaling.curves(options)
    return 0 if table(options) else 1


if __name__ == "__main__":
    sys.exit(main())
