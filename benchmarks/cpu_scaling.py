# SPDX-License-Identifier: Apache-2.0
"""How tokens per second change with a row's length and its images: `cpu_speed.py --scaling`.

One row. Lengths go from 256 to 8,192 in text; images from 0 to 8 of 70 soft tokens each in a row of
1,024 tokens, for this package and transformers, Tunix's model having none. Every point is a process
of its own, which times the last of three calls (Tunix compiles its step twice). A curve ends where
the next call is sure to take more than `--limit` seconds, twice the last one, or where memory runs
out; the CSV says which.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "cpu_speed"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
TINY_LENGTHS = (8, 16)
IMAGES, IMAGE_LENGTH = (0, 1, 2, 4, 8), 1024
TINY_IMAGES, TINY_IMAGE_LENGTH = (0, 1), 24
SIDES = {"tokens": ("Ours", "Tunix", "Transformers"), "images": ("Ours", "Transformers")}
WORKS = ("forward", "step")
FIELDS = ("axis", "work", "side", "value", "tokens_per_second", "seconds", "end")
NAMES = {"Ours": "this package", "Tunix": "Tunix 0.1.7", "Transformers": "transformers"}
STYLES = {"Ours": "C0o-", "Tunix": "C1s-", "Transformers": "C2D-"}
MEMORY_SHARE = 0.85  # Of what is free when a point starts.


def point(options: argparse.Namespace) -> int:
    """Runs one point in this process and prints seconds as JSON."""
    import cpu_models
    import cpu_peers

    directory, side, work, shape = options.point
    length, images = map(int, shape.split(","))
    _limit_memory()
    config = cpu_models.read_config(Path(directory))
    inputs = cpu_models.draw_inputs(config, 1, length, images)
    ours = {"remat": options.remat, "scan_layers": options.scan_layers}
    if side == "Ours":
        runner = cpu_models.Ours(Path(directory), **ours)
    else:
        runner = getattr(cpu_peers, side)(Path(directory))
    if work == "step":
        runner.prepare_step()
    for _ in range(3):
        start = time.perf_counter()
        getattr(runner, work)(inputs)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}))
    return 0


def _limit_memory() -> None:
    """Makes allocations fail where the machine would begin to end processes."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("utf-8").splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (int(free * MEMORY_SHARE),) * 2)


def curves(options: argparse.Namespace) -> int:
    """Runs every point of every curve, writes the CSV as it goes, and draws it."""
    results = options.results or RESULTS
    results.mkdir(exist_ok=True)
    path = results / ("tiny.csv" if options.tiny else "scaling.csv")
    with tempfile.TemporaryDirectory() as name, path.open("w", newline="") as file:
        rows = csv.DictWriter(file, FIELDS)
        rows.writeheader()
        for axis in options.axes:
            directory = _checkpoint(Path(name) / axis, axis, options)
            for work in WORKS:
                for side in SIDES[axis]:
                    for row in curve(directory, axis, work, side, options):
                        rows.writerow(row)
                        file.flush()
                        print("  ".join(f"{value}" for value in row.values()), flush=True)
    draw(path, path.with_suffix(".png"))
    return 0


def _checkpoint(directory: Path, axis: str, options: argparse.Namespace) -> str:
    import cpu_models

    cpu_models.write_checkpoint(directory, tiny=options.tiny, images=axis == "images")
    return str(directory)


def _shapes(axis: str, tiny: bool) -> list[tuple[int, int, int]]:
    """Value on the axis, tokens, images."""
    if axis == "tokens":
        return [(length, length, 0) for length in (TINY_LENGTHS if tiny else LENGTHS)]
    length = TINY_IMAGE_LENGTH if tiny else IMAGE_LENGTH
    return [(count, length, count) for count in (TINY_IMAGES if tiny else IMAGES)]


def curve(directory: str, axis: str, work: str, side: str, options: argparse.Namespace):
    """Rows of the CSV, one for each point until the curve ends."""
    settings = [f"--threads={options.threads}", f"--remat={options.remat}"]
    settings += ["--scan-layers"] if options.scan_layers else []
    last = None
    for value, length, images in _shapes(axis, options.tiny):
        row = dict.fromkeys(FIELDS, "") | {"axis": axis, "work": work, "side": side}
        row["value"] = value
        if last is not None and axis == "tokens" and 2 * last > options.limit:
            yield row | {"end": f"would take over {options.limit:g} s"}
            return
        command = [sys.executable, str(Path(__file__).with_name("cpu_speed.py")), *settings]
        command += ["--point", directory, side, work, f"{length},{images}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            yield row | {"end": _reason(done)}
            return
        last = json.loads(done.stdout.splitlines()[-1])["seconds"]
        yield row | {"seconds": f"{last:.3f}", "tokens_per_second": f"{length / last:.1f}"}


def _reason(done: subprocess.CompletedProcess) -> str:
    """Why a point failed; SystemExit where it was not for want of memory."""
    signs = ("out of memory", "RESOURCE_EXHAUSTED", "allocate memory", "MemoryError", "bad_alloc")
    # A negative code is a signal: the kernel ends what takes too much.
    if done.returncode == -9 or any(sign.lower() in done.stderr.lower() for sign in signs):
        return "out of memory"
    raise SystemExit(done.stderr)


def draw(source: Path, target: Path) -> None:
    """Four panels: forward and step against tokens and images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    axes_names = [axis for axis in SIDES if any(row["axis"] == axis for row in rows)]
    figure, panels = plt.subplots(
        len(axes_names), 2, figsize=(10, 4 * len(axes_names)), squeeze=False
    )
    labels = {"tokens": "tokens in a row", "images": "images in a row"}
    for line, axis in zip(panels, axes_names, strict=True):
        for panel, work in zip(line, WORKS, strict=True):
            for side in SIDES[axis]:
                here = (axis, work, side)
                _line(panel, [r for r in rows if (r["axis"], r["work"], r["side"]) == here], side)
            if axis == "tokens":
                panel.set_xscale("log", base=2)
                panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            panel.set(title="forward" if work == "forward" else "LoRA step")
            panel.set(xlabel=labels[axis], ylabel="tokens per second", ylim=(0, None))
            panel.grid(alpha=0.3)
            panel.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def _line(panel, rows: list[dict[str, str]], side: str) -> None:
    points = [(float(r["value"]), float(r["tokens_per_second"])) for r in rows if r["seconds"]]
    if not points:
        return
    end = next((r["end"] for r in rows if r["end"]), "")
    label = NAMES[side] + (f" (ends: {end})" if end else "")
    panel.plot(*zip(*points, strict=True), STYLES[side], label=label)
