# SPDX-License-Identifier: Apache-2.0
"""What a wheel holds, and how its recipes are found from any folder."""

import configparser
import importlib
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tunix_gemma4 import extras
from tunix_gemma4.__main__ import main
from tunix_gemma4.recipes import common
from tunix_gemma4.settings.grpo import load_grpo_config
from tunix_gemma4.settings.load_config import (
    find_recipe,
    recipe_list,
    recipe_names,
)
from tunix_gemma4.settings.sft import RunConfig

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta as b; b.{}('.')"


def build(what, folder):
    program = [sys.executable, "-c", BUILD.format(what)]
    subprocess.run(program, cwd=folder, check=True, capture_output=True)


def contents(folder):
    """Files of the package in the wheel that was built in `folder`."""
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_wheel_holds_every_file_of_the_package_and_the_recipes(tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("tunix_gemma4", "configs"):
        unread = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=unread)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    package = [path for path in (clone / "tunix_gemma4").rglob("*") if path.is_file()]
    wanted = {path.relative_to(clone).as_posix() for path in package}
    wanted |= {f"tunix_gemma4/configs/{name}.yaml" for name in recipe_names()}
    build("build_sdist", clone)
    build("build_wheel", clone)
    assert contents(clone) == wanted
    assert {"tunix_gemma4/presets/e2b.json", "tunix_gemma4/plugin/base_config.yaml"} <= wanted

    with tarfile.open(next(clone.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(tmp_path.glob("tunix_gemma4-*"))
    build("build_wheel", unpacked)
    assert contents(unpacked) == wanted


def test_recipes_of_the_package_are_those_at_the_top_level():
    top = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    assert set(recipe_names()) == {path.with_suffix("").as_posix() for path in top}


@pytest.mark.parametrize(
    "name",
    [
        "lora-image",
        "lora_image.yaml",
        "sft/lora-image",
        "sft/lora-image.yaml",
        "configs/sft/lora-image.yaml",
    ],
)
def test_recipe_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name).read_text() == (ROOT / "configs/sft/lora-image.yaml").read_text()
    # One's own file comes first.
    own = tmp_path / Path(name).with_suffix(".yaml")
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("seed: 1\n")
    assert find_recipe(name).resolve() == own


def test_unknown_recipe_is_answered_with_near_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("sft", "grpo", "plan"):
        assert main([command, "e2b", "sft/lora-images", "topology=cpu"]) == 2
        said = capsys.readouterr().err
        assert "sft/lora-images: there is no such file" in said
        assert "near are lora-image, qlora-image" in said
    assert main(["recipes", "zzz"]) == 2
    assert "there are 16, such as full-image, " in capsys.readouterr().err
    # A folder of data may be called like a recipe.
    (tmp_path / "gsm8k").mkdir()
    assert find_recipe("gsm8k").name == "gsm8k.yaml"
    # Neither a folder nor an absolute path means a recipe.
    with pytest.raises(ValueError, match="expected a YAML file, found a folder"):
        find_recipe(tmp_path)
    with pytest.raises(ValueError, match="there is no such file"):
        find_recipe(tmp_path / "lora-image.yaml")
    with pytest.raises(ValueError, match="there is no such file"):
        find_recipe("runs/e2b_lora_image.yaml")


def test_recipes_are_listed_and_printed(tmp_path, capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert printed == recipe_list() + "\n"
    lines = [line.split() for line in printed.splitlines() if line.startswith(" ")]
    assert [words[0] for words in lines] == [name.split("/")[1] for name in recipe_names()]
    assert "  e2b          Gemma 4 E2B: 9.3 GB of weights, 9.6 with the vision tower.\n" in printed
    assert main(["recipes", "grpo/gsm8k"]) == 0
    printed, file = capsys.readouterr().out, (ROOT / "configs/grpo/gsm8k.yaml").read_text()
    assert re.fullmatch(r"# gsm8k, and what they say .*\n#.*\n", printed.removesuffix(file))
    words = ["gsm8k", "26b-a4b", "v5e-8"]
    assert main(["recipes", *words]) == 0
    printed = capsys.readouterr().out
    given, printed_to = ["data.path=train.jsonl"], tmp_path / "mine.yaml"
    printed_to.write_text(printed)
    assert printed.startswith("# gsm8k 26b-a4b v5e-8, and what they say with each other")
    assert "\n# LoRA with rewards on text: GSM8K's numbers" in printed
    assert load_grpo_config([printed_to], given) == load_grpo_config(words, given)


def names_of_former_recipes():
    """What recipes were called when each was a whole file."""
    for size, task, chips in itertools.product(
        ("e2b", "e4b", "12b", "26b_a4b", "31b"),
        ("gsm8k", "images"),
        ("1gpu", "8gpu", "v5e8", "v5p8", "v6e8"),
    ):
        words = [task, size.replace("_", "-"), chips.replace("e8", "e-8").replace("p8", "p-8")]
        yield f"grpo/{size}_{task}_{chips}", words
    for size in ("e2b", "e4b", "26b_a4b", "31b"):
        yield f"{size}_lora_image.yaml", ["lora-image", size.replace("_", "-")]
    for task in ("lora-text", "qlora-image", "full-image"):
        yield f"configs/sft/e2b_{task.replace('-', '_')}.yaml", [task, "e2b"]


def test_former_name_is_answered_with_the_words_that_replace_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in names_of_former_recipes():
        place = f"output_dir=outputs/{Path(name).stem}"
        with pytest.raises(ValueError, match=rf"write {' '.join(words)}; a run .* with {place}$"):
            find_recipe(name)


def test_extras_that_pages_and_messages_name_exist():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = set(settings["options.extras_require"])
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    files += (ROOT / "tunix_gemma4").rglob("*.py")
    pattern = re.compile(r"(?:install [^`\n]*?[\"'.\w$-]|tunix-gemma4)\[([a-z][a-z0-9,-]*)\]")
    named = {
        extra
        for file in files
        for names in pattern.findall(file.read_text())
        for extra in names.split(",")
    }
    assert {"cuda", "tpu", "wandb", "parity", "demo", "aot"} <= named <= extras


@pytest.fixture
def without(monkeypatch, tmp_path):
    """`without("wandb")`: as if that were not installed, but for a folder that lies about."""

    def without(*modules):
        find = importlib.util.find_spec

        def find_spec(name, package=None):
            return None if name in modules else find(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    monkeypatch.chdir(tmp_path)
    return without


@pytest.mark.parametrize("recipe", ["sft lora-image e2b", "grpo images e2b 1gpu"])
def test_missing_wandb_is_one_line_before_anything_is_loaded(recipe, without, tmp_path, capsys):
    without("wandb")
    (tmp_path / "model").mkdir()
    settings = ["model=model", "data.path=none.jsonl", "output_dir=out", "report_to=wandb"]
    command, *words = recipe.split()
    assert main([command, *words, *settings]) == 2
    assert capsys.readouterr().err == (
        f"tunix-gemma4 {command}: report_to: wandb needs wandb, which is not installed; "
        "pip install 'tunix-gemma4[wandb]'\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "demo-rl"])
@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_missing_extra_of_a_demo_is_one_line_at_its_start(
    command, module, without, tmp_path, capsys
):
    without(module)
    assert main([command, "--output-dir", "out"]) == 2
    said = capsys.readouterr()
    assert f"needs {module}, which is not installed; pip install 'tunix-gemma4[demo]'" in said.err
    assert (said.err.count("\n"), said.out) == (1, "")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_way_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_of_runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert not extras.is_installed("wandb_of_runs")
    (tmp_path / "wandb_of_runs" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert extras.is_installed("wandb_of_runs")


def test_the_end_of_a_run_says_what_shows_its_curves(without, capsys):
    without("tensorboard")
    done = "2 steps done. Saved: model\n"
    for report_to in ("none", "wandb"):
        common.say_done(RunConfig(output_dir="out", report_to=report_to), 2, ["model"])
        assert capsys.readouterr().out == done
    common.say_done(RunConfig(output_dir="out"), 2, ["model"])
    curves = f"Curves: pip install tensorboard, then tensorboard --logdir {Path('out/tensorboard')}"
    assert capsys.readouterr().out == f"{curves}\n{done}"
