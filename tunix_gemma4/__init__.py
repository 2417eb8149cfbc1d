# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 for Tunix: text and images, from a Hugging Face directory to an adapter and back.

Names are loaded when first used, so that importing the package costs nothing and changes nothing.
"""

from pathlib import Path

from .lazy import attach

# Former names of modules are found behind those of today.
__path__.append(str(Path(__file__).parent / "_renamed"))

__version__ = "0.1.0"

_HOME = {
    "Batch": ".data",
    "Gemma4ForConditionalGeneration": ".model.gemma4",
    "Gemma4ForTokenScores": ".model.gemma4",
    "Gemma4Trainer": ".plugin.sft.trainer",
    "HOOKS": ".plugin.register",
    "LayerSpec": ".config",
    "LoraConfig": ".lora",
    "ModelConfig": ".config",
    "Processor": ".data",
    "RematConfig": ".config",
    "TrainingConfig": ".plugin.sft.trainer",
    "VisionConfig": ".config",
    "apply_lora": ".lora",
    "generate": ".sampling",
    "load_adapter": ".lora",
    "load_checkpoint": ".checkpoint",
    "make_dataset": ".data",
    "make_optimizer": ".plugin.optimizer",
    "make_schedule": ".plugin.optimizer",
    "merge_lora": ".lora",
    "plan": ".planning.plan",
    "register": ".plugin.register",
    "save_adapter": ".lora",
    "save_checkpoint": ".checkpoint",
    "set_processor": ".plugin.rl.learner",
    "stack_layers": ".model.gemma4",
    "status": ".plugin.register",
    "unregister": ".plugin.register",
    "unstack_layers": ".model.gemma4",
}
_MODULES = ("checkpoint", "config", "data", "losses", "lora", "rewards", "sampling", "sharding")

__all__ = [*_HOME, *_MODULES]
__getattr__, __dir__ = attach(__name__, _HOME, _MODULES)
