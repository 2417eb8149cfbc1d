# SPDX-License-Identifier: Apache-2.0
"""What Tunix calls `params_safetensors` of a model: a directory of safetensors in, a model out.

For scripts that name the family's modules themselves:
`from tunix_gemma4 import model, params_safetensors`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ..checkpoint import load_checkpoint
from ..config import ModelConfig
from ..model.gemma4 import Gemma4ForConditionalGeneration

MODES = ("auto", "optimized", "original")


def create_model_from_safe_tensors(
    file_dir: str | Path,
    config: ModelConfig,
    mesh: Mesh | None = None,
    dtype: Any = None,
    mode: str = "auto",
    text_only: bool | None = None,
) -> Gemma4ForConditionalGeneration:
    """`load_checkpoint` under the name and with the arguments that Tunix's loaders have.

    Args:
        file_dir: a checkpoint directory, with its `config.json`.
        config: of the model. Its `dtype` is that of activations: bfloat16 from the factories here,
            where Tunix's give float32.
        mesh: places the parameters; None means the default device.
        dtype: of the parameters. None keeps each tensor's own in the file.
        mode: Tunix's three ways to read files, which trade memory for speed and yield the same
            arrays. There is one way here, tensor by tensor onto its shards, and it serves all.
        text_only: in place of the `text_only` of `config`, which decides if this is None.

    Raises:
        ValueError: for another mode, and as `load_checkpoint` does.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}")
    if text_only is not None and text_only != config.text_only:
        config = dataclasses.replace(config, text_only=text_only)
    return load_checkpoint(file_dir, mesh, config.text_only, param_dtype=dtype, config=config)
