# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 for Tunix: text and images, from a Hugging Face directory to an adapter and back.

Names are loaded when first used, so that importing the package costs nothing and changes nothing.
"""

from importlib import import_module

_HOME = {
    "Batch": "processor",
    "Gemma4ForConditionalGeneration": "model.gemma4",
    "Gemma4ForTokenScores": "model.scores",
    "LayerSpec": "config_parts",
    "LoraConfig": "lora",
    "ModelConfig": "config",
    "Processor": "processor",
    "RematConfig": "config_parts",
    "VisionConfig": "config_parts",
    "apply_lora": "lora",
    "generate": "sampling",
    "load_adapter": "lora",
    "load_checkpoint": "checkpoint",
    "make_dataset": "data",
    "merge_lora": "lora",
    "plan": "recipes.plan",
    "register": "host.register",
    "save_adapter": "lora",
    "save_checkpoint": "checkpoint",
    "stack_layers": "model.stacking",
    "unregister": "host.register",
    "unstack_layers": "model.stacking",
}
_MODULES = ("checkpoint", "config", "data", "losses", "lora", "processor", "sampling", "sharding")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
