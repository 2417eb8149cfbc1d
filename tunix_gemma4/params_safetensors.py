# SPDX-License-Identifier: Apache-2.0
"""What Tunix calls `params_safetensors` of a model: a directory of safetensors in, a model out.

For scripts that name the family's modules themselves:
`from tunix_gemma4 import model, params_safetensors`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from .checkpoint import load_checkpoint
from .config import ModelConfig
from .model.gemma4 import Gemma4ForConditionalGeneration

MODES = ("auto", "optimized", "original")


def create_model_from_safe_tensors(
    file_dir: str | Path,
    config: ModelConfig,
    mesh: Mesh | None = None,
    dtype: Any = None,
    mode: str = "auto",
) -> Gemma4ForConditionalGeneration:
    """`load_checkpoint` under the name and with the arguments that Tunix's loaders have.

    Args:
        file_dir: a checkpoint directory, with its `config.json`.
        config: of the model. Its `text_only` decides about the vision tower.
        mesh: places the parameters; None means the default device.
        dtype: of parameters and activations. None keeps each tensor's own in the file, and
            `config.dtype` for activations.
        mode: Tunix's three ways to read files, which trade memory for speed and yield the same
            arrays. There is one way here, tensor by tensor onto its shards, and it serves all.

    Raises:
        ValueError: for another mode, and as `load_checkpoint` does.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}")
    return load_checkpoint(file_dir, mesh, config.text_only, dtype, config=config)
