# SPDX-License-Identifier: Apache-2.0
"""Tunix's training configurations, from the settings of a run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

import orbax.checkpoint as ocp
from tunix.sft.metrics_logger import MetricsLoggerOptions, TensorboardBackend, WandbBackend
from tunix.sft.peft_trainer import TrainingConfig

from ..config.domains import require_fields
from ..extras import require_extra
from ..settings.common import TrainSettings
from ..settings.sft import RunConfig
from .checkpoints import Kept

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"

Config = TypeVar("Config", bound=TrainingConfig)


def make_training_config(
    config: TrainSettings, kind: type[Config] = TrainingConfig, **own: Any
) -> Config:
    """What a trainer of Tunix's is told, to save and log below `config.output_dir`.

    Its class of configurations is `kind`, such as `DPOTrainingConfig`; `own` are fields of that
    which are no settings, or are to be others. `TrainSettings` alone will do for `config`.
    """
    require_fields(config)
    output_dir = Path(config.output_dir).absolute()
    fields = {
        "max_steps": config.max_steps,
        "eval_every_n_steps": config.eval_steps,
        "checkpoint_root_directory": str(output_dir / CHECKPOINTS),
        "checkpointing_options": ocp.CheckpointManagerOptions(
            save_interval_steps=config.save_steps,
            preservation_policy=Kept(config.save_total_limit, tuple(config.keep_steps)),
        ),
        "metrics_logging_options": _metrics_options(output_dir, config.report_to),
    }
    # With one micro-batch the host would still keep a sum of gradients, as large as these.
    if isinstance(config, RunConfig) and config.gradient_accumulation_steps > 1:
        fields["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    return kind(**fields | own)


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
