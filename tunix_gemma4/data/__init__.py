# SPDX-License-Identifier: Apache-2.0
"""Rows of any form to batches."""

from .pipeline import BatchDataset, BatchIterator
from .processor import Batch, Example, Processor
from .supervised import make_dataset

__all__ = ["Batch", "BatchDataset", "BatchIterator", "Example", "Processor", "make_dataset"]
