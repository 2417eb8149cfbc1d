# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 for Tunix: text and images, from a Hugging Face directory to an adapter and back.

Names are loaded when first used, so that importing the package costs nothing and changes nothing.
"""

from importlib import import_module
from pathlib import Path

# Former names of modules are found behind those of today.
__path__.append(str(Path(__file__).parent / "_renamed"))

_HOME = {
    "Batch": "data",
    "Gemma4ForConditionalGeneration": "model.gemma4",
    "Gemma4ForTokenScores": "model.scores",
    "LayerSpec": "config",
    "LoraConfig": "lora",
    "ModelConfig": "config",
    "Processor": "data",
    "RematConfig": "config",
    "VisionConfig": "config",
    "apply_lora": "lora",
    "generate": "sampling",
    "load_adapter": "lora",
    "load_checkpoint": "checkpoint",
    "make_dataset": "data",
    "merge_lora": "lora",
    "plan": "planning.plan",
    "register": "plugin.register",
    "save_adapter": "lora",
    "save_checkpoint": "checkpoint",
    "stack_layers": "model.scan",
    "unregister": "plugin.register",
    "unstack_layers": "model.scan",
}
_MODULES = ("checkpoint", "config", "data", "losses", "lora", "sampling", "sharding")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
