# SPDX-License-Identifier: Apache-2.0
"""What Tunix calls `params` and `params_safetensors` of a model: a directory in, a model out.

`AutoModel` looks for these modules, and scripts name them themselves:
`from tunix_gemma4 import model, params, params_safetensors`.
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
        dtype: of the parameters. None keeps each tensor's own in the file, where Tunix's `params`
            takes bfloat16.
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


def create_model_from_checkpoint(
    checkpoint_path: str | Path,
    model_config: ModelConfig,
    mesh: Mesh | None = None,
    dtype: Any = None,
    text_only: bool | None = None,
) -> Gemma4ForConditionalGeneration:
    """The same for Tunix's sources "gcs" and "internal", from a local directory.

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
