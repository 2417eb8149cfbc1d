# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints and data, and the comparison of a checkpoint with transformers."""

from ..lazy import attach

_HOME = {"build_tiny_checkpoint": ".tiny"}
_MODULES = ("digits",)

__all__ = [*_HOME, *_MODULES]
__getattr__, __dir__ = attach(__name__, _HOME, _MODULES)
