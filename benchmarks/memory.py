# SPDX-License-Identifier: Apache-2.0
"""Memory per chip and operations of training, from the compilers of chips that are not here.

    python benchmarks/memory.py                 # every case; half an hour on two cores
    python benchmarks/memory.py lora-2048       # one of them
    python benchmarks/memory.py --quick --check # cut models; fails if worse than recorded

Each case is a recipe's own program on shapes (`tunix_gemma4.plan`), with masks, packing and the
optimizer's update. `peer` is the temporary memory of Tunix 0.1.7's own model doing the same work
with the same compiler; benchmarks/compile_time.py measures some of it anew. Recorded values are in
benchmarks/memory.json; `--record` writes those that were just measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import tunix_gemma4
from tunix_gemma4 import ModelConfig
from tunix_gemma4.planning.command import load_settings
from tunix_gemma4.planning.plan import GB, Plan, plan

RECORD = Path(__file__).with_suffix(".json")
# How much worse than recorded is a failure.
TOLERANCE = 1.05


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
        recipe: names of recipes.
        settings: that differ from the file's.
        topology: chips.
        program: of the recipe.
        images: in a row.
        peer: temporary GB per chip of Tunix 0.1.7, and operations per chip; None: not measured.
        layers: the decoder's depth, where it is cut; the tower's is then 1.
    """

    recipe: str
    settings: str
    topology: str
    program: str = "step"
    images: int = 0
    peer: tuple[float, float | None] | None = None
    layers: int | None = None


def _logps(rows: int, length: int) -> str:
    """One prompt of one token, and so log-probabilities of all others."""
    return (
        f"data.max_prompt_length=1 max_completion_length={length - 1} num_generations={rows} "
        "batch_size=1 train_micro_batch_size=1 rollout_micro_batch_size=1 beta=0.04"
    )


_SFT, _IMAGE, _GRPO = "lora-text e2b", "lora-image e2b", "gsm8k e2b v5e-8"
_LORA = "gradient_accumulation_steps=1 mesh.fsdp={} batch_size={} data.max_length={}"
_GRPO_STEP = (
    "data.max_prompt_length={} max_completion_length={} num_generations=8 batch_size=1 "
    "train_micro_batch_size=1 rollout_micro_batch_size=1"
)
_GRPO_IMAGE = (
    "data.max_prompt_length=512 max_completion_length=128 batch_size=8 "
    "train_micro_batch_size=8 rollout_micro_batch_size=8"
)

CASES = {
    "logps-1024": Case(_GRPO, _logps(8, 1024), "v5e:2x4", "log-probs", peer=(5.40, 5.09e12)),
    "logps-8192": Case(
        _GRPO, _logps(4, 8192) + " mesh.fsdp=4", "v5p:2x2x1", "log-probs", peer=(25.8, 6.09e13)
    ),
    "lora-2048": Case(_SFT, _LORA.format(4, 4, 2048), "v5p:2x2x1", peer=(6.91, 3.36e13)),
    "lora-8192": Case(_SFT, _LORA.format(4, 4, 8192), "v5p:2x2x1", peer=(27.4, 2.04e14)),
    "lora-8192-v5e": Case(_SFT, _LORA.format(8, 8, 8192), "v5e:2x4"),
    "grpo-2048": Case(_GRPO, _GRPO_STEP.format(1024, 1024), "v5e:2x4"),
    # Where grpo_peer.py compiles Tunix's.
    "grpo-2048-v5p": Case(_GRPO, _GRPO_STEP.format(1024, 1024), "v5p:2x2x2", peer=(12.32, None)),
    # Eight completions share a row with their prompt and its image, or have a row each.
    "grpo-image-shared": Case("images e2b v5e-8", _GRPO_IMAGE, "v5e:2x4", images=1),
    "grpo-image-separate": Case(
        "images e2b v5e-8", _GRPO_IMAGE + " completions_per_row=1", "v5e:2x4", images=1
    ),
    "image-1024": Case(_IMAGE, _LORA.format(8, 8, 1024) + " lora.targets=all", "v5e:2x4", images=1),
    "full-1024": Case(
        "full-image e2b",
        _LORA.format(8, 8, 1024) + " text_only=true",
        "v5e:2x4",
    ),
    "31b-lora-3072": Case(
        "lora-image 31b",
        _LORA.format(1, 1, 3072) + " mesh.tp=4 text_only=true",
        "v5p:2x2x1",
        peer=(2.80, 1.62e14),
    ),
    "31b-qlora-2048": Case(
        "lora-image 31b",
        _LORA.format(1, 1, 2048) + " mesh.tp=1 lora.quantize=nf4 text_only=true",
        "h200:1",
    ),
    "26b-a4b-lora-2048": Case(
        "lora-image 26b-a4b", _LORA.format(8, 8, 2048) + " text_only=true", "v5e:2x4"
    ),
}
QUICK = {
    "quick-logps-1024": dataclasses.replace(CASES["logps-1024"], layers=4, peer=None),
    "quick-lora-2048": dataclasses.replace(CASES["lora-2048"], layers=4, peer=None),
}


def cut(config: ModelConfig, layers: int) -> dict:
    """What config.json would say of the model with fewer layers, of alternating kinds."""
    source = json.loads(json.dumps(config.source))
    text = source["text_config"]
    text["num_hidden_layers"] = layers
    text["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    text["num_kv_shared_layers"] = layers // 2 if text.get("num_kv_shared_layers") else 0
    source["vision_config"]["num_hidden_layers"] = 1
    return source


def measured(case: Case) -> Plan:
    """The plan of a case."""
    settings = case.settings.split()
    with tempfile.TemporaryDirectory() as directory:
        if case.layers is not None:
            source = cut(ModelConfig.gemma4_e2b_it(), case.layers)
            (Path(directory) / "config.json").write_text(json.dumps(source))
            settings.append(f"model={directory}")
        config = load_settings(case.recipe.split(), settings)
        return plan(config, case.topology, images=case.images, only=(case.program,))


def figures(case: Case) -> dict[str, float]:
    """Bytes and operations per chip."""
    found = measured(case)
    usage = found.usage[case.program]
    return {
        "temporaries": usage.temporaries,
        "total": found.total,
        "capacity": found.hardware.capacity,
        "flops": usage.flops / found.chips,
        "seconds": round(usage.seconds, 1),
    }


def line(name: str, case: Case, found: dict[str, float]) -> str:
    peer = "" if case.peer is None else f"{case.peer[0]:8.2f}"
    peer_flops = "" if case.peer is None or case.peer[1] is None else f"{case.peer[1]:.2e}"
    return (
        f"{name:<20}{case.topology:<11}{found['temporaries'] / GB:8.2f}{peer:>8}"
        f"{found['total'] / GB:8.2f} of {found['capacity'] / GB:6.1f}"
        f"{found['flops']:11.2e}{peer_flops:>10}{found['seconds']:8.0f}"
    )


def worse(name: str, found: dict[str, float], recorded: dict[str, dict[str, float]]) -> list[str]:
    """What exceeds its recorded value by more than the tolerance."""
    if name not in recorded:
        return [f"{name}: nothing is recorded; run with --record"]
    return [
        f"{name}: {key} {found[key]:.4g}, recorded {recorded[name][key]:.4g}"
        for key in ("temporaries", "total", "flops")
        if found[key] > TOLERANCE * recorded[name][key]
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="*", help=f"of {', '.join([*CASES, *QUICK])}; default: all")
    parser.add_argument("--quick", action="store_true", help="the cut models instead")
    parser.add_argument("--check", action="store_true", help="fail where worse than recorded")
    parser.add_argument("--record", action="store_true", help="write what was measured")
    arguments = parser.parse_args(argv)
    cases = CASES | QUICK
    names = arguments.case or [*(QUICK if arguments.quick else CASES)]
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"unknown case {unknown[0]}; known are {', '.join(cases)}")
    tunix_gemma4.register()
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    failures = []
    print(f"{'case':<20}{'chips':<11}{'temp GB':>8}{'peer':>8}{'total GB':>18}"
          f"{'FLOP':>13}{'peer':>8}{'seconds':>10}")  # fmt: skip
    for name in names:
        found = figures(cases[name])
        print(line(name, cases[name], found), flush=True)
        failures += worse(name, found, recorded)
        if arguments.record:
            recorded[name] = {key: found[key] for key in ("temporaries", "total", "flops")}
            RECORD.write_text(json.dumps(recorded, indent=1) + "\n")
    if arguments.check:
        print("\n".join(failures), file=sys.stderr)
        return 1 if failures else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
