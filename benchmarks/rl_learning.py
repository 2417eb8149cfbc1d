# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning seen: rewards and held-out accuracy of a tiny model, with three seeds.

    python benchmarks/rl_learning.py

Needs the extra `demo` and no accelerator. Four sets of runs, each from a supervised start that was
stopped early; GRPO and GSPO of one seed share theirs:

    grpo    scans of digits, GRPO
    gspo    scans of digits, GSPO, two optimizer steps on each batch of completions
    blank   as grpo, with a white image in the place of each scan; one seed
    sums    sums of two-digit numbers, GRPO

Each run writes a CSV file in benchmarks/rl_learning/, curves.png there is drawn from all of them,
and the exit code is 1 if a target is missed. `--only grpo --seeds 0` runs a part and keeps the
other files as they are; `--only` with nothing behind it just draws and judges.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tunix_gemma4.demos.demo_rl import (
    LEAST_AFTER,
    START,
    Curve,
    Panel,
    Subject,
    digits,
    draw,
    reinforce,
    start,
    sums,
)

RESULTS = Path(__file__).parent / "rl_learning"
SETS = {
    "grpo": "digits, GRPO",
    "gspo": "digits, GSPO",
    "blank": "blanked, GRPO",
    "sums": "sums, GRPO",
}
SUMS_START, SUMS_FACTOR = (0.2, 0.5), 1.5
MOST_BLANK = 0.2
SEEDS = (0, 1, 2)


def main() -> int:
    """Runs what is asked for, then draws and judges everything that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SETS, default=list(SETS), help="sets to run")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--work", type=Path, default=Path("outputs/rl-learning"), help="for models")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for seed in options.seeds:
        for name in options.only:
            if name != "blank" or seed == SEEDS[0]:
                run(name, seed, options.work).write(RESULTS / f"{name}_{seed}.csv")
    curves = {
        name: [Curve.read(path) for path in sorted(RESULTS.glob(f"{name}_*.csv"))] for name in SETS
    }
    passed = [judge(name, curves[name]) for name in SETS if curves[name]]
    goals = {"grpo": LEAST_AFTER, "gspo": LEAST_AFTER, "blank": MOST_BLANK}
    panels = [
        Panel(title, curves[name], goals.get(name), goal_is_ceiling=name == "blank")
        for name, title in SETS.items()
        if curves[name]
    ]
    draw(panels, RESULTS / "curves.png")
    return 0 if all(passed) else 1


def run(name: str, seed: int, work: Path) -> Curve:
    """One run, from a start that is made if it is not there."""
    print(f"\n== {SETS[name]}, seed {seed}", flush=True)
    kinds: dict[str, tuple[str, Callable[[Path], Subject]]] = {
        "blank": ("digits", lambda directory: digits(directory, blank=True)),
        "sums": ("sums", sums),
    }
    kind, make = kinds.get(name, ("digits", digits))
    data = work / f"data_{name}_{seed}"
    shutil.rmtree(data, ignore_errors=True)  # Of a run that was broken off.
    subject = make(data)
    directory = work / f"start_{kind}_{seed}"
    model = directory / "sft" / "model"
    if not model.exists():
        model = start(subject, directory, seed=seed)
    output = work / f"{name}_{seed}"
    if name != "gspo":
        return reinforce(subject, model, output, seed=seed)
    # On-policy every ratio is 1, and GSPO is GRPO to the letter; from the second step on the same
    # completions they differ.
    overrides = ["num_iterations=2", "max_steps=680"]
    return reinforce(subject, model, output, algorithm="gspo", seed=seed, overrides=overrides)


def judge(name: str, curves: list[Curve]) -> bool:
    """Prints a set's figures; whether each of its runs met the targets."""
    before = [curve.before for curve in curves]
    after = [curve.after for curve in curves]
    if name == "blank":
        wanted = f"under {MOST_BLANK:.0%}"
        good = max(*before, *after) < MOST_BLANK
    elif name == "sums":
        low, high = SUMS_START
        wanted = f"from {low:.0%} to {high:.0%}, then {SUMS_FACTOR} times that"
        good = all(
            low <= b <= high and a >= SUMS_FACTOR * b for b, a in zip(before, after, strict=True)
        )
    else:
        low, high = START
        wanted = f"from {low:.0%} to {high:.0%}, then at least {LEAST_AFTER:.0%}"
        good = low <= min(before) and max(before) <= high and min(after) >= LEAST_AFTER
    first = [curve.column("reward")[1][:5].mean() for curve in curves]
    last = [curve.column("reward")[1][-5:].mean() for curve in curves]
    agreement = max(curve.column("agreement_max")[1].max() for curve in curves)
    seconds = np.median(np.concatenate([curve.column("seconds")[1] for curve in curves]))
    print(
        f"{SETS[name]:<14} {len(curves)} runs  held out {spread(before)} -> {spread(after)}  "
        f"reward {spread(first)} -> {spread(last)}  agreement {agreement:.1e}  "
        f"{seconds:.2f} s/step  wanted {wanted}: {'met' if good else 'MISSED'}"
    )
    return bool(good)


def spread(values: Iterable[float]) -> str:
    """Mean and range."""
    values = list(values)
    return f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


if __name__ == "__main__":
    sys.exit(main())
