# SPDX-License-Identifier: Apache-2.0
"""The Gemma 4 model: text decoder, vision tower, caches and masks.

Stands in for the module that Tunix calls `model`: `model.ModelConfig`, `model.Gemma4`. It offers no
`ShardingConfig`: shardings follow from the mesh (`sharding.py`).
"""

from ..lazy import attach

_HOME = {
    "AttentionType": "..config",
    "BACKEND_MAPPINGS": ".backend_names",
    "Gemma4": ".gemma4",
    "Gemma4ForConditionalGeneration": ".gemma4",
    "Gemma4ForTokenScores": ".gemma4",
    "ModelConfig": "..config",
    "RematConfig": "..config",
    "VisionConfig": "..config",
}

__all__ = list(_HOME)
__getattr__, __dir__ = attach(__name__, _HOME)
