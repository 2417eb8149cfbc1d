# SPDX-License-Identifier: Apache-2.0
"""The Gemma 4 model: text decoder, vision tower, caches and masks.

Stands in for the module that Tunix calls `model`: `model.ModelConfig`, `model.Gemma4`. It offers no
`ShardingConfig`: shardings follow from the mesh (`sharding.py`).
"""

from importlib import import_module

_HOME = {
    "AttentionType": ("..config", "AttentionType"),
    "BACKEND_MAPPINGS": (".backend_names", "BACKEND_MAPPINGS"),
    "Gemma4": (".gemma4", "Gemma4ForConditionalGeneration"),
    "Gemma4ForConditionalGeneration": (".gemma4", "Gemma4ForConditionalGeneration"),
    "Gemma4ForTokenScores": (".scores", "Gemma4ForTokenScores"),
    "ModelConfig": ("..config", "ModelConfig"),
    "RematConfig": ("..config", "RematConfig"),
    "VisionConfig": ("..config", "VisionConfig"),
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module, __name__), attribute)


def __dir__():
    return sorted([*globals(), *_HOME])
