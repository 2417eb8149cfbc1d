# SPDX-License-Identifier: Apache-2.0
"""The scripts of benchmarks/ that measure speed, each in its tiny form."""

import csv
import importlib
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """`script(name)` imports a script, which finds its neighbours as when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_script_finds_what_it_imports(script, name):
    assert script(name).__doc__


@pytest.mark.parity
def test_cpu_speed_compares_equal_models_in_every_work(script, capsys):
    cpu_speed = script("cpu_speed")
    options = cpu_speed.parse(["--tiny", "--repeats", "1"])
    cpu_speed.table(options)  # Raises where parameters or results differ.
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line for line in printed.splitlines() if " / ours" in line}
    assert tuple(rows) == cpu_speed.WORKS
    for line in rows.values():
        seconds = [float(value) for value in re.findall(r"([\d.]+)s ", line)]
        # The last is the limit, of so few numbers here that it may be printed as 0.
        assert len(seconds) == 4 and min(seconds[:3]) > 0
    assert cpu_speed._least(2**18, 4, time.perf_counter) > 0
    assert "same tokens 100%" in rows["decode"]


def test_cpu_speed_refuses_results_that_differ(script):
    agree = script("cpu_speed").agree
    assert agree("step", {"a": 2.0, "b": 2.0001}) == "apart 5e-05"
    with pytest.raises(SystemExit, match="step: results are 1.0e-01 of the largest apart"):
        agree("step", {"a": 2.0, "b": 2.2})
    assert agree("decode", {"a": [[1, 2]], "b": [[1, 3]]}) == "same tokens 50%"


@pytest.mark.parity
def test_both_sides_of_the_image_curve_compute_the_same(script, tmp_path):
    models, peers = script("cpu_models"), script("cpu_peers")
    directory = models.write_checkpoint(tmp_path, tiny=True, images=True)
    inputs = models.draw_inputs(models.read_config(directory), 2, 24, 2)
    ours, theirs = models.Ours(directory), peers.Transformers(directory)
    assert ours.parameters == theirs.parameters
    found, expected = np.asarray(ours.forward(inputs)), theirs.forward(inputs)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    blank = inputs._replace(images=np.concatenate([0 * inputs.images[..., :-2],
                                                   inputs.images[..., -2:]], axis=-1))  # fmt: skip
    assert np.abs(found - np.asarray(ours.forward(blank))).max() > 1e-2


def test_a_curve_ends_where_time_or_memory_does(script, monkeypatch):
    scaling, cpu_speed = script("cpu_scaling"), script("cpu_speed")
    options = cpu_speed.parse(["--scaling", "--limit", "10"])
    seconds = iter([1.0, 4.0, 6.0])
    done = scaling.subprocess.CompletedProcess

    def slow(command, **_):
        return done(command, 0, json.dumps({"seconds": next(seconds)}), "")

    monkeypatch.setattr(scaling.subprocess, "run", slow)
    rows = list(scaling.curve("model", "tokens", "forward", "Ours", options))
    assert [row["value"] for row in rows] == [256, 512, 1024, 2048]
    assert [row["tokens_per_second"] for row in rows[:3]] == ["256.0", "128.0", "170.7"]
    assert rows[-1]["end"] == "would take over 10 s"

    full = done([], 1, "", "jaxlib.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory")
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: full)
    rows = list(scaling.curve("model", "tokens", "forward", "Tunix", options))
    assert [row["end"] for row in rows] == ["out of memory"]

    broken = done([], 1, "", "ValueError: no")
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: broken)
    with pytest.raises(SystemExit, match="ValueError: no"):
        list(scaling.curve("model", "tokens", "forward", "Tunix", options))


def test_the_curves_are_drawn_from_their_csv(script, tmp_path):
    pytest.importorskip("matplotlib")
    scaling = script("cpu_scaling")
    source, target = tmp_path / "scaling.csv", tmp_path / "scaling.png"
    with source.open("w", newline="") as file:
        rows = csv.DictWriter(file, scaling.FIELDS)
        rows.writeheader()
        for axis, values in (("tokens", (256, 512)), ("images", (0, 1))):
            for value in values:
                rows.writerow(dict(zip(scaling.FIELDS, (axis, "step", "Ours", value, 9, 1, ""),
                                       strict=True)))  # fmt: skip
    scaling.draw(source, target)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_gpu_speed_measures_decoding_and_a_step_of_tiny_models(script):
    gpu_speed = script("gpu_speed")
    settings = ["--tiny", "--sides", "ours", "--sizes", "e2b", "--repeats", "3"]
    options = gpu_speed.parse(settings)
    rows = gpu_speed.rows(options)
    assert [(row["work"], row["batch"]) for row in rows] == [
        ("decode", 1),
        ("decode", 2),
        ("step", 1),
    ]
    decode, step = (gpu_speed.measure(row, options) for row in (rows[1], rows[2]))
    for name in ("tokens_per_second", "bandwidth", "share_of_limit"):
        assert decode[name] > 0
    for name in ("tokens_per_second", "rate", "utilisation"):
        assert step[name] > 0
    assert "of the limit at" in gpu_speed.describe(decode)
    assert "TFLOP/s (measured)" in gpu_speed.describe(step)


def test_gpu_speed_counts_the_weights_and_flops_of_e2b(script):
    gpu_speed = script("gpu_speed")
    config = gpu_speed.make_config("e2b", tiny=False)
    weights = gpu_speed.weights_per_token(config)
    # Google's count outside the per-layer table, head included: 2.3 billion.
    assert 2.2e9 < weights < 2.4e9
    # A row of one token attends to itself: two products of N x H, forward and twice backward.
    heads = sum(spec.head_dim * config.num_attention_heads for spec in config.layers)
    assert gpu_speed.model_flops(config, 2, 1) == 2 * (4 * weights + 3 * 4 * heads)


@pytest.mark.parity
def test_gpu_speed_measures_transformers_too(script):
    gpu_speed = script("gpu_speed")
    options = gpu_speed.parse(["--tiny", "--sides", "transformers", "--repeats", "1"])
    rows = gpu_speed.rows(options)
    step = gpu_speed.measure(rows[2], options)
    assert step["tokens_per_second"] > 0
    quantised = gpu_speed.measure(rows[-1], options)
    assert quantised["size"] == "31b"
    assert "bitsandbytes" in quantised["skipped"] or quantised["tokens_per_second"] > 0


def test_collectives_count_as_often_as_their_loops_run(script):
    text = """HloModule step
%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %x = bf16[2,4]{1,0} parameter(0)
  %g = bf16[8,4]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], metadata={op_name="jit(step)/take"}
  %two = s32[] constant(2)
  %more = s32[] add(%i, %two)
  ROOT %r = (s32[], bf16[8,4]) tuple(%more, %g)
}
%all-reduce-scatter.1 (p: f32[16]) -> f32[8] {
  %s = f32[16]{0} all-reduce(%p), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
}
%inner (p: f32[16]) -> f32[16] {
  %s = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add
}
%cond (p: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %l = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (a: bf16[2,4]) -> f32[16] {
  %w = (s32[], bf16[8,4]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %b = (f32[8]{0}, f32[8]{0}) all-gather-start(%c), replica_groups=[1,1]<=[1]
  %f = f32[16]{0} fusion(%a), kind=kLoop, calls=%inner
  %h = f32[16]{0} fusion(%b), kind=kLoop, calls=%inner
  %i = f32[8]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501
    found = script("collectives").collectives(text)
    assert [(one.kind, one.times, one.name) for one in found] == [
        ("all-gather", 5, "jit(step)/take"),
        ("all-gather", 1, ""),
        ("all-reduce", 1, ""),
        ("reduce-scatter", 1, ""),
    ]
    # Three of four parts of 64 bytes; nothing from oneself; half of 64 bytes, there and back.
    assert [one.arrives for one in found] == [48, 0, 64, 48]
    unsaid = text.replace("known_trip_count", "other")
    assert script("collectives").collectives(unsaid)[0].times == 2
    with pytest.raises(ValueError, match="trips are not known"):
        script("collectives").collectives(unsaid.replace("LT", "NE"))
