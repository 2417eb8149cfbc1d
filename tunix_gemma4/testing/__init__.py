# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints and data, and the comparison of a checkpoint with transformers."""

from . import digits
from .tiny import build_tiny_checkpoint

__all__ = [
    "build_tiny_checkpoint",
    "digits",
]
