# SPDX-License-Identifier: Apache-2.0
"""The demo of reinforcement learning goes through, and its data and judgements are right."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tunix_gemma4.__main__ import main
from tunix_gemma4.demos import demo_rl
from tunix_gemma4.demos.demo_rl import Curve, Panel, draw
from tunix_gemma4.testing import digits

ROOT = Path(__file__).parent.parent


def curve(accuracies, rewards=(0.5, 0.75)):
    """A run of two steps."""
    rows = [{"step": step} | dict.fromkeys(demo_rl.FIELDS[1:], math.nan) for step in range(3)]
    for row, accuracy in zip(rows, accuracies, strict=True):
        row["held_out"] = accuracy
    for row, reward in zip(rows[1:], rewards, strict=True):
        row |= {"reward": reward, "agreement_max": 1e-6, "seconds": 0.5}
    return Curve(rows)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("rl", ROOT / "benchmarks/rl_learning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo_trains_a_start_then_rewards_it_and_fails_when_a_target_is_missed(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(digits, "NUM_HELD_OUT", 40)
    load = demo_rl.load_run_config

    def short(path, overrides):
        return load(path, [*overrides, "max_steps=1", "batch_size=4"])

    monkeypatch.setattr(demo_rl, "load_run_config", short)
    output = tmp_path / "demo-rl"
    overrides = ["max_steps=2", "batch_size=2", "num_generations=2", "num_iterations=2"]
    assert main(["demo-rl", "--output-dir", str(output), *overrides]) == 1
    assert "MISSED" in capsys.readouterr().out
    made = Curve.read(output / "curve.csv")
    assert [row["step"] for row in made.rows] == [0, 1, 2]
    assert made.column("held_out")[0].tolist() == [0, 2]
    # Both steps are on the same completions.
    for name in ("reward", "agreement_mean", "agreement_max"):
        assert made.column(name)[0].tolist() == [1], name
    for name in ("entropy", "seconds"):
        assert made.column(name)[0].tolist() == [1, 2], name
    assert made.column("agreement_max")[1].max() < 1e-3
    assert Image.open(output / "curve.png").size == (450, 650)


def test_sums_are_all_those_of_two_digits_each_once():
    pairs = demo_rl.problems()
    every = {(a, b) for a in range(10, 100) for b in range(10, 100) if a + b < 100}
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == every
    assert pairs == demo_rl.problems()
    assert pairs != sorted(pairs)


def test_no_sum_is_held_out_that_was_trained_on_either_way_round(tmp_path):
    data = demo_rl.write_sums(tmp_path)
    train = [json.loads(line) for line in data.train.read_text("utf-8").splitlines()]
    assert len(data.held_out) == digits.NUM_HELD_OUT

    def numbers(rows):
        return {tuple(map(int, row["messages"][0]["content"].split("+"))) for row in rows}

    trained, held_out = numbers(train), numbers(data.held_out)
    assert len(trained) + len(held_out) == len(demo_rl.problems())
    assert not trained & {(b, a) for a, b in held_out}
    assert not trained & held_out
    for row in [*train, *data.held_out]:
        question, answer = (message["content"] for message in row["messages"])
        assert sum(map(int, question.split("+"))) == int(answer)


def test_blanked_scans_keep_their_size_and_answers_and_show_nothing(tmp_path):
    blank = demo_rl.digits(tmp_path / "blank", blank=True)
    seen = demo_rl.digits(tmp_path / "seen")
    assert len(blank.data.held_out) == len(seen.data.held_out) == digits.NUM_HELD_OUT
    for white, scan in zip(blank.data.held_out[:20], seen.data.held_out[:20], strict=True):
        assert white["messages"][1] == scan["messages"][1]
        pictures = [
            np.asarray(Image.open(row["messages"][0]["content"][0]["image"]))
            for row in (white, scan)
        ]
        assert pictures[0].shape == pictures[1].shape
        assert pictures[0].std() == 0 and pictures[1].std() > 0
    start = [json.loads(line) for line in blank.start_data.train.open(encoding="utf-8")]
    assert "blank" not in start[0]["messages"][0]["content"][0]["image"].rpartition("/")[2]


def test_curve_survives_its_file(tmp_path):
    written = curve([0.4, math.nan, 0.9])
    written.write(tmp_path / "curve.csv")
    read = Curve.read(tmp_path / "curve.csv")
    np.testing.assert_equal(
        [list(row.values()) for row in read.rows],
        [[row[name] for name in demo_rl.FIELDS] for row in written.rows],
    )
    assert (read.before, read.after) == (0.4, 0.9)


def test_picture_has_two_rows_of_a_panel_each(tmp_path):
    curves = [curve([0.4, math.nan, 0.9]), curve([0.5, math.nan, 0.8])]
    panels = [Panel("a", curves, goal=0.85), Panel("b", curves)]
    draw(panels, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (900, 650)


@pytest.mark.parametrize(
    ("name", "accuracies", "passed"),
    [
        ("grpo", (0.4, 0.86), True),
        ("grpo", (0.4, 0.84), False),
        ("gspo", (0.25, 0.9), False),
        ("gspo", (0.65, 0.9), False),
        ("sums", (0.3, 0.46), True),
        ("sums", (0.3, 0.44), False),
        ("sums", (0.1, 0.9), False),
        ("blank", (0.1, 0.19), True),
        ("blank", (0.1, 0.2), False),
    ],
)
def test_benchmark_judges_every_run_by_its_targets(benchmark, name, accuracies, passed, capsys):
    good = {"grpo": (0.5, 0.9), "gspo": (0.5, 0.9), "sums": (0.2, 0.5), "blank": (0.1, 0.1)}
    curves = [curve([before, math.nan, after]) for before, after in (good[name], accuracies)]
    assert benchmark.judge(name, curves) is passed
    assert ("MISSED" in capsys.readouterr().out) is not passed


def test_committed_curves_are_whole_and_meet_the_targets(benchmark):
    runs = {path.stem: Curve.read(path) for path in benchmark.RESULTS.glob("*.csv")}
    wanted = {f"{name}_{seed}" for name in ("grpo", "gspo", "sums") for seed in benchmark.SEEDS}
    assert set(runs) == wanted | {"blank_0"}
    for name in benchmark.SETS:
        curves = [run for stem, run in runs.items() if stem.startswith(f"{name}_")]
        for found in curves:
            assert [row["step"] for row in found.rows] == list(range(len(found.rows)))
        assert benchmark.judge(name, curves)
    assert (benchmark.RESULTS / "curves.png").is_file()
