# SPDX-License-Identifier: Apache-2.0
"""What a wheel holds, and how its recipes are found from any folder."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tunix_gemma4.__main__ import main
from tunix_gemma4.recipes.shipped import find_recipe, recipe_names

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
    assert {"tunix_gemma4/presets/e2b.json", "tunix_gemma4/host/base_config.yaml"} <= wanted

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
