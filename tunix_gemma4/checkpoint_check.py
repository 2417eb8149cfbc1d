# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a directory are those of a model: one error for all that is wrong."""

from __future__ import annotations

import collections
from collections.abc import Collection
from pathlib import Path

from flax import nnx

from . import checkpoint_files as files
from . import weights
from .config import ModelConfig

AUDIO = ("model.audio_tower.", "model.embed_audio.")
# The 12B's patch embedder has the second name on disk and the third in transformers' modules.
VISION = ("model.vision_tower.", "model.vision_embedder.", "model.embed_vision.")
TIED_HEAD = "lm_head.weight"
SCORE_HEAD = f"{weights.SCORE}.weight"


def check_tensors(
    directory: Path,
    model: nnx.Module,
    stored: dict[str, files.StoredTensor],
    *,
    optional: Collection[str] = (),
) -> collections.Counter[str]:
    """Compares names, shapes and dtypes; raises one ValueError for all that is wrong.

    Args:
        directory: for messages.
        model: what is wanted, abstract or not.
        stored: what the directory holds.
        optional: names of tensors that may be missing.

    Returns:
        How many tensors are left in the files on purpose, by reason.
    """
    config = model.config
    expected = _expected_shapes(model)
    skipped, unexpected = _sort_out(config, [name for name in stored if name not in expected])
    missing = [name for name in expected if name not in stored and name not in optional]
    wrong = []
    for name in sorted(expected.keys() & stored.keys()):
        tensor, where = stored[name], f"in {stored[name].file.name}"
        if tensor.shape != expected[name]:
            wrong.append(f"{name}: expected shape {expected[name]}, found {tensor.shape} {where}")
        elif tensor.dtype not in files.FLOATS:
            known = ", ".join(files.FLOATS)
            wrong.append(f"{name}: expected one of {known}, found {tensor.dtype} {where}")
    extra = [f"{name} (in {stored[name].file.name})" for name in unexpected]
    problems = [
        f"\n  {len(names)} {kind}: {files.listing(sorted(names))}"
        for kind, names in (("missing", missing), ("unexpected", extra), ("misfit", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"{directory}: its tensors are not those of the model that its config describes "
            f"({config.model_type}, {config.num_hidden_layers} layers of width "
            f"{config.hidden_size}, {'with' if config.has_vision else 'without'} vision)."
            + "".join(problems)
            + f"\n{_hint(missing, unexpected)}; nothing was loaded."
        )
    return skipped


def _hint(missing: list[str], unexpected: list[str]) -> str:
    if SCORE_HEAD in missing:
        return (
            "The directory has no score head; load it as a policy and give that one, with "
            "Gemma4ForTokenScores.from_policy(load_checkpoint(directory))"
        )
    if SCORE_HEAD in unexpected:
        return (
            "The directory has a score head and is no policy's; pass "
            "model_class=Gemma4ForTokenScores"
        )
    return "Is config.json that of these weights? Save both with save_pretrained of transformers"


def _expected_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape in the checkpoint of every parameter and buffer of `model`."""
    shapes = {
        name: weights.hf_shape(path, variable.get_raw_value().shape)
        for name, (path, variable) in weights.named_parameters(model).items()
    }
    return shapes | {name: buf.shape for name, buf in weights.named_buffers(model).items()}


def _sort_out(config: ModelConfig, names: list[str]) -> tuple[collections.Counter[str], list[str]]:
    """Of `names` that the model does not hold: how many are skipped by reason, and the rest."""
    unused = {
        f"model.language_model.layers.{spec.index}.self_attn.{part}.weight"
        for spec in config.layers
        if spec.shares_kv
        for part in ("k_proj", "v_proj", "k_norm")
    }
    skipped: collections.Counter[str] = collections.Counter()
    unexpected = []
    for name in names:
        if name == TIED_HEAD:
            skipped["the head, which is tied to the embedding"] += 1
        elif name.startswith(AUDIO):
            skipped["audio"] += 1
        elif not config.has_vision and name.startswith(VISION):
            skipped["vision (text_only=True)"] += 1
        # Some conversions carry a table over from Gemma 3n that no Gemma 4 reads.
        elif name.startswith("model.embed_vision.embedding."):
            skipped["an unused vision vocabulary"] += 1
        elif name in unused:
            skipped["keys and values of layers that read another layer's"] += 1
        else:
            unexpected.append(name)
    return skipped, unexpected
