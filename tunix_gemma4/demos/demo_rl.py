# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning seen on a tiny model: it half reads digits, and rewards teach the rest.

A tiny Gemma 4 directory is written, trained by `sft` until it is right about as often as wrong, and
then trained by `grpo` on nothing but whether its answer is right. The same functions serve GSPO,
blanked images and sums; `benchmarks/rl_learning.py` runs them all.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from ..checkpoint import load_checkpoint
from ..data.processor import Processor
from ..recipes import grpo, sft
from ..recipes.common import MODEL
from ..recipes.compile_cache import compilation_cache
from ..settings.grpo import load_grpo_config
from ..settings.sft import load_run_config
from ..testing.digits import (
    DIGIT,
    TaskData,
    write_blank,
    write_scans,
    write_split,
    write_task,
)
from ..testing.tiny import build_tiny_checkpoint
from .demo import accuracy, answers_to, new_directory, new_figure, questions

START = (0.3, 0.6)  # held-out accuracy that reinforcement learning of digits starts from
LEAST_AFTER = 0.85
_ENOUGH_DIGITS, _ENOUGH_SUMS = 0.5, 0.25
_GUESSED = 0.4  # share of the digits' start that is labelled at random
_NUMBERS = range(10, 90)  # that are added
EVERY = 10  # steps between looks at what is held out
# A row of a curve's CSV file; the metrics are those that each step reports.
_METRICS = {
    "reward": "rewards/score/mean",
    "agreement_mean": "actor/rollout_agreement/mean",
    "agreement_max": "actor/rollout_agreement/max",
    "entropy": "actor/entropy",
}
FIELDS = ("step", "held_out", *_METRICS, "seconds")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is learnt."""

    name: str  # of its settings' files
    enough: float  # the start ends when it answers this share of the held-out questions right
    data: TaskData  # what to train on and what is held out
    start_data: TaskData  # what the supervised start is trained on


@dataclasses.dataclass
class Curve:
    """One run of reinforcement learning, step by step; step 0 is the start.

    Attributes:
        rows: with the keys `FIELDS`; NaN where a step has no such number.
    """

    rows: list[dict[str, float]]

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps that have the number `name`, and these."""
        found = [(row["step"], row[name]) for row in self.rows if not math.isnan(row[name])]
        steps, values = zip(*found, strict=True)
        return np.asarray(steps), np.asarray(values)

    @property
    def before(self) -> float:
        """Held-out accuracy of the start."""
        return self.column("held_out")[1][0]

    @property
    def after(self) -> float:
        """Held-out accuracy in the end."""
        return self.column("held_out")[1][-1]

    def write(self, path: Path) -> None:
        """Writes a CSV file; an empty cell is NaN."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(FIELDS)
            for row in self.rows:
                numbers = [row[name] for name in FIELDS]
                writer.writerow(["" if math.isnan(n) else f"{n:.6g}" for n in numbers])

    @classmethod
    def read(cls, path: Path) -> Curve:
        """Reads what `write` wrote."""
        with path.open(encoding="utf-8", newline="") as file:
            return cls(
                [
                    {name: float(cell) if cell else math.nan for name, cell in row.items()}
                    for row in csv.DictReader(file)
                ]
            )


def run(output_dir: str | Path = "outputs/demo-rl", overrides: Sequence[str] = ()) -> int:
    """One run on the scans in a new directory; see `demo.run`.

    The overrides are settings of the reinforcement learning.
    """
    begin = time.perf_counter()
    output = new_directory(output_dir, overrides)
    subject = digits(output / "data")
    print("== supervised fine-tuning, stopped early")
    started = start(subject, output / "start")
    print("\n== reinforcement learning: 1 for the right digit, 0 for anything else")
    curve = reinforce(subject, started, output / "rl", overrides=overrides)

    passed = START[0] <= curve.before <= START[1] and curve.after >= LEAST_AFTER
    wanted = f"from {START[0]:.0%} to {START[1]:.0%}, then at least {LEAST_AFTER:.0%}"
    rewards = curve.column("reward")[1]
    print(f"\nheld-out accuracy  {curve.before:.1%} before, {curve.after:.1%} after")
    print(f"wanted             {wanted}: {'met' if passed else 'MISSED'}")
    print(f"training reward    {rewards[0]:.2f} in the first step, {rewards[-1]:.2f} in the last")
    curve.write(output / "curve.csv")
    draw([Panel("digits, GRPO", [curve], goal=LEAST_AFTER)], output / "curve.png")
    print(f"curves: {output / 'curve.png'}, {output / 'curve.csv'}")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0 if passed else 1


def digits(directory: Path, *, blank: bool = False) -> Subject:
    """Scans of digits; `blank` puts a white image in the place of each once it has started."""
    scans, written = write_scans(directory)
    seen = write_task(directory, DIGIT, scans, written)
    (directory / "start").mkdir()
    guessed = write_task(directory / "start", DIGIT, scans, _with_guesses(written))
    start_data = dataclasses.replace(guessed, curve=seen.curve, held_out=seen.held_out)
    if not blank:
        return Subject("digit", _ENOUGH_DIGITS, seen, start_data)
    (directory / "blank").mkdir()
    white = write_blank(directory / "blank", scans)
    blanked = write_task(directory / "blank", DIGIT, white, written)
    return Subject("digit", _ENOUGH_DIGITS, blanked, start_data)


def _with_guesses(written: list[int]) -> list[int]:
    """The digits, a share of them replaced by any digit.

    A start that learnt from these still tries every digit now and then, which rewards need: what
    is never sampled is never rewarded.
    """
    random = np.random.default_rng(0)
    guesses = random.integers(0, 10, len(written))
    return np.where(random.random(len(written)) < _GUESSED, guesses, written).tolist()


def sums(directory: Path) -> Subject:
    """Sums of two-digit numbers."""
    data = write_sums(directory)
    return Subject("sums", _ENOUGH_SUMS, data, data)


def problems() -> list[tuple[int, int]]:
    """Every pair of two-digit numbers with a sum of two digits, in a fixed random order.

    A pair comes next to its mirror image, so that none of what is held out was trained on the
    other way round.
    """
    pairs = [(low, high) for low in _NUMBERS for high in range(low, 100 - low)]
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = [pairs[index] for index in order]
    return [pair for low, high in chosen for pair in dict.fromkeys([(low, high), (high, low)])]


def conversation(first: int, second: int) -> dict:
    """One row: a sum and its answer."""
    return {
        "messages": [
            {"role": "user", "content": f"{first}+{second}"},
            {"role": "assistant", "content": str(first + second)},
        ]
    }


def write_sums(directory: Path) -> TaskData:
    """Writes the rows to train on and the curve's, and returns what is held out."""
    directory.mkdir(parents=True, exist_ok=True)
    return write_split(directory, "sums", [conversation(*pair) for pair in problems()])


def start(subject: Subject, output: Path, *, seed: int = 0) -> Path:
    """A checkpoint that knows some of it; `output` receives all that leads there."""
    # One patch per soft token: a scan of 8 x 8 pixels has no more to show.
    base = build_tiny_checkpoint(output / "base", preset="demo", seed=seed, pooling_kernel_size=1)
    paths = {
        "model": base,
        "output_dir": output / "sft",
        "data.path": subject.start_data.train,
        "data.eval_path": subject.start_data.curve,
        "seed": seed,
    }
    config = load_run_config(_settings(f"{subject.name}_start"), _assigned(paths))
    processor = Processor.from_pretrained(base, config.data.max_soft_tokens)
    rows = subject.start_data.held_out
    asked = questions(processor, rows)

    def stop_in_time(trainer: Any) -> None:
        right = accuracy(answers_to(asked, trainer.model, processor), rows)
        print(f"      step {trainer.train_steps}  held-out accuracy {right:.3f}", flush=True)
        if right >= subject.enough:
            trainer.config.max_steps = trainer.train_steps

    sft.run(config, after_eval=stop_in_time)
    return output / "sft" / MODEL


def reinforce(
    subject: Subject,
    model: Path,
    output: Path,
    *,
    algorithm: str = "grpo",
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Curve:
    """Trains a `model` from `start` further by rewards alone, with "grpo" or "gspo".

    The seed is of the order of prompts and of what is sampled; overrides are settings, such as
    "max_steps=2".
    """
    paths = {
        "model": model,
        "output_dir": output,
        "data.path": subject.data.train,
        "loss_type": algorithm,
        "seed": seed,
    }
    config = load_grpo_config(_settings(subject.name), [*_assigned(paths), *overrides])
    looks = _Looks(subject, Processor.from_pretrained(model, config.data.max_soft_tokens))
    with compilation_cache(config.compilation_cache_dir):
        looks.ask(0, load_checkpoint(model, text_only=config.text_only))
        result = grpo.run(config, after_step=looks.after_step)
        looks.ask(result.steps, result.model)
    rows = [dict.fromkeys(FIELDS, math.nan) | {"step": step} for step in range(result.steps + 1)]
    for name, metric in _METRICS.items():
        # Those of a rollout stand in the row of its first optimizer step.
        once = metric.startswith(("rewards/", "actor/rollout_agreement/"))
        every = config.updates_per_batch if once else 1
        for row, value in zip(rows[1::every], result.history(metric), strict=True):
            row[name] = value
    for row, value in zip(rows[1:], looks.seconds, strict=True):
        row["seconds"] = value
    for step, value in looks.held_out.items():
        rows[step]["held_out"] = value
    return Curve(rows)


class _Looks:
    """Watches a run.

    Attributes:
        held_out: accuracy by the number of steps taken.
        seconds: of each step, without what was spent here.
    """

    def __init__(self, subject: Subject, processor: Processor):
        self.held_out: dict[int, float] = {}
        self.seconds: list[float] = []
        self._rows, self._processor = subject.data.held_out, processor
        self._questions = questions(processor, self._rows)
        self._began = time.perf_counter()

    def after_step(self, trainer: Any) -> None:
        """Notes the step's time and, every so often, the held-out accuracy."""
        self.seconds.append(time.perf_counter() - self._began)
        if trainer.train_steps % EVERY == 0:
            self.ask(trainer.train_steps, trainer.model)
        self._began = time.perf_counter()

    def ask(self, step: int, model: nnx.Module) -> None:
        """Notes the held-out accuracy, unless it is known."""
        if step not in self.held_out:
            said = answers_to(self._questions, model, self._processor)
            self.held_out[step] = accuracy(said, self._rows)
            print(f"      step {step}  held-out accuracy {self.held_out[step]:.3f}", flush=True)
        self._began = time.perf_counter()


def _settings(name: str) -> Path:
    return Path(__file__).with_name(f"demo_rl_{name}.yaml")


def _assigned(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


# ---- Curves.


@dataclasses.dataclass(frozen=True)
class Panel:
    """Runs that are drawn together."""

    title: str  # above them
    curves: list[Curve]  # one per seed, of equal length
    goal: float | None = None  # a dashed line at this accuracy; None: none
    goal_is_ceiling: bool = False  # it must not be reached


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Training reward and held-out accuracy of each panel: mean of the seeds, and their range."""
    figure = new_figure(figsize=(4.5 * len(panels), 6.5))
    for column, panel in enumerate(panels):
        for row, (name, label) in enumerate(_DRAWN):
            axes = figure.add_subplot(2, len(panels), row * len(panels) + column + 1)
            _draw_range(axes, panel.curves, name)
            axes.set(xlabel="step", ylabel=label, ylim=(-0.02, 1.02))
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(panel.title)
            elif panel.goal is not None:
                bound = "at most" if panel.goal_is_ceiling else "at least"
                axes.axhline(panel.goal, linestyle="--", color="grey", label=f"{bound} wanted")
                axes.legend(loc="best")
    figure.savefig(path, dpi=100)


_DRAWN = (("reward", "mean reward, training prompts"), ("held_out", "accuracy, held-out prompts"))


def _draw_range(axes: Any, curves: Sequence[Curve], name: str) -> None:
    steps = curves[0].column(name)[0]
    values = np.stack([curve.column(name)[1] for curve in curves])
    marker = "o" if len(steps) < 50 else None
    axes.plot(steps, values.mean(axis=0), marker=marker, markersize=3)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.25, linewidth=0)
