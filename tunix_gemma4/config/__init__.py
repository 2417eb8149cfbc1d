# SPDX-License-Identifier: Apache-2.0
"""What a model is, as config.json says it."""

from .model import ModelConfig
from .parts import AttentionType, LayerSpec, RematConfig, VisionConfig

__all__ = ["AttentionType", "LayerSpec", "ModelConfig", "RematConfig", "VisionConfig"]
