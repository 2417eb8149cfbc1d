# SPDX-License-Identifier: Apache-2.0
"""`tunix-gemma4 plan`: reads a recipe's file and prints its plan."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from ..recipes import common
from ..settings.grpo import GrpoRunConfig, load_grpo_config
from ..settings.load_config import Recipes, compose
from ..settings.sft import RunConfig, load_run_config
from .hardware import hardware
from .plan import GB, Plan, model_source, plan
from .programs import Shapes, resident_of
from .search import Search

# Of no account for a plan, and missing from the recipes.
_UNREAD = ("data.path=unread", "output_dir=unread")


def run(options: argparse.Namespace) -> int:
    """Prints the plan; 1 where it does not fit."""
    if jax.config.values["jax_platforms"] is None:
        # Nothing runs, so the chips that are here stay free; CUDA's plug-in wants a driver else.
        jax.config.update("jax_platforms", "cpu")
    topology, images, overrides = _split(options.overrides)
    config = load_settings(options.recipes, overrides)
    if topology is not None:
        config = config.on_devices(hardware(topology).chips)
    if options.weights:
        _print_weights(config, topology, options.json)
        return 0
    if topology is None:
        raise ValueError("topology must be given, such as topology=v5e:2x4 or topology=h200:8")
    say = (lambda text: print(text, file=sys.stderr)) if options.json else print
    found = plan(config, topology, images=images, settings=tuple(overrides))
    if not options.json:
        print(found.text(), flush=True)
    advice = _advice(config, found, images, say, more=options.search)
    if options.json:
        print(json.dumps(found.to_dict() | advice, indent=1))
    return 1 if found.fits is False else 0


def load_settings(recipes: Recipes, overrides: Sequence[str]) -> RunConfig | GrpoRunConfig:
    """The settings of recipes, which are those of `grpo` if they name reward functions."""
    keys = {*compose(recipes), *(override.split("=")[0] for override in overrides)}
    load = load_grpo_config if "reward_functions" in keys else load_run_config
    return load(recipes, [*_UNREAD, *overrides])


def _split(overrides: Sequence[str]) -> tuple[str | None, int | None, list[str]]:
    """Topology, images, and settings of the recipe."""
    topology, images, settings = None, None, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "topology":
            topology = value
        elif key == "images":
            if not value.isdigit():
                raise ValueError(f"images: expected a number of images in a row, found {value!r}")
            images = int(value)
        else:
            settings.append(override)
    return topology, images, settings


def _advice(
    config: RunConfig | GrpoRunConfig, found: Plan, images: int | None, say: Any, *, more: bool
) -> dict[str, Any]:
    """What was tried, and what came of it."""
    capacity = found.hardware.capacity
    if capacity is None or (found.fits and not more):
        return {}
    search = Search(config, found.hardware.name, images, say)
    say("tried:")
    if not found.fits:
        search.to_fit()
    greatest = dict([search.longest(capacity)])
    if found.fits:
        greatest |= dict([search.most_rows(capacity)])
    for name, value in greatest.items():
        say(f"greatest {name} that fits: {'none' if value is None else value}")
    tried = [dataclasses.asdict(one) for one in search.tried]
    return {"tried": tried, "greatest": greatest}


def _print_weights(config: RunConfig | GrpoRunConfig, topology: str | None, as_json: bool) -> None:
    model_config = common.model_config(config, model_source(config.model))
    chips = None if topology is None else hardware(topology)
    if config.mesh.fsdp < 0:
        raise ValueError("mesh.fsdp: -1 takes all devices, and no topology says how many")
    used = 0
    for name in ("mesh", "rollout_mesh"):
        shape = getattr(config, name, None)
        if shape is None or chips is None:
            continue
        count, beside = shape.fsdp * shape.tp, f" beside the {used} of mesh" if used else ""
        used += count
        if used > chips.chips:
            raise ValueError(
                f"{name}: fsdp {shape.fsdp} x tp {shape.tp} is {count} chips{beside}, and "
                f"{topology} has {chips.chips}"
            )
    sizes, kinds = (config.mesh.fsdp, config.mesh.tp), (AxisType.Auto, AxisType.Auto)
    mesh = AbstractMesh(sizes, ("fsdp", "tp"), axis_types=kinds)
    parts = dataclasses.asdict(resident_of(config, Shapes(model_config, mesh)))
    parts["total"] = sum(parts.values())
    parts["capacity"] = None if chips is None else chips.capacity
    if as_json:
        print(json.dumps({"bytes_per_chip": parts}, indent=1))
        return
    print(f"GB per chip on fsdp {config.mesh.fsdp} x tp {config.mesh.tp}:")
    for name, size in parts.items():
        if size:
            print(f"  {name:<12}{size / GB:8.2f}")
