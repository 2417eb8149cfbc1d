# SPDX-License-Identifier: Apache-2.0
"""Adapters: what carries one, how they are added, saved and loaded."""

from .adapters import LoraConfig, apply_lora, describe, merge_lora, reference_model
from .peft import load_adapter, save_adapter

__all__ = [
    "LoraConfig",
    "apply_lora",
    "describe",
    "load_adapter",
    "merge_lora",
    "reference_model",
    "save_adapter",
]
