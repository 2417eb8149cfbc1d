# SPDX-License-Identifier: Apache-2.0
"""Directories as Hugging Face writes them, read and written."""

from .load_save import load_checkpoint, save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
