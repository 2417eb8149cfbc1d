# SPDX-License-Identifier: Apache-2.0
"""What a recipe will take, before there is a machine to run it on.

tunix-gemma4 plan images e2b v5e-8 topology=v5e:2x4

The recipe's own programs are compiled by the compiler of those chips, on shapes alone. Nothing is
loaded, and nothing runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..data.images import soft_tokens_of
from ..data.processor import image_slots
from ..plugin.register import register
from ..recipes import common
from ..settings.grpo import GrpoRunConfig
from ..settings.sft import RunConfig
from .hardware import Hardware, hardware
from .measure import Usage, measure
from .programs import Program, Shapes, grpo_programs, per_row_of, sft_programs

GB = 1e9
# Of a chip's peak: what a good step reaches.
UTILISATION = 0.4


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe takes on given chips. Bytes are of one chip.

    Attributes:
        chips: how many take part.
        settings: those that were tried, as `key=value`, besides the recipe's own.
        images: most images of a row that were reckoned with.
        programs: what is compiled, by name.
        usage: of each program.
        hardware: the chips.
        completions_per_row: of a training step's, how many share a row with their prompt; None:
            there are no completions.
    """

    chips: int
    settings: tuple[str, ...]
    images: int
    programs: dict[str, Program]
    usage: dict[str, Usage]
    hardware: Hardware
    completions_per_row: int | None = None

    def total_of(self, name: str) -> int:
        """Bytes in all while a program runs, what lies idle meanwhile included."""
        usage, program = self.usage[name], self.programs[name]
        # An argument that a program does not read, such as a tower without images, is not passed.
        unread = max(0, program.arguments - (usage.asked or usage.arguments))
        return usage.total + program.beside + unread

    @property
    def peak(self) -> str:
        """Name of the program that takes most."""
        return max(self.usage, key=self.total_of)

    @property
    def total(self) -> int:
        """Bytes at the most."""
        return self.total_of(self.peak)

    @property
    def fits(self) -> bool | None:
        """Whether that is within the capacity; None where this is not known."""
        return None if self.hardware.capacity is None else self.total <= self.hardware.capacity

    @property
    def flops(self) -> float:
        """Operations of one optimizer step, on all chips."""
        return sum(self.usage[name].flops * p.runs for name, p in self.programs.items())

    @property
    def seconds(self) -> float | None:
        """Of one optimizer step at `UTILISATION`; sampling is bound by memory and takes longer."""
        if self.hardware.flops is None:
            return None
        return self.flops / (self.chips * self.hardware.flops * UTILISATION)

    def parts(self) -> dict[str, int]:
        """Bytes of one chip while the largest program runs; their sum is `total`."""
        usage, program = self.usage[self.peak], self.programs[self.peak]
        found = dataclasses.asdict(program.resident)
        if usage.asked:
            found["everything else"] = self.total - sum(found.values())
            return found
        known = min(program.logits, usage.temporaries)
        caches = min(program.caches, usage.temporaries - known)
        found |= {
            "logits": known,
            "caches": caches,
            "activations and other temporaries": usage.temporaries - known - caches,
            "code": usage.code,
        }
        found["batch and results"] = self.total - sum(found.values())
        return found

    def text(self) -> str:
        """A table for people."""
        used = "" if self.chips == self.hardware.chips else f", of which {self.chips} take part"
        rows = f"images in a row: {self.images}"
        if self.completions_per_row is not None:
            rows += f"; completions in a row with their prompt: {self.completions_per_row}"
        lines = [f"{self.hardware.name}{used}; {rows}. GB per chip:"]
        for name, usage in self.usage.items():
            runs = self.programs[name].runs
            lines.append(
                f"  {name:<36}{self.total_of(name) / GB:8.2f}   {runs:g} x {usage.flops:.2e} FLOP"
            )
        lines.append(f"the largest is {self.peak}:")
        parts = {name: size for name, size in self.parts().items() if size}
        lines += [f"  {name:<36}{size / GB:8.2f}" for name, size in parts.items()]
        lines.append(f"  {'total':<36}{self.total / GB:8.2f}   {self._verdict()}")
        lines.append(f"{self.flops:.2e} FLOP in an optimizer step")
        if self.seconds is not None:
            lines[-1] += f": {self.seconds:.2f} s at {UTILISATION:.0%} of the chips' peak"
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.hardware.capacity is None:
            return ""
        return f"{'fits' if self.fits else 'does not fit'} in {self.hardware.capacity / GB:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "topology": self.hardware.name,
            "chips": self.chips,
            "settings": list(self.settings),
            "images_per_row": self.images,
            "completions_per_row": self.completions_per_row,
            "largest_program": self.peak,
            "bytes_per_chip": self.parts()
            | {"total": self.total, "capacity": self.hardware.capacity},
            "fits": self.fits,
            "flops_per_step": self.flops,
            "seconds_per_step_at_40_percent": self.seconds,
            "programs": {
                name: dataclasses.asdict(usage)
                | {"beside": self.programs[name].beside, "total": self.total_of(name)}
                for name, usage in self.usage.items()
            },
        }


def plan(
    config: RunConfig | GrpoRunConfig,
    topology: str,
    *,
    images: int | None = None,
    settings: tuple[str, ...] = (),
    only: Collection[str] = (),
) -> Plan:
    """Compiles what the recipe of `config` would run on `topology`.

    Args:
        config: of a recipe. `model` is a checkpoint directory, or the name of a released one such
            as google/gemma-4-E2B-it, of which nothing is read.
        topology: such as "v5e:2x4", "h200:8" or "cpu:8"; see `planning.hardware`.
        images: most images of a row; None: what the settings allow, or 0 for text only.
        settings: what was changed in `config`, to be told in the plan.
        only: names of the programs to compile; all if empty.

    Raises:
        ValueError: a topology or model that is not known, a compiler that is not installed, or a
            mesh that does not fit.
    """
    chips = hardware(topology)
    config = config.on_devices(chips.chips)
    devices = chips.devices()
    model_config = common.model_config(config, model_source(config.model))
    config = with_budget(config)
    count = images_of(config, model_config) if images is None else images
    if count and not model_config.has_vision:
        raise ValueError(f"images: expected 0 with text_only, found {count}")
    mesh = common.device_mesh(config.mesh, devices=devices)
    shapes, used = Shapes(model_config, mesh), mesh.size
    per_row = None
    if isinstance(config, RunConfig):
        found = sft_programs(config, shapes, count)
    else:
        register()
        sampler = _sampler(config, shapes, devices[mesh.size :])
        used += 0 if sampler is None else sampler.mesh.size
        found = grpo_programs(config, shapes, count, sampler)
        per_row = per_row_of(config, model_config, config.micro)
    found = [program for program in found if not only or program.name in only]
    return Plan(
        chips=used,
        settings=settings,
        images=count,
        programs={program.name: program for program in found},
        usage={program.name: _measured(program, chips) for program in found},
        hardware=chips,
        completions_per_row=per_row,
    )


def _sampler(config: GrpoRunConfig, shapes: Shapes, devices: Sequence[Any]) -> Shapes | None:
    """Makes the arrays of sampling on other chips, where it has its own."""
    if config.rollout_mesh is None:
        return None
    mesh = common.device_mesh(config.rollout_mesh, name="rollout_mesh", devices=devices)
    return Shapes(shapes.config, mesh)


def _measured(program: Program, chips: Hardware) -> Usage:
    with program.mesh:
        return measure(
            program.trace(),
            chips,
            resident=program.arguments,
            while_trips=program.while_trips,
        )


def model_source(model: str) -> Any:
    """A directory, or what the config.json of a released checkpoint says."""
    if Path(model).exists():
        return model
    name = model.rstrip("/").rsplit("/", 1)[-1].lower().replace("-", "_")
    factory = getattr(ModelConfig, name.replace("gemma_4_", "gemma4_"), None)
    if factory is None:
        released = "E2B, E4B, 12B, 26B-A4B, 31B"
        raise ValueError(
            f"model: expected a checkpoint directory or google/gemma-4-SIZE[-it] with SIZE one of "
            f"{released}, found {model!r}"
        )
    return factory().source


def with_budget(config: RunConfig | GrpoRunConfig) -> RunConfig | GrpoRunConfig:
    """The settings with the budget of an image that the recipe would take."""
    budget = soft_tokens_of(config.model, config.data.max_soft_tokens)
    data = dataclasses.replace(config.data, max_soft_tokens=budget)
    return dataclasses.replace(config, data=data)


def images_of(config: RunConfig | GrpoRunConfig, model_config: ModelConfig) -> int:
    """Most images of a row: the largest bucket, or as many as a prompt has room for."""
    if not model_config.has_vision:
        return 0
    if isinstance(config, GrpoRunConfig):
        budget = soft_tokens_of(config.model, config.data.max_soft_tokens)
        return image_slots(max(1, config.data.max_prompt_length // (budget + 2)))
    return max(config.data.image_buckets, default=0)
