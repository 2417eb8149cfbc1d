# SPDX-License-Identifier: Apache-2.0
"""The Gemma 4 model: text decoder, vision tower, caches and masks.

Stands in for the module that Tunix calls `model`: `model.ModelConfig`, `model.Gemma4`. It offers no
`ShardingConfig`: shardings follow from the mesh (`sharding.py`).
"""

from ..config import AttentionType, ModelConfig, RematConfig, VisionConfig
from .backend_names import BACKEND_MAPPINGS
from .gemma4 import Gemma4, Gemma4ForConditionalGeneration, Gemma4ForTokenScores

__all__ = [
    "AttentionType",
    "BACKEND_MAPPINGS",
    "Gemma4",
    "Gemma4ForConditionalGeneration",
    "Gemma4ForTokenScores",
    "ModelConfig",
    "RematConfig",
    "VisionConfig",
]
