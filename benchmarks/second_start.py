# SPDX-License-Identifier: Apache-2.0
"""What the compilation cache saves: time to a supervised run's first step, first and second start.

    taskset -c 1 python benchmarks/second_start.py

On the CPU, one image a row, each start in a process of its own, with an empty cache directory and
then with what the first start left there:

    demo    the demo's tiny model with its own settings: every parameter, 64 rows
    deep    35 layers in E2B's pattern, a few numbers wide, adapters of rank 16 on all language
            projections, decoder remat, 2 rows: compiling is most of the work, as it is for real
    stacked the same with `scan_layers: true`

Times are seconds from the call of `sft.run` until the first optimizer step is done: loading of
libraries, tokenizer and weights, tracing and the step itself are in them. `wall`, and `cpu` of the
process, which other programs disturb less; medians over the rounds.

What has been measured is in docs/how-to/compile_time.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

CASES = ("demo", "deep", "stacked")
LAYERS, SHARED = 35, 20


def make_files(directory: Path) -> None:
    """Checkpoints `demo` and `deep`, and rows.jsonl of digits."""
    from safetensors.numpy import save_file

    from tunix_gemma4.testing.digits import DIGIT, write_scans, write_task
    from tunix_gemma4.testing.tiny import build_tiny_checkpoint, random_tensor, tensor_shapes

    build_tiny_checkpoint(directory / "demo", preset="demo")
    deep = build_tiny_checkpoint(directory / "deep", preset="e2b")
    config = json.loads((deep / "config.json").read_text())
    config["text_config"] |= {
        "num_hidden_layers": LAYERS,
        "num_kv_shared_layers": SHARED,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * (LAYERS // 5),
    }
    (deep / "config.json").write_text(json.dumps(config))
    tensors = {
        name: random_tensor(name, shape, seed=0, plain=True)
        for name, shape in tensor_shapes(config).items()
    }
    save_file(tensors, deep / "model.safetensors", metadata={"format": "pt"})
    scans, digits = write_scans(directory / "data")
    write_task(directory / "data", DIGIT, scans, digits)


def start(case: str, directory: Path, output: str) -> dict[str, float]:
    """One start of the recipe, ended after a step."""
    import jax

    from tunix_gemma4.plugin.sft.trainer import Gemma4Trainer
    from tunix_gemma4.recipes import sft
    from tunix_gemma4.settings.sft import load_run_config

    events, result = [], {}
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name.split("/")[-1]))
    finish = Gemma4Trainer._post_process_train_step

    def finished(trainer: Gemma4Trainer, aux: object) -> None:
        jax.block_until_ready(aux)
        result.update(wall=time.monotonic() - begin, cpu=time.process_time() - cpu)
        result["compiled"] = events.count("cache_misses")
        finish(trainer, aux)

    Gemma4Trainer._post_process_train_step = finished
    settings = [
        f"model={directory / ('demo' if case == 'demo' else 'deep')}",
        f"data.path={directory / 'data' / 'digit_train.jsonl'}",
        *(f"output_dir={output}", "max_steps=1", "report_to=none"),
    ]
    if case != "demo":
        settings += ["batch_size=2", "remat=decoder", "lora={rank: 16}"]
        settings += [f"scan_layers={str(case == 'stacked').lower()}"]
    path = resources.files("tunix_gemma4.demos").joinpath("demo_digit.yaml")
    config = load_run_config(path, settings)
    begin, cpu = time.monotonic(), time.process_time()
    sft.run(config)
    return result


def in_own_process(case: str, directory: Path, cache: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, __file__, "--only", case, str(directory), f"{output}/run"]
        environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{case} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def compare(case: str, directory: Path, rounds: int) -> str:
    """A line about both starts."""
    starts: tuple[list, list] = ([], [])
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for results in starts:
                results.append(in_own_process(case, directory, Path(cache)))
            size = sum(path.stat().st_size for path in Path(cache).rglob("*-cache"))
    first, second = (
        {name: statistics.median(result[name] for result in results) for name in results[0]}
        for results in starts
    )
    times = "  ".join(
        f"{name} {first[name]:6.1f} -> {second[name]:5.1f} s ({second[name] / first[name]:.2f})"
        for name in ("wall", "cpu")
    )
    return (
        f"{case:<8} {times}  programs compiled {first['compiled']:.0f} -> "
        f"{second['compiled']:.0f}, {size / 1e6:.1f} MB on disk"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs=3, help="one start in this process: case, files, output")
    arguments = parser.parse_args()
    if arguments.only:
        case, directory, output = arguments.only
        print(json.dumps(start(case, Path(directory), output)))
        return
    with tempfile.TemporaryDirectory() as directory:
        make_files(Path(directory))
        for case in arguments.case:
            print(compare(case, Path(directory), arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
