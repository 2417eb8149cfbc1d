# SPDX-License-Identifier: Apache-2.0
"""The planner: counted operations, the recipe's own programs, and what it finds to fit."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType

from tunix_gemma4.__main__ import main
from tunix_gemma4.lora.targets import linears, resolve
from tunix_gemma4.model.gemma4 import abstract_model
from tunix_gemma4.planning import plan as planner
from tunix_gemma4.planning.command import load_settings
from tunix_gemma4.planning.hardware import hardware
from tunix_gemma4.planning.measure import _asked, bits, count_flops
from tunix_gemma4.planning.programs import Shapes, resident_of
from tunix_gemma4.planning.search import largest
from tunix_gemma4.recipes import common, sft
from tunix_gemma4.testing.tiny import build_tiny_checkpoint

ROOT = Path(__file__).parents[1]
SFT = """
output_dir: out
text_only: true
lora: {rank: 4, alpha: 8, targets: language}
scan_layers: true
batch_size: 2
gradient_accumulation_steps: 2
data: {max_length: 64}
"""
GRPO = """
output_dir: out
lora: {rank: 4, alpha: 8, targets: language}
reward_functions: [exact_answer]
data: {max_prompt_length: 48, max_soft_tokens: 70}
num_generations: 2
max_completion_length: 8
batch_size: 2
beta: 0.04
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def shallow(directory, tmp_path_factory):
    """Of two layers, for plans that are compiled again and again."""
    source = json.loads((directory / "config.json").read_text())
    source["text_config"] |= {
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    path = tmp_path_factory.mktemp("shallow") / "model"
    shutil.copytree(directory, path)
    (path / "config.json").write_text(json.dumps(source))
    return path


def write(tmp_path, text, directory):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {directory}\n{text}")
    return str(path)


# ---- Operations.


def test_loops_and_recomputation_are_counted_as_often_as_they_run():
    def function(matrix, x):
        def body(x, _):
            return jax.checkpoint(lambda x: jnp.tanh(x @ matrix))(x), None

        return jax.lax.scan(body, x, None, length=5)[0].sum()

    traced = jax.jit(jax.grad(function)).trace(jnp.ones((8, 8)), jnp.ones((4, 8)))
    # Forward, forward again, and two products of the backward pass.
    assert count_flops(traced.jaxpr) == 5 * 4 * (2 * 4 * 8 * 8)


def test_branches_while_loops_and_convolutions():
    def function(x, kernel, choose):
        x = jax.lax.conv(x, kernel, (1, 1), "SAME")[0, 0]
        x = jax.lax.cond(choose, lambda x: x @ x, lambda x: x, x)
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x @ x, x)

    traced = jax.jit(function).trace(jnp.ones((1, 3, 8, 8)), jnp.ones((1, 3, 2, 2)), True)
    product = 2 * 8**3
    assert count_flops(traced.jaxpr, while_trips=7) == 2 * 64 * 12 + product + 7 * 2 * product


def test_a_kernel_that_says_how_much_it_does_is_believed():
    def function(x, estimate):
        def kernel(x_ref, y_ref):
            y_ref[...] = x_ref[...] @ x_ref[...]

        call = pl.pallas_call(kernel, x, grid=(3,), cost_estimate=estimate, interpret=True)
        return jax.make_jaxpr(call)(x)

    x, estimate = jnp.ones((8, 8)), pl.CostEstimate(flops=5, transcendentals=0, bytes_accessed=0)
    assert count_flops(function(x, None)) == 3 * 2 * 8**3
    assert count_flops(function(x, estimate)) == 5


# ---- Hardware.


def test_no_chips_are_refused():
    with pytest.raises(ValueError, match="topology: expected at least one chip, found 'cpu:0'"):
        hardware("cpu:0")


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v9:2x2", "h200:two", ""])
def test_unknown_chips_are_refused_with_those_that_are_known(topology):
    with pytest.raises(ValueError, match=r"topology: expected one such as v5e:2x4, .*h200:8"):
        hardware(topology)


@pytest.mark.parametrize(
    ("topology", "chips", "gb"), [("v5e:2x4", 8, 16.9), ("v5p:2x2x1", 4, 102.8), ("h200:8", 8, 141)]
)
def test_chips_and_their_memory(topology, chips, gb):
    found = hardware(topology)
    assert found.chips == chips
    assert found.capacity == pytest.approx(gb * 1e9, rel=1e-3)


def test_a_compiler_that_is_not_installed_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu, which is not installed; pip install .*\[aot\]"):
        hardware("v5e:2x4").devices()
    with pytest.raises(ValueError, match=r"jax_cuda12_plugin, which is not .*\[aot-gpu\]"):
        hardware("h200:8").devices()


def test_more_cpu_devices_than_there_are_are_refused():
    jax.devices()  # Before there are any, their number could still be set.
    with pytest.raises(ValueError, match="xla_force_host_platform_device_count=4096"):
        hardware("cpu:4096").devices()


def test_what_a_refused_program_asked_for_is_read_from_the_compilers_message():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.92G of 15.75G hbm"
    assert _asked(message, 7) == int(16.92 * 2**30)
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (17.92G) exceeds available HBM (15.75G). HLO module: jit_step"
    )
    assert _asked(message, 7) == int(17.92 * 2**30) + 7
    assert _asked("RESOURCE_EXHAUSTED: something else", 7) is None
    assert _asked("INTERNAL: something else Used 1.0G of 2.0G", 7) is None


# ---- Plans.


def test_a_plan_of_supervised_fine_tuning_has_the_compiled_steps_own_bytes(
    tmp_path, directory, capsys
):
    path = write(tmp_path, SFT, directory)
    assert main(["plan", path, "topology=cpu:2", "mesh.fsdp=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = found["bytes_per_chip"]
    step = found["programs"]["step"]
    compiled = step["arguments"] + step["outputs"] - step["aliased"] + step["temporaries"]
    assert parts["total"] == step["total"] == compiled + step["code"]
    assert parts["total"] == sum(size for name, size in parts.items() if name in _PARTS)
    assert found["flops_per_step"] == 2 * step["flops"]
    assert found["fits"] is None
    assert found["images_per_row"] == 0


@pytest.mark.parametrize(
    "settings, unread",
    # A tower that no image reaches is no argument of the program, and lies in memory all the same.
    [(["lora.quantize=nf4"], False), (["text_only=false", "images=0"], True)],
)
def test_the_parts_of_a_plan_are_never_negative_and_add_up(
    tmp_path, shallow, capsys, settings, unread
):
    path = write(tmp_path, SFT, shallow)
    assert main(["plan", path, "topology=cpu:1", *settings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = {name: size for name, size in found["bytes_per_chip"].items() if name in _PARTS}
    assert min(parts.values()) >= 0
    step, total = found["programs"]["step"], found["bytes_per_chip"]["total"]
    assert sum(parts.values()) == total == step["total"]
    compiled = step["arguments"] + step["outputs"] - step["aliased"] + step["temporaries"]
    assert (total > compiled + step["code"]) is unread
    resident = sum(parts[name] for name in ("weights", "adapters", "optimizer"))
    assert (resident > step["arguments"]) is unread


def test_quantised_weights_are_counted_in_bits(tmp_path, directory, capsys):
    path, weights = write(tmp_path, SFT, directory), {}
    for qtype in ("int8", "nf4"):
        arguments = ["plan", path, "--weights", "--json", f"lora.quantize={qtype}"]
        assert main([*arguments, "lora.targets=language"]) == 0
        weights[qtype] = json.loads(capsys.readouterr().out)["bytes_per_chip"]["weights"]
    model = abstract_model(planner.common.model_config(load_settings(path, []), str(directory)))
    kernels = sum(
        math.prod(linears(model)[name].kernel.shape) for name in resolve(model, "language")
    )
    assert weights["int8"] - weights["nf4"] == kernels / 2
    for dtype, count in ((jnp.int4, 4), (jnp.float8_e4m3fn, 8), (jnp.bfloat16, 16), (jnp.bool_, 8)):
        assert bits(jnp.dtype(dtype)) == count


_PARTS = (
    *("weights", "adapters", "optimizer", "reference", "logits", "caches", "code"),
    *("activations and other temporaries", "batch and results"),
)


def test_the_planned_step_is_the_one_that_the_recipe_compiles(tmp_path, directory, monkeypatch):
    """Its arguments and results have the shapes and dtypes of a real run's."""
    path = write(tmp_path, SFT, directory)
    rows = [{"messages": [{"role": r, "content": "ab"} for r in ("user", "assistant")]}] * 2
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [f"output_dir={tmp_path}/out", f"data.path={tmp_path}/train.jsonl", "max_steps=1"]
    config = load_settings(
        path, [*given, "data.bucket_lengths=[64]", "gradient_accumulation_steps=1"]
    )
    planned = planner.plan(config, "cpu:1").programs["step"]
    with planned.mesh:
        wanted = jax.tree.map(_kind, planned.trace().lower().in_avals)
    seen = []
    original = sft.Gemma4Trainer.jit_train_and_eval_step

    def spy(self, *args, **kwargs):
        step, evaluate = original(self, *args, **kwargs)

        def call(inputs):
            lowered = step.jitted_fn.trace(*step.arguments(), inputs).lower()
            seen.append(jax.tree.map(_kind, lowered.in_avals))
            return step(inputs)

        call.func = step
        return call, evaluate

    monkeypatch.setattr(sft.Gemma4Trainer, "jit_train_and_eval_step", spy)
    sft.run(config)
    assert jax.tree.leaves(seen[0]) == jax.tree.leaves(wanted)


def _kind(aval):
    return f"{aval.dtype}{list(aval.shape)}"


def test_a_plan_of_reinforcement_learning_has_rollouts_caches_and_the_reference(
    tmp_path, shallow, capsys
):
    path = write(tmp_path, GRPO, shallow)
    assert main(["plan", path, "topology=cpu:1", "images=0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["programs"]) == {"step", "log-probs", "rollout"}
    assert found["programs"]["rollout"]["beside"] > 0  # The optimizer waits meanwhile.
    assert found["bytes_per_chip"]["reference"] == 0  # The policy's own backbone.
    config = load_settings(path, ["lora=null"])
    full = planner.plan(config, "cpu:1", images=0)
    assert full.programs["step"].resident.reference > 0


def test_weights_alone_need_no_compiler_and_are_those_of_the_model(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "libtpu" else find_spec(name, *more),
    )
    path = write(tmp_path, SFT, "google/gemma-4-E2B-it")
    assert main(["plan", path, "--weights", "--json", "mesh.fsdp=2", "topology=v5e:2x4"]) == 0
    parts = json.loads(capsys.readouterr().out)["bytes_per_chip"]
    config = load_settings(path, ["mesh.fsdp=2"])
    settled = planner.common.model_config(config, planner.model_source(config.model))
    total = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(abstract_model(settled)))
    )
    assert parts["weights"] == pytest.approx(total / 2, rel=0.05)


def test_images_to_a_text_only_plan_and_an_unknown_model_are_refused(tmp_path, directory, capsys):
    path = write(tmp_path, SFT, directory)
    assert main(["plan", path, "topology=cpu:1", "images=1"]) == 2
    assert "images: expected 0 with text_only, found 1" in capsys.readouterr().err
    assert main(["plan", path, "topology=cpu:1", "model=gemma-3"]) == 2
    assert (
        "model: expected a checkpoint directory or google/gemma-4-SIZE" in capsys.readouterr().err
    )
    wide = ["--weights", "topology=v5e:1x1", "mesh.fsdp=4", "batch_size=4"]
    assert main(["plan", path, *wide]) == 2
    assert "fsdp 4 x tp 1 is 4 chips, and v5e:1x1 has 1" in capsys.readouterr().err
    assert main(["plan", path]) == 2
    assert "topology must be given, such as topology=v5e:2x4" in capsys.readouterr().err


# ---- What fits.


def test_the_budget_of_an_image_is_the_checkpoints_own_unless_it_is_given(tmp_path, directory):
    path = tmp_path / "recipe.yaml"
    path.write_text(SFT)
    for model, given, budget in (
        (str(directory), [], 70),
        (str(directory), ["data.max_soft_tokens=560"], 560),
        ("google/gemma-4-E2B-it", [], 280),
    ):
        config = load_settings(path, [f"model={model}", *given])
        assert planner.with_budget(config).data.max_soft_tokens == budget
    config = load_settings(path, [f"model={directory}", "data.max_soft_tokens=300"])
    with pytest.raises(ValueError, match="max_soft_tokens: expected one of .*, found 300"):
        planner.with_budget(config)


@pytest.mark.parametrize("start", [256, 1024, 8192])
def test_the_largest_that_fits_is_found_from_below_and_from_above(start):
    tries = []

    def total(length):
        tries.append(length)
        return 1_000_000 + 500 * length

    found = largest(total, 3_000_000, start=start, unit=256, limit=131_072)
    assert found == 3840
    assert len(tries) == len(set(tries)) <= 4


def test_the_largest_that_fits_is_tried_where_bytes_grow_faster_than_foretold():
    total = lambda length: 1_000_000 + length**2  # noqa: E731
    found = largest(total, 17_000_000, start=512, unit=256, limit=131_072)
    assert total(found) <= 17_000_000
    assert found >= 3584


def test_half_of_what_a_guess_was_lowered_by_is_tried():
    tries = []

    def total(length):
        tries.append(length)
        return length if length <= 25_900 else 10**6

    # Foretold is 26,624; a sixteenth less fits.
    assert largest(total, 26_700, start=8192, unit=256, limit=131_072) == 25_856
    assert tries == [8192, 16_384, 26_624, 25_088, 25_856]


def test_a_limit_counts_in_units():
    assert largest(lambda rows: 1, 5, start=3, unit=3, limit=4096) == 4095


def test_nothing_fits():
    assert largest(lambda length: 10, 5, start=512, unit=256, limit=1024) is None


def test_what_to_change_is_found_by_trying(tmp_path, shallow, capsys, monkeypatch):
    path = write(tmp_path, SFT, shallow)
    real = planner.hardware

    def small(topology):
        return dataclasses.replace(real(topology), capacity=small.capacity, flops=1e12)

    small.capacity = None
    monkeypatch.setattr(planner, "hardware", small)
    config = load_settings(path, [])
    whole = planner.plan(config, "cpu:1").total
    small.capacity = whole - 1
    assert main(["plan", path, "topology=cpu:1"]) == 1
    said = capsys.readouterr().out
    assert "does not fit in" in said
    assert "batch_size=1 gradient_accumulation_steps=4" in said
    assert "greatest data.max_length that fits: none" in said  # Its unit is a block, 256.


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x1", "v6e:2x4"])
def test_a_recipe_is_planned_for_every_tpu(topology, tmp_path, directory):
    chips = hardware(topology).chips
    given = [f"topology={topology}", f"mesh.fsdp={chips}", "batch_size=8", "--json"]
    command = [sys.executable, "-m", "tunix_gemma4", "plan", write(tmp_path, SFT, directory)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    del environment["JAX_PLATFORMS"]  # The planner sees to it.
    run = subprocess.run([*command, *given], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["chips"] == chips
    assert 0 < found["bytes_per_chip"]["total"] < found["bytes_per_chip"]["capacity"]


@pytest.mark.slow
def test_a_real_run_on_cpu_takes_what_was_planned():
    script = ROOT / "benchmarks" / "plan_check.py"
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(script.parents[1])}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    ratio = float(re.search(r"([\d.]+) of the plan", run.stdout)[1])
    assert 0.85 <= ratio <= 1.15


@functools.cache
def stored(fsdp, tp):
    """Bytes per chip of E2B with its tower, adapters on all of it, and the optimizer's state."""
    given = [f"mesh.fsdp={fsdp}", f"mesh.tp={tp}", "batch_size=8", "lora.targets=all"]
    config = load_settings(["lora-image", "e2b"], given)
    settled = common.model_config(config, planner.model_source(config.model))
    mesh = AbstractMesh((fsdp, tp), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    return sum(dataclasses.astuple(resident_of(config, Shapes(settled, mesh))))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1), (4, 2), (2, 4)])
def test_each_chip_stores_its_share_of_everything(mesh):
    assert stored(*mesh) * 8 <= 1.05 * stored(1, 1)


def test_chips_of_sampling_count_beside_those_of_training(tmp_path, directory, capsys):
    path = write(tmp_path, GRPO, directory)
    assert main(["plan", path, "--weights", "topology=h200:4", "mesh.fsdp=-1", "mesh.tp=2"]) == 0
    assert "GB per chip on fsdp 2 x tp 2:" in capsys.readouterr().out
    assert main(["plan", path, "--weights", "mesh.fsdp=-1"]) == 2
    assert "mesh.fsdp: -1 takes all devices, and no topology says" in capsys.readouterr().err
    meshes = ["mesh.fsdp=2", "rollout_mesh.fsdp=2"]
    assert main(["plan", path, "--weights", "topology=h200:4", *meshes]) == 0
    assert main(["plan", path, "--weights", "topology=h200:2", *meshes]) == 2
    assert "rollout_mesh: fsdp 2 x tp 1 is 2 chips beside the 2" in capsys.readouterr().err
