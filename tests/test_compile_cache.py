# SPDX-License-Identifier: Apache-2.0
"""Compiled programs on disk: where they lie, who decides, and that a second start finds them."""

import gc
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from tunix_gemma4.recipes import compile_cache
from tunix_gemma4.recipes.compile_cache import (
    AUTO,
    compilation_cache,
    default_directory,
    fast_start,
)

SETTINGS = (
    *("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"),
    "jax_enable_compilation_cache",
)


def in_use():
    return {name: jax.config.values[name] for name in SETTINGS}


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """JAX keeps programs, as it does unless told otherwise; the user's caches are elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    before = in_use()
    jax.config.update("jax_enable_compilation_cache", True)
    jax_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def kept(directory):
    return sorted(path.name.split("-")[0] for path in Path(directory).glob("*-cache"))


def compile_one(name):
    """Compiles a program of that name, a new one each time."""

    def program(x):
        return x + 1

    program.__name__ = name
    jax.jit(program)(jnp.zeros(3)).block_until_ready()


def test_programs_compiled_within_are_kept_and_others_not(cached, tmp_path):
    before = in_use()
    compile_one("early")
    with compilation_cache(str(tmp_path / "first")):
        compile_one("first")
    compile_one("between")
    with compilation_cache(str(tmp_path / "second")):
        compile_one("second")
    assert in_use() == before
    for name in ("first", "second"):
        assert [f"jit_{name}"] == [x for x in kept(tmp_path / name) if x.startswith("jit_")]
    assert (tmp_path / "first").stat().st_mode & 0o077 == 0


def test_settings_are_restored_when_a_run_fails(cached, tmp_path):
    before = in_use()
    with pytest.raises(KeyError), compilation_cache(str(tmp_path)):
        assert in_use() != before
        raise KeyError
    assert in_use() == before


def test_garbage_is_collected_less_often_while_a_recipe_runs():
    seen, before = [], gc.get_threshold()

    @fast_start
    def run(config):
        seen.append(gc.get_threshold())
        raise KeyError

    with pytest.raises(KeyError):
        run(types.SimpleNamespace(compilation_cache_dir=None))
    assert seen[0] > before == gc.get_threshold()


def test_default_is_in_the_users_cache_directory(cached, monkeypatch, tmp_path):
    with compilation_cache(AUTO):
        compile_one("kept")
    assert "jit_kept" in kept(tmp_path / "home" / "tunix_gemma4" / "compilation")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert default_directory() == Path("/somewhere/.cache/tunix_gemma4/compilation")


def test_jax_own_directory_is_used_instead(cached, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    before = in_use()
    with compilation_cache(str(tmp_path / "named")):
        assert in_use() == before
    assert not (tmp_path / "named").exists()


def test_the_outer_cache_is_used_by_what_runs_within(cached, tmp_path):
    with compilation_cache(str(tmp_path / "outer")), compilation_cache(str(tmp_path / "inner")):
        compile_one("within")
    assert "jit_within" in kept(tmp_path / "outer")
    assert not (tmp_path / "inner").exists()


def test_null_and_a_disabled_cache_keep_nothing(cached, tmp_path):
    before = in_use()
    with compilation_cache(None):
        assert in_use() == before
    jax.config.update("jax_enable_compilation_cache", False)
    before = in_use()
    with compilation_cache(AUTO):
        assert in_use() == before
    assert not (tmp_path / "home").exists()


def test_least_time_that_the_environment_names_stands(cached, monkeypatch, tmp_path):
    name = "jax_persistent_cache_min_compile_time_secs"
    with compilation_cache(str(tmp_path)):
        assert jax.config.values[name] == 0
    monkeypatch.setenv(name.upper(), "7")
    jax.config.update(name, 7.0)
    with compilation_cache(str(tmp_path)):
        assert jax.config.values[name] == 7


def test_named_directory_that_cannot_be_written_to_is_refused(cached, tmp_path):
    (tmp_path / "file").write_text("")
    before = in_use()
    expected = r"compilation_cache_dir: .*file/below cannot be written to .*or null to keep none"
    with (
        pytest.raises(ValueError, match=expected),
        compilation_cache(str(tmp_path / "file" / "below")),
    ):
        pass
    assert in_use() == before


def test_default_directory_that_cannot_be_written_to_is_done_without(
    cached, monkeypatch, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(compile_cache.logging.get_absl_logger(), "propagate", True)
    before = in_use()
    with compilation_cache(AUTO):
        assert in_use() == before
    assert "cannot be written to" in caplog.text
    assert "This run keeps none" in caplog.text


START = """
import json, sys
import jax
from tunix_gemma4.recipes import grpo, sft
from tunix_gemma4.settings.grpo import GrpoRunConfig, PromptConfig
from tunix_gemma4.settings.sft import DataConfig, RunConfig
from tunix_gemma4.lora import LoraConfig
from tunix_gemma4.settings.common import MeshConfig

model, folder, output = sys.argv[1:]
shared = {
    "model": model, "max_steps": 1, "num_train_epochs": None, "text_only": True,
    "lora": LoraConfig(rank=4), "mesh": MeshConfig(fsdp=2, tp=2), "report_to": "none",
}
prompts = PromptConfig(path=f"{folder}/prompts.jsonl", max_prompt_length=64)
data = DataConfig(f"{folder}/chat.jsonl", max_length=64, bucket_lengths=[64], image_buckets=[0])
recipes = [
    (sft.run, RunConfig(data=data, output_dir=f"{output}/sft", batch_size=4, **shared)),
    (grpo.run, GrpoRunConfig(
        data=prompts, output_dir=f"{output}/grpo", batch_size=2, num_generations=2,
        max_completion_length=4, reward_functions=[f"{folder}/rewards.py:length"], **shared)),
]
counts = {}
for run, config in recipes:
    def count(event, **_):
        counts[event] = counts.get(event, 0) + 1
    # Anew for each run, because Tunix takes all listeners off when a trainer closes.
    jax.monitoring.register_event_listener(count)
    run(config)
print("counts", json.dumps(counts))
"""


def test_second_start_compiles_nothing(tiny_checkpoint, tmp_path):
    question = {"role": "user", "content": "What digit is this?"}
    row = {"messages": [question, {"role": "assistant", "content": "7"}]}
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    prompt = {"prompt": "What is 7?", "answer": "7"}
    (tmp_path / "prompts.jsonl").write_text("\n".join([json.dumps(prompt)] * 2))
    (tmp_path / "rewards.py").write_text(
        "def length(prompts, completions, **_):\n"
        "    return [len(said['content']) / 9 for (said,) in completions]\n"
    )
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "XDG_CACHE_HOME": str(tmp_path / "home"),
    }
    counts = []
    for number in range(2):
        output = str(tmp_path / f"run{number}")
        command = [sys.executable, "-c", START, str(tiny_checkpoint("demo")), str(tmp_path), output]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        line = next(line for line in run.stdout.splitlines() if line.startswith("counts "))
        counts.append(json.loads(line.removeprefix("counts ")))
    event = "/jax/compilation_cache/"
    first, second = counts
    assert first[f"{event}cache_misses"] > 5
    assert f"{event}cache_misses" not in second
    requests = f"{event}compile_requests_use_cache"
    assert second[f"{event}cache_hits"] == second[requests] == first[requests]
