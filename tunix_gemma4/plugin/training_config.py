# SPDX-License-Identifier: Apache-2.0
"""Tunix's training configuration, from settings in the words of other trainers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from tunix.sft.metrics_logger import MetricsLoggerOptions, TensorboardBackend, WandbBackend
from tunix.sft.peft_trainer import TrainingConfig

from ..config.domains import require
from ..extras import require_extra
from .checkpoints import Kept

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"


def make_training_config(
    output_dir: str | Path,
    *,
    max_steps: int | None,
    gradient_accumulation_steps: int = 1,
    eval_steps: int = 100,
    save_steps: int = 100,
    save_total_limit: int = 3,
    keep_steps: Sequence[int] = (),
    report_to: str = "tensorboard",
) -> TrainingConfig:
    """A configuration that saves and logs below `output_dir`.

    Args:
        output_dir: gets `checkpoints/` and `tensorboard/`.
        max_steps, gradient_accumulation_steps, eval_steps, save_steps: in optimizer steps, and
            micro-batches of one.
        save_total_limit: checkpoints that are kept, the newest.
        keep_steps: steps whose checkpoints are kept besides.
        report_to: "tensorboard", "wandb" or "none".
    """
    fields = training_fields(
        output_dir,
        max_steps=max_steps,
        eval_steps=eval_steps,
        save_steps=save_steps,
        save_total_limit=save_total_limit,
        keep_steps=keep_steps,
        report_to=report_to,
    )
    # With one micro-batch the host would still keep a sum of gradients, as large as these.
    micro_batches = gradient_accumulation_steps if gradient_accumulation_steps > 1 else None
    return TrainingConfig(gradient_accumulation_steps=micro_batches, **fields)


def training_fields(
    output_dir: str | Path,
    *,
    max_steps: int | None,
    eval_steps: int = 100,
    save_steps: int = 100,
    save_total_limit: int = 3,
    keep_steps: Sequence[int] = (),
    report_to: str = "tensorboard",
) -> dict[str, Any]:
    """What the configurations of all of Tunix's trainers share; see `make_training_config`."""
    require(max_steps=max_steps, eval_steps=eval_steps)
    require(save_steps=save_steps, save_total_limit=save_total_limit)
    output_dir = Path(output_dir).absolute()
    return {
        "max_steps": max_steps,
        "eval_every_n_steps": eval_steps,
        "checkpoint_root_directory": str(output_dir / CHECKPOINTS),
        "checkpointing_options": ocp.CheckpointManagerOptions(
            save_interval_steps=save_steps,
            preservation_policy=Kept(save_total_limit, tuple(keep_steps)),
        ),
        "metrics_logging_options": _metrics_options(output_dir, report_to),
    }


def require_backend(report_to: str) -> None:
    """Raises ValueError where what `report_to` names is not installed."""
    if report_to == "wandb":
        require_extra("wandb", "wandb", "report_to: wandb")


def _metrics_options(output_dir: Path, report_to: str) -> MetricsLoggerOptions | None:
    """One backend. Tunix's own choice would also start a wandb run wherever wandb is installed."""
    directory = str(output_dir / TENSORBOARD)
    backends = {
        "tensorboard": functools.partial(TensorboardBackend, log_dir=directory),
        "wandb": functools.partial(WandbBackend, project="tunix-gemma4", name=output_dir.name),
    }
    if report_to == "none":
        return None
    if report_to not in backends:
        raise ValueError(f"report_to: expected tensorboard, wandb or none, found {report_to!r}")
    require_backend(report_to)
    return MetricsLoggerOptions(
        log_dir=directory, backend_kwargs={"custom_backend": [backends[report_to]]}
    )
