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


def make_training_config(output_dir, *, max_steps, keep_steps=(), **words):
    """Tunix's configuration of a trainer; see `RunConfig` for `words`."""
    given = {"output_dir": str(output_dir), "keep_steps": list(keep_steps), **words}
    return _now.make_training_config(_RunConfig(max_steps=max_steps, **given))


def training_fields(output_dir, *, max_steps, **words):
    """What the configurations of all of Tunix's trainers share."""
    config = make_training_config(output_dir, max_steps=max_steps, **words)
    return {name: getattr(config, name) for name in _SHARED}


warn(__name__, "tunix_gemma4.plugin.training_config")
