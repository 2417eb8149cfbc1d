# SPDX-License-Identifier: Apache-2.0
"""What a wheel holds, and how its recipes are found from any folder."""

import configparser
import importlib
import importlib.util
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
from tunix_gemma4.settings.sft import RunConfig
from tunix_gemma4.settings.shipped import find_recipe, recipe_names

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
        "e2b_lora_image",
        "e2b_lora_image.yaml",
        "sft/e2b_lora_image",
        "sft/e2b_lora_image.yaml",
        "configs/sft/e2b_lora_image.yaml",
    ],
)
def test_recipe_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name).read_text() == (ROOT / "configs/sft/e2b_lora_image.yaml").read_text()
    # One's own file comes first.
    own = tmp_path / Path(name).with_suffix(".yaml")
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("seed: 1\n")
    assert find_recipe(name).resolve() == own


def test_unknown_recipe_is_answered_with_near_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("sft", "grpo", "plan"):
        assert main([command, "sft/e2b_lora_images", "topology=cpu"]) == 2
        said = capsys.readouterr().err
        assert "sft/e2b_lora_images: there is no such file" in said
        assert "near are sft/e2b_lora_image, " in said
    assert main(["recipes", "zzz"]) == 2
    assert "there are 51, such as" in capsys.readouterr().err
    # Neither a folder nor an absolute path means a recipe.
    with pytest.raises(ValueError, match="expected a YAML file, found a folder"):
        find_recipe(tmp_path)
    with pytest.raises(ValueError, match="there is no such file"):
        find_recipe(tmp_path / "e2b_lora_image.yaml")


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out.split() == recipe_names()
    assert main(["recipes", "grpo/e2b_gsm8k_v5e8"]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "configs/grpo/e2b_gsm8k_v5e8.yaml").read_text()


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


@pytest.mark.parametrize("recipe", ["sft/e2b_lora_image", "grpo/e2b_images_1gpu"])
def test_missing_wandb_is_one_line_before_anything_is_loaded(recipe, without, tmp_path, capsys):
    without("wandb")
    (tmp_path / "model").mkdir()
    settings = ["model=model", "data.path=none.jsonl", "output_dir=out", "report_to=wandb"]
    command = recipe.split("/")[0]
    assert main([command, recipe, *settings]) == 2
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
