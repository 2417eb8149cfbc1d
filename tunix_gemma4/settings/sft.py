# SPDX-License-Identifier: Apache-2.0
"""The settings of supervised fine-tuning.

config = load_run_config("e2b_lora_image", ["model=gemma-4-E2B-it", "lora.rank=32"])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ..data.check import rows_to_check
from ..data.processor import THOUGHTS
from .common import TrainSettings, one_of
from .load_config import load_config


@dataclasses.dataclass
class DataConfig:
    """What is learnt.

    Attributes:
        path: a .jsonl, .json or .parquet file of rows with `messages`.
        eval_path: the like, held out; null evaluates nothing.
        max_length: tokens; longer rows are dropped and counted, never cut.
        max_soft_tokens: most tokens an image becomes: 70, 140, 280, 560 or 1120; null: what the
            checkpoint's processor_config.json says, or 280.
        thoughts: which of a row's thoughts are learnt: "last", those of its last turn; "none"; or
            "each_turn", which makes a row of each turn.
        transformers_alpha: drop the transparency of images, as transformers does, instead of
            laying them on white.
        thinking: tell the model to think before it answers; the chat template's `enable_thinking`.
        chat_template_kwargs: other arguments of the chat template.
        image_buckets: allowed numbers of images per row of a batch; each compiles once.
        bucket_lengths: allowed numbers of tokens per row; each compiles once. null: powers of two
            from 64, and `max_length`.
        shuffle: a new order each epoch.
        check: which rows are read before the first step, so that what is wrong is said then: "all",
            a number of rows spread over the file (and of every other row its form and the files of
            its images), or false; null: all of fewer than 20,000, otherwise 2,000. The result is
            kept with the checkpoints. Steps, and so the learning rate, are planned from it.
        skip_bad_rows: leave out rows that cannot be read, and count them, in place of an error.
    """

    path: str = MISSING
    eval_path: str | None = None
    max_length: int = 2048
    max_soft_tokens: int | None = None
    thoughts: str = "last"
    transformers_alpha: bool = False
    thinking: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    image_buckets: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2, 4, 8])
    bucket_lengths: list[int] | None = None
    shuffle: bool = True
    # Not compared: a run that is resumed may change them.
    check: Any = dataclasses.field(default=None, compare=False)
    skip_bad_rows: bool = dataclasses.field(default=False, compare=False)


@dataclasses.dataclass
class RunConfig(TrainSettings):
    """Supervised fine-tuning. A step is an optimizer step of `gradient_accumulation_steps` batches.

    Besides those of `TrainSettings`:

    Attributes:
        data: see `DataConfig`.
        batch_size: rows of one forward pass, of all devices together.
        gradient_accumulation_steps: forward passes per step.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch_size: int = 1
    gradient_accumulation_steps: int = 1

    def validate(self) -> None:
        """Raises ValueError for settings that cannot be meant."""
        super().validate()
        one_of("data.thoughts", self.data.thoughts, THOUGHTS)
        rows_to_check(self.data.check, 1)
        if self.batch_size % self.mesh.fsdp:
            raise ValueError(
                f"batch_size: expected a multiple of mesh.fsdp={self.mesh.fsdp}, found "
                f"{self.batch_size}"
            )


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file; see `load_config`."""
    return load_config(RunConfig, path, overrides, command="sft")
