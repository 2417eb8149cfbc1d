# SPDX-License-Identifier: Apache-2.0
"""The former name of `tunix_gemma4.plugin.training_config`, which took words and no settings."""

from tunix_gemma4._renamed import warn
from tunix_gemma4.plugin import training_config as _now

# What follows takes the place of some of these.
from tunix_gemma4.plugin.training_config import *  # noqa: F403  # pyright: ignore[reportAssignmentType]
from tunix_gemma4.settings.sft import RunConfig as _RunConfig

_SHARED = (
    *("max_steps", "eval_every_n_steps", "checkpoint_root_directory", "checkpointing_options"),
    "metrics_logging_options",
)


def make_training_config(
    output_dir,
    *,
    max_steps,
    gradient_accumulation_steps=1,
    eval_steps=100,
    save_steps=100,
    save_total_limit=3,
    keep_steps=(),
    report_to="tensorboard",
):
    """Tunix's configuration of a trainer that saves and logs below `output_dir`."""
    given = locals() | {"output_dir": str(output_dir), "keep_steps": list(keep_steps)}
    # What was below 1 meant 1.
    given["gradient_accumulation_steps"] = max(gradient_accumulation_steps, 1)
    return _now.make_training_config(_RunConfig(**given))


def training_fields(
    output_dir,
    *,
    max_steps,
    eval_steps=100,
    save_steps=100,
    save_total_limit=3,
    keep_steps=(),
    report_to="tensorboard",
):
    """What the configurations of all of Tunix's trainers share."""
    config = make_training_config(**locals())
    return {name: getattr(config, name) for name in _SHARED}


warn(
    *(__name__, "tunix_gemma4.plugin.training_config"),
    "make_training_config takes settings, for training_fields too; see CHANGELOG",
)
