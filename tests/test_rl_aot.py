# SPDX-License-Identifier: Apache-2.0
"""What RL compiles to on eight chips that are not here: rows stay apart, no logits are whole.

Real widths, vocabulary and images of E2B, one decoder layer of each kind and one vision layer.
`benchmarks/rl_memory.py` has the whole depth, 31B, and other meshes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "rl_memory.py"
FSDP, TP = 4, 2


def compiled(platform: str) -> dict[str, dict]:
    """What the benchmark says of each program, by the program's name."""
    options = ["--layers=2", "--prompt=192", "--completion=128", "--json"]
    options += [f"--platform={platform}", f"--mesh={FSDP}x{TP}"]
    # Pieces of the suite that set them mean fake CPU devices.
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(_SCRIPT.parents[1])}
    run = subprocess.run(
        [sys.executable, str(_SCRIPT), *options], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {line["program"]: line for line in lines}


def assert_sharded(programs: dict[str, dict]) -> None:
    assert list(programs) == ["logps", "score", "step"]
    for name, found in programs.items():
        # Without the constraints the decoder works on all rows and a part of the width.
        assert found["all_rows"] == [], name
        assert found["own_rows"] > 100, name
        assert found["all_words"] == [], name
        assert {"all-gather", "all-reduce"} <= set(found["collectives"]), name
    # Weights of 1 GB over eight chips, but for the few that only fsdp or tp divides.
    weights = programs["logps"]["argument"]
    assert weights < 1.2 * programs["logps"]["weights"] / (FSDP * TP) + 10e6
    # A whole float32 copy of the logits of completions is 8 * 128 MiB.
    assert programs["step"]["temp"] < 8 * 128 * 2**20


def test_three_programs_on_tpu_keep_rows_apart_and_hold_no_logits():
    assert_sharded(compiled("tpu"))


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="no CUDA compiler: needs the extra `aot-gpu`",
)
def test_three_programs_on_gpu_keep_rows_apart_and_hold_no_logits():
    assert_sharded(compiled("gpu"))
