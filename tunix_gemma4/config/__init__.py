# SPDX-License-Identifier: Apache-2.0
"""What a model is, as config.json says it."""

from .model import ModelConfig, refuse_float16, refuse_ids_beyond
from .parts import AttentionType, LayerSpec, RematConfig, VisionConfig

__all__ = [
    "AttentionType",
    "LayerSpec",
    "ModelConfig",
    "RematConfig",
    "VisionConfig",
    "refuse_float16",
    "refuse_ids_beyond",
]
