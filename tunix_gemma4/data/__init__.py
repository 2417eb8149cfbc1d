# SPDX-License-Identifier: Apache-2.0
"""Rows of any form to batches."""

from .pipeline import BatchDataset, BatchIterator
from .preferences import PreferenceBatches
from .processor import Batch, Example, Processor
from .prompts import PromptBatches, PromptRows
from .supervised import make_dataset

__all__ = [
    "Batch",
    "BatchDataset",
    "BatchIterator",
    "Example",
    "PreferenceBatches",
    "Processor",
    "PromptBatches",
    "PromptRows",
    "make_dataset",
]
