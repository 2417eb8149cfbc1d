# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a directory are those of a model, and whether arrays are finite."""

from __future__ import annotations

import collections
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..config import ModelConfig, refuse_ids_beyond
from ..config.source import read_json
from ..model.gemma4 import Gemma4Model
from . import files, names as weights

AUDIO = ("model.audio_tower.", "model.embed_audio.")
# The 12B's patch embedder has the second name on disk and the third in transformers' modules.
VISION = ("model.vision_tower.", "model.vision_embedder.", "model.embed_vision.")
TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
SCORE_HEAD = f"{weights.SCORE}.weight"
# Ends of names that quantisers give to what belongs to a weight.
_OF_QUANTIZERS = (
    *(".qweight", ".qzeros", ".scales", ".weight_packed", ".weight_scale", ".weight_scale_inv"),
    *(".absmax", ".quant_map", ".weight_scale_2", ".input_scale", ".biases", ".SCB"),
)


def check_tensors(
    directory: Path,
    model: Gemma4Model,
    stored: dict[str, files.StoredTensor],
    *,
    optional: Collection[str] = (),
) -> collections.Counter[str]:
    """Compares names, shapes and dtypes; raises one ValueError for all that is wrong.

    `stored` is what `directory` holds, `model`, abstract or not, what is wanted; tensors of
    `optional` names may be missing. Returns how many are left in the files on purpose, by reason.
    """
    config = model.config
    expected = {
        name: weights.hf_shape(path, variable.get_raw_value().shape)
        for name, (path, variable) in weights.named_parameters(model).items()
    }
    expected |= {name: buffer.shape for name, buffer in weights.named_buffers(model).items()}
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


def check_head(directory: Path, stored: dict[str, files.StoredTensor], *, tied: bool) -> None:
    """Raises ValueError unless the head is the embedding, which is among what is `stored`.

    `tied` is what `tie_word_embeddings` says.
    """
    head, embedding = stored.get(TIED_HEAD), stored[EMBEDDING]
    if head is None:
        if not tied:
            raise ValueError(
                f"{directory}: config.json says tie_word_embeddings: false, and there is no "
                f"{TIED_HEAD}, for which transformers draws random numbers. If the head is the "
                "embedding, set tie_word_embeddings to true; else get the missing tensor's model"
            )
        return
    if head.dtype in files.FLOATS and head.shape == embedding.shape:
        row = _first_difference(head.view(), embedding.view())
        if row is None:
            return
        found = f"differs from the embedding, first in row {row}"
    else:
        found = f"is {head.dtype} {head.shape}, the embedding {embedding.dtype} {embedding.shape}"
    raise ValueError(
        f"{directory}: {TIED_HEAD} {found}. Here the embedding is the head, as in every released "
        "Gemma 4, so a head of its own would be lost. Use the base it was trained from, with an "
        "adapter that leaves lm_head out; to give the trained head up, remove the tensor"
    )


def _first_difference(one: np.ndarray, other: np.ndarray) -> int | None:
    """First row in which two matrices differ, read in slices; NaN equals NaN."""
    rows = max(1, 2**22 // one.shape[1])
    for start in range(0, len(one), rows):
        a, b = (x[start : start + rows].astype(np.float32) for x in (one, other))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        if not same.all():
            return start + int(np.argmin(same.all(axis=1)))
    return None


def check_tokenizer(directory: Path, config: ModelConfig) -> None:
    """Raises ValueError if a token of the directory's tokenizer has no row in the embedding."""
    readers = {
        "tokenizer.json": _ids_of_tokenizer,
        "tokenizer_config.json": _ids_of_decoder,
        "added_tokens.json": dict,
    }
    for name, ids_of in readers.items():
        file = directory / name
        if file.is_file():
            ids = {t: i for t, i in ids_of(read_json(file)).items() if type(i) is int}
            refuse_ids_beyond(str(file), ids, config)


# What is in none of the expected places is left to the tokenizer's own library to judge.


def _ids_of_tokenizer(content: dict) -> dict[str, int]:
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # [token, score] in the order of ids
        vocab = {str(token): index for index, token in enumerate(vocab)}
    ids: dict[str, Any] = dict(vocab) if isinstance(vocab, dict) else {}
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            ids[str(token.get("content"))] = token.get("id")
    return ids


def _ids_of_decoder(content: dict) -> dict[str, int]:
    decoder = content.get("added_tokens_decoder")
    return {
        str(token.get("content") if isinstance(token, dict) else token): int(index)
        for index, token in (decoder.items() if isinstance(decoder, dict) else ())
        if index.isdecimal()
    }


def _hint(missing: list[str], unexpected: list[str]) -> str:
    if SCORE_HEAD in missing:
        return (
            "The directory has no score head; load it as a policy and give that one, with "
            "Gemma4ForTokenScores.from_policy(load_checkpoint(directory))"
        )
    if SCORE_HEAD in unexpected:
        found = "The directory has a score head and is no policy's"
        return f"{found}; pass model_class=Gemma4ForTokenScores"
    if any(name.endswith(_OF_QUANTIZERS) for name in unexpected):
        return (
            "The weights are quantised, and only floating-point ones are read; use the directory "
            "they were made from, or dequantise this one first"
        )
    return "Is config.json that of these weights? Save both with save_pretrained of transformers"


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


# ---- Numbers.


class NonFiniteError(RuntimeError):
    """A run or a model has come to numbers that are not finite."""


def finite_sum(leaves: list[jax.Array]) -> jax.Array:
    """A number that is finite if all of the leaves are, float32. For traced code.

    Their sum: NaN and infinity stay in it, and nothing takes less to compile or to run. It is
    infinite, too, for numbers about 1e38, with which no step can be taken.
    """
    sums = [jnp.sum(leaf, dtype=jnp.float32) for leaf in leaves if _floats(leaf)]
    return sum(sums, jnp.zeros((), jnp.float32))


def nonfinite(arrays: Mapping[str, Any]) -> list[str]:
    """The names among `arrays` (or trees of them) that hold NaN or infinity."""
    # One after the other: programs of several devices that are started all at once can wait for
    # each other for ever on a CPU. Equal shapes share a program.
    return [
        name
        for name, tree in arrays.items()
        if not all(bool(_all_finite(leaf)) for leaf in jax.tree.leaves(tree) if _floats(leaf))
    ]


def nonfinite_variables(model: nnx.Pytree, *kinds: Any) -> list[str]:
    """The paths of the model's variables of `kinds` (all if none) that hold NaN or infinity."""
    state = nnx.to_flat_state(nnx.state(model, kinds or ...))
    return nonfinite({".".join(map(str, path)): variable for path, variable in state})


def require_finite(arrays: Mapping[str, Any], what: str) -> None:
    """Raises NonFiniteError naming those of `arrays` that must not be written."""
    names = nonfinite(arrays)
    if names:
        raise NonFiniteError(
            f"{what}: {len(names)} of {len(arrays)} tensors hold NaN or infinity "
            f"({shown(names)}); nothing is written. Train on from the last checkpoint, or load "
            "the model anew"
        )


def shown(names: list[str], most: int = 3) -> str:
    """The first few of `names`."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


_all_finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())


def _floats(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
