# SPDX-License-Identifier: Apache-2.0
"""The main job on a tiny model: learn to read digits, then a second task as an adapter.

A tiny Gemma 4 directory is written, trained from random values with `sft`, saved, loaded again
and given a LoRA with `sft`: the way a real checkpoint goes.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import load_checkpoint
from ..data.processor import Batch, Processor
from ..lora import load_adapter
from ..recipes import sft
from ..recipes.common import ADAPTER, MODEL
from ..recipes.compile_cache import compilation_cache
from ..sampling import generate
from ..settings.sft import load_run_config
from ..testing.digits import (
    DIGIT,
    MINUS,
    NUM_CURVE,
    Task,
    TaskData,
    require_demo,
    write_scans,
    write_task,
)
from ..testing.tiny import build_tiny_checkpoint

ANSWER_TOKENS = 3  # a digit, the end of the turn, and one to spare


@dataclasses.dataclass
class Stage:
    """What one stage of training showed."""

    title: str  # for the table
    before: float  # share of held-out questions answered right, and that after training
    after: float
    most_before: float  # what these may and must be
    least_after: float
    losses: list[float]  # of each training step
    curve: list[tuple[int, float]]  # (step, share of the first held-out questions answered right)
    answers: list[str]  # the trained model's, to the held-out questions

    @property
    def passed(self) -> bool:
        return self.before <= self.most_before and self.after >= self.least_after


def run(output_dir: str | Path = "outputs/demo", overrides: tuple[str, ...] = ()) -> int:
    """Runs the demo in a new directory; returns 0 if every target was met, otherwise 1.

    A number is appended to a directory that exists. The overrides are settings of both stages, such
    as "max_steps=2".
    """
    start = time.perf_counter()
    output = new_directory(output_dir, overrides)
    base = build_tiny_checkpoint(output / "base", preset="demo")
    scans, digits = write_scans(output / "data")
    data = {task.name: write_task(output / "data", task, scans, digits) for task in (DIGIT, MINUS)}
    print(f"{len(scans)} scans in {output / 'data'}, {len(data['digit'].held_out)} held out")

    first = _stage(
        *(DIGIT, "full fine-tuning: the digit", base, data["digit"], output, overrides),
        most_before=0.2,
        least_after=0.9,
    )
    trained = output / DIGIT.name / MODEL
    second = _stage(
        *(MINUS, "LoRA: nine minus the digit", trained, data["nine_minus"], output, overrides),
        most_before=0.2,
        least_after=0.85,
    )
    adapter = output / MINUS.name / ADAPTER
    reloaded = load_adapter(load_checkpoint(trained, text_only=False), adapter)
    processor = Processor.from_pretrained(trained, max_soft_tokens=70)
    asked = questions(processor, data["nine_minus"].held_out)
    same = answers_to(asked, reloaded, processor) == second.answers

    _print_table([first, second])
    print(f"adapter: {adapter}; loaded again it gives the same answers: {'yes' if same else 'NO'}")
    picture = output / "demo.png"
    draw([first, second], [data["digit"], data["nine_minus"]], picture)
    print(f"curves and examples: {picture}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return 0 if same and first.passed and second.passed else 1


def _stage(
    task: Task,
    title: str,
    model_directory: Path,
    data: TaskData,
    output: Path,
    overrides: tuple[str, ...],
    *,
    most_before: float,
    least_after: float,
) -> Stage:
    """Asks the model, trains it with the recipe, and asks again."""
    print(f"\n== {title}")
    path = Path(__file__).with_name(f"demo_{task.name}.yaml")
    paths = {
        "model": model_directory,
        "output_dir": output / task.name,
        "data.path": data.train,
        "data.eval_path": data.curve,
    }
    settings = [f"{key}={value}" for key, value in paths.items()]
    config = load_run_config(path, [*settings, *overrides])
    with compilation_cache(config.compilation_cache_dir):
        processor = Processor.from_pretrained(model_directory, config.data.max_soft_tokens)
        asked = questions(processor, data.held_out)
        base = load_checkpoint(model_directory, text_only=False)
        before = accuracy(answers_to(asked, base, processor), data.held_out)
        curve = []

        def look(trainer: Any) -> None:
            rows = data.held_out[:NUM_CURVE]
            right = accuracy(answers_to(asked[:1], trainer.model, processor), rows)
            curve.append((trainer.train_steps, right))
            print(f"      step {trainer.train_steps}  held-out accuracy {right:.3f}", flush=True)

        result = sft.run(config, after_eval=look)
        given = answers_to(asked, result.model, processor)
    return Stage(
        title=title,
        before=before,
        after=accuracy(given, data.held_out),
        most_before=most_before,
        least_after=least_after,
        losses=result.trainer.history("loss"),
        curve=curve,
        answers=given,
    )


def questions(processor: Processor, rows: list[dict]) -> list[Batch]:
    """The question of each row, in batches that make no pass too large."""
    return [
        processor(
            [row["messages"][:1] for row in rows[start : start + NUM_CURVE]],
            add_generation_prompt=True,
        )
        for start in range(0, len(rows), NUM_CURVE)
    ]


def answers_to(prompts: list[Batch], model: Any, processor: Processor) -> list[str]:
    """What the model says to each question, greedily."""
    given = []
    for batch in prompts:
        said = generate(model, batch, max_new_tokens=ANSWER_TOKENS, stop_ids=processor.stop_ids)
        given += [processor.decode(tokens).strip() for tokens in said.rows()]
    return given


def accuracy(given: list[str], rows: list[dict]) -> float:
    """Share of rows whose answer is right to the letter."""
    expected = [row["messages"][1]["content"] for row in rows]
    return sum(a == b for a, b in zip(given, expected, strict=True)) / len(rows)


def _print_table(stages: list[Stage]) -> None:
    print(f"\n{'held-out accuracy':<30} {'before':>8} {'after':>8}  wanted")
    for stage in stages:
        wanted = f"from at most {stage.most_before:.0%} to at least {stage.least_after:.0%}"
        verdict = "met" if stage.passed else "MISSED"
        print(f"{stage.title:<30} {stage.before:>8.1%} {stage.after:>8.1%}  {wanted}: {verdict}")


def new_directory(output_dir: str | Path, overrides: Sequence[str]) -> Path:
    """`output_dir`, or the first of it with -2, -3, ... behind that does not exist, made.

    Raises ValueError for an override of what a demo makes itself.
    """
    require_demo()
    for override in overrides:
        if re.match(r"\s*(model|output_dir|data\.(eval_)?path)\s*=", override):
            raise ValueError(
                f"{override}: a demo makes its model and its data; --output-dir says where"
            )
    path = candidate = Path(output_dir)
    number = 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    candidate.mkdir(parents=True)
    return candidate


def draw(stages: list[Stage], data: list[TaskData], path: Path) -> None:
    """Loss and accuracy curves of each stage, and scans of some digits with the answers given."""
    from PIL import Image

    columns = 6
    figure = new_figure(figsize=(12, 9))
    grid = figure.add_gridspec(4, columns, height_ratios=[2, 1, 2, 1])
    for row, (stage, rows) in enumerate(zip(stages, data, strict=True)):
        loss = figure.add_subplot(grid[2 * row, : columns // 2])
        loss.plot(range(1, len(stage.losses) + 1), stage.losses)
        loss.set(title=stage.title, xlabel="step", ylabel="training loss", yscale="log")
        right = figure.add_subplot(grid[2 * row, columns // 2 :])
        right.plot(*zip(*stage.curve, strict=True), marker="o")
        right.axhline(stage.least_after, linestyle="--", color="grey")
        right.set(title="held out", xlabel="step", ylabel="accuracy", ylim=(-0.02, 1.02))
        first_of = {}
        for index, example in enumerate(rows.held_out):
            first_of.setdefault(example["messages"][1]["content"], index)
        for column, index in enumerate(list(first_of.values())[:columns]):
            scan = rows.held_out[index]["messages"][0]["content"][0]["image"]
            axes = figure.add_subplot(grid[2 * row + 1, column])
            axes.imshow(Image.open(scan), cmap="gray_r")
            axes.set(xticks=[], yticks=[], xlabel=f"says {stage.answers[index]!r}")
    figure.savefig(path, dpi=100)


def new_figure(figsize: tuple[float, float]) -> Any:
    """An empty figure of matplotlib's, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")
