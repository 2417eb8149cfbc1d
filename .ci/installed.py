# SPDX-License-Identifier: Apache-2.0
"""Uses an installed package as its user would, in the current folder; run by `.ci/wheel`."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import tunix_gemma4 as g4
from tunix_gemma4.settings.load_config import recipe_list, recipe_names


def command(*arguments: str, exit_code: int = 0) -> str:
    """Runs `tunix-gemma4` with these and returns what it printed."""
    line = ["tunix-gemma4", *arguments]
    print("$", *line, flush=True)
    run = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    print(run.stdout, flush=True)
    assert run.returncode == exit_code, f"expected exit code {exit_code}, found {run.returncode}"
    return run.stdout


installed = Path(sysconfig.get_paths()["purelib"])
assert Path(g4.__file__).is_relative_to(installed), f"{g4.__file__} is not the installed package"
g4.register()
factories = [name for name in dir(g4.ModelConfig) if name.startswith("gemma4_")]
assert len(factories) == 10, factories
for factory in factories:
    assert getattr(g4.ModelConfig, factory)().num_layers, factory
assert command("recipes") == recipe_list() + "\n"
assert len(recipe_names()) == 16

# Two steps meet no target, for which the exit code is 1.
short = ["max_steps=2", "batch_size=4"]
assert "the same answers: yes" in command("demo", *short, exit_code=1)
tiny = ["model=outputs/demo/base", "data.path=outputs/demo/data/digit_train.jsonl"]
command("sft", "lora-image", "e2b", *tiny, "data.max_soft_tokens=70", *short)
assert Path("outputs/lora-image_e2b/adapter/adapter_model.safetensors").is_file()
command("plan", "lora-text", "e2b", "--weights")
print("The wheel works:", sys.version.split()[0], installed)
