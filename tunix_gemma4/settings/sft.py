# SPDX-License-Identifier: Apache-2.0
"""The settings of supervised fine-tuning.

config = load_run_config(["lora-image", "e2b"], ["model=gemma-4-E2B-it", "lora.rank=32"])
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ..data.processor import THOUGHTS
from .common import DataSettings, TrainSettings, one_of
from .load_config import Recipes, load_config


@dataclasses.dataclass
class DataConfig(DataSettings):
    """What is learnt.

    Besides those of `DataSettings`:

    Attributes:
        path: a .jsonl, .json or .parquet file of rows with `messages`, or of another tool's
            (docs/how-to/data.md).
        max_length: tokens; longer rows are dropped and counted, never cut.
        thoughts: which of a row's thoughts are learnt: "last", those of its last turn; "none"; or
            "each_turn", which makes a row of each turn; see docs/how-to/data.md.
        image_buckets: allowed numbers of images per row of a batch; each compiles once.
        bucket_lengths: allowed numbers of tokens per row; each compiles once. null: powers of two
            from 64, and `max_length`.
    """

    max_length: int = 2048
    thoughts: str = "last"
    image_buckets: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2, 4, 8])
    bucket_lengths: list[int] | None = None


@dataclasses.dataclass
class RunConfig(TrainSettings):
    """Supervised fine-tuning. A step is an optimizer step of `gradient_accumulation_steps` batches.

    Besides those of `TrainSettings`:

    Attributes:
        data: see `DataConfig`.
        batch_size: rows of one forward pass, of all devices together. What an epoch leaves free in
            its last step is filled with empty rows; where it cannot fill one step, the run says so.
        gradient_accumulation_steps: forward passes per step.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch_size: int = 1
    gradient_accumulation_steps: int = 1

    def steps_of_epochs(self, num_rows: int, epochs: int) -> int:
        """Optimizer steps, the last of an epoch with what rows are left."""
        return math.ceil(num_rows / (self.batch_size * self.gradient_accumulation_steps)) * epochs

    def validate(self) -> None:
        """Raises ValueError for settings that cannot be meant."""
        super().validate()
        one_of("data.thoughts", self.data.thoughts, THOUGHTS)
        for name in ("image_buckets", "bucket_lengths"):
            if getattr(self.data, name) == []:
                raise ValueError(f"data.{name}: expected at least one number, found []")
        if self.batch_size % self.mesh.fsdp:
            raise ValueError(
                f"batch_size: expected a multiple of mesh.fsdp={self.mesh.fsdp}, found "
                f"{self.batch_size}"
            )


def load_run_config(recipes: Recipes, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads recipes, by name or path; see `load_config`."""
    return load_config(RunConfig, recipes, overrides, command="sft")
