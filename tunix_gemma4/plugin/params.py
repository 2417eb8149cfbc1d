# SPDX-License-Identifier: Apache-2.0
"""What Tunix calls `params` of a model, for its sources "gcs" and "internal"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ..config import ModelConfig
from ..model.gemma4 import Gemma4ForConditionalGeneration
from .params_safetensors import create_model_from_safe_tensors


def create_model_from_checkpoint(
    checkpoint_path: str | Path,
    model_config: ModelConfig,
    mesh: Mesh | None = None,
    dtype: Any = None,
    text_only: bool | None = None,
) -> Gemma4ForConditionalGeneration:
    """The model in a local directory in Hugging Face's format.

    Args:
        checkpoint_path: a checkpoint directory, with its `config.json`.
        model_config: of the model; its `dtype` is that of activations.
        mesh: places the parameters; None means the default device.
        dtype: of the parameters. None keeps each tensor's own in the file, where Tunix takes
            bfloat16.
        text_only: in place of the `text_only` of `model_config`, which decides if this is None.

    Raises:
        ValueError: for anything else, such as a remote path or an Orbax checkpoint.
    """
    if not any(Path(checkpoint_path).glob("*.safetensors")):
        raise ValueError(
            f"{checkpoint_path}: expected a local directory with .safetensors files and a "
            "config.json, as on the Hugging Face hub; Orbax checkpoints and remote paths are not "
            "read, copy the model here first"
        )
    return create_model_from_safe_tensors(
        checkpoint_path, model_config, mesh, dtype, text_only=text_only
    )
