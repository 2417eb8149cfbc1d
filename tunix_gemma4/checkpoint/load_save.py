# SPDX-License-Identifier: Apache-2.0
"""From a Hugging Face directory to a model, and back.

Loading checks every name, shape and dtype from the files' headers before it reads a value, then
places one tensor at a time straight onto its shards. Saving goes tensor by tensor as well, into a
new directory that takes the target's place only when it is complete.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ..config import ModelConfig
from ..config.domains import require
from ..model.gemma4 import (
    AnyModel,
    Gemma4ForConditionalGeneration,
    Gemma4Model,
    abstract_model,
    require_single_layers,
)
from ..sharding import param_shardings
from . import check, files, names as weights

Stored = dict[str, files.StoredTensor]

# ---- Loading.


def load_checkpoint(
    directory: str | Path,
    mesh: Mesh | None = None,
    text_only: bool = True,
    dtype: Any = None,
    *,
    param_dtype: Any = None,
    config: ModelConfig | None = None,
    model_class: type[AnyModel] = Gemma4ForConditionalGeneration,
) -> AnyModel:
    """Reads a checkpoint directory as transformers writes it.

    Args:
        directory: holds `config.json` and `model.safetensors`, or several and their index.
        mesh: places every parameter on it by `sharding.param_shardings`; None means the default
            device.
        text_only: leave the vision tower out. The audio tower always is.
        dtype: of all parameters and of activations. None keeps each tensor's own in the file, and
            for activations that of `config`, or of `config.json`.
        param_dtype: of the parameters, where it is not that of activations.
        config: of the model, where it is not to be read from the directory; its `text_only`
            counts.
        model_class: `Gemma4ForTokenScores` for a directory that such a model was saved to.

    Returns:
        The model. `model.config.source_directory` remembers the directory for `save_checkpoint`.

    Raises:
        ValueError: files that are missing or damaged, a directory of another model, a head that
            is not the embedding, tokens without a row in it, or tensors that are missing,
            unexpected or misshapen: all of them in one message.
    """
    directory = Path(directory)
    stored = files.read_directory(directory)
    param_dtype = dtype if param_dtype is None else param_dtype
    given = {"dtype": dtype, "param_dtype": param_dtype}
    changes = {name: value for name, value in given.items() if value is not None}
    config = _settle_config(directory, text_only, config, **changes)
    model = abstract_model(config, model_class)
    skipped = check.check_tensors(directory, model, stored)
    tied = config.source.get("tie_word_embeddings", True) is not False
    check.check_head(directory, stored, tied=tied)
    check.check_tokenizer(directory, config)
    if skipped:
        counts = ", ".join(f"{count} of {reason}" for reason, count in skipped.items())
        logging.info("%s: tensors left out on purpose: %s", directory, counts)
    # Buffers are static attributes: they must stand before anything is compiled.
    for name, buffer in weights.named_buffers(model).items():
        weights.set_buffer(buffer, stored[name].view())
    _fill_parameters(model, stored, mesh, param_dtype)
    return model


def _settle_config(
    directory: Path,
    text_only: bool,
    config: ModelConfig | None,
    **changes: Any,
) -> ModelConfig:
    """The config to build: from `directory`, or the caller's with the directory's remembered."""
    if config is None:
        return ModelConfig.from_hf(directory, text_only=text_only, **changes)
    found = ModelConfig.from_hf(directory)
    if config.text_only and not text_only:
        raise ValueError("text_only=False: the config given has text_only=True; set it there")
    if config.model_type != found.model_type:
        raise ValueError(
            f"{directory}: expected model_type {config.model_type!r}, as in the config given, "
            f"found {found.model_type!r}"
        )
    origin = {"source": found.source, "source_directory": found.source_directory}
    return dataclasses.replace(config, **origin, **changes)


def _fill_parameters(model: nnx.Module, stored: Stored, mesh: Mesh | None, dtype: Any) -> None:
    """Gives every abstract variable of `model` its array, one at a time."""
    state = nnx.state(model)
    shardings = {}
    if mesh is not None:
        placed = nnx.to_flat_state(param_shardings(state, mesh))
        shardings = {path: variable.get_raw_value() for path, variable in placed}
    filled = []
    for path, variable in nnx.to_flat_state(state):
        view = weights.from_hf(path, stored[weights.hf_name(path)].view())
        # The head of scores stays in float32.
        keeps = dtype is None or path[0] == weights.SCORE
        wanted = view.dtype if keeps else np.dtype(dtype)
        # Waiting keeps transfers from piling up host copies of several tensors.
        array = jax.block_until_ready(_place(view, shardings.get(path), wanted))
        filled.append((path, variable.replace(array)))
    nnx.update(model, nnx.from_flat_state(filled))


def _place(view: np.ndarray, sharding: NamedSharding | None, dtype: np.dtype) -> jax.Array:
    """`view`, pages of a file, as an array of `dtype`; reads for each shard its slice alone."""
    if sharding is None:
        return jax.device_put(_detached(view, dtype))
    devices_of = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(view.shape).items():
        devices_of[tuple((part.start, part.stop) for part in index or ())].append(device)
    arrays = []
    for bounds, devices in devices_of.items():
        block = _detached(view[tuple(slice(*bound) for bound in bounds)], dtype)
        arrays += [jax.block_until_ready(jax.device_put(block, device)) for device in devices]
    return jax.make_array_from_single_device_arrays(view.shape, sharding, arrays)


def _detached(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`block` in `dtype`, such that an array made of it does not live in the file's pages.

    On a CPU `device_put` would keep contiguous memory in place: the model would change with the
    file. It transposes by itself, faster than numpy, and copies in doing so.
    """
    if block.dtype != dtype:
        return block.astype(dtype)
    return block.copy() if block.flags.c_contiguous else block


# ---- Saving.


def save_checkpoint(
    model: Gemma4Model,
    directory: str | Path,
    *,
    source: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a directory that transformers loads.

    Every parameter keeps its dtype. Tensors of the source that the model does not hold (audio;
    vision of a text-only model) are copied unchanged with their configuration, and so are the
    source's tokenizer, processor and generation files. Without a source the directory holds the
    model alone. Of a `Gemma4ForTokenScores` transformers loads the body; the head is
    `score.weight`. In a job of several processes all must call this; the first one writes.

    Args:
        model: with plain parameters; merge adapters first.
        directory: takes its content only when all of it is written. Must not exist or be empty.
        source: checkpoint directory to complete the model from; the one it was loaded from if
            None.
        max_shard_bytes: size of the largest file, unless a single tensor is larger.
        overwrite: replace `directory` if this function wrote it; what others have put into it, such
            as a model card, stays.

    Raises:
        ValueError: adapters or quantised kernels in the model, a target that is in the way, or a
            source of another model.
        NonFiniteError: parameters that hold NaN or infinity, by name.
    """
    directory = Path(directory)
    require(max_shard_bytes=max_shard_bytes)
    require_single_layers(model)
    _refuse_unmerged(model)
    files.check_target(directory, overwrite)
    named = weights.named_parameters(model)
    check.require_finite({name: held.variable for name, held in named.items()}, str(directory))
    where = source if source is not None else model.config.source_directory
    origin = None if where is None else Path(where)
    stored = {} if origin is None else _read_origin(model, origin)
    tensors = _new_tensors(model, stored)
    config = _hf_config(model, origin, [tensor.name for tensor in tensors])
    if jax.process_index() == 0:
        with files.replacing(directory) as new:
            files.write_tensors(new, tensors, max_shard_bytes=max_shard_bytes)
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
            if origin is not None:
                files.copy_companions(origin, new)
    else:
        files.write_tensors(None, tensors, max_shard_bytes=max_shard_bytes)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tunix_gemma4.save_checkpoint")


def _refuse_unmerged(model: nnx.Module) -> None:
    unmerged = weights.unmerged(model)
    if unmerged:
        raise ValueError(
            f"model: {len(unmerged)} variables are adapters or quantised kernels, which a "
            f"checkpoint cannot hold: {files.listing(unmerged, most=3)}; call merge_lora(model) "
            "first, or save_adapter(model, directory) to keep the adapter apart"
        )


def _read_origin(model: Gemma4Model, origin: Path) -> Stored:
    """The tensors of the directory that completes `model`, which must be of its shapes."""
    if not origin.is_dir():
        raise ValueError(
            f"{origin}: the directory this model was loaded from is gone, and with it the "
            "tokenizer and what was not loaded; pass source=, or set "
            "model.config.source_directory = None to save the model alone"
        )
    stored = files.read_directory(origin)
    _settle_config(origin, model.config.text_only, model.config)
    # A head that the origin lacks was made here.
    check.check_tensors(origin, model, stored, optional=(check.SCORE_HEAD,))
    check.check_head(origin, stored, tied=True)
    return stored


def _new_tensors(model: Gemma4Model, stored: Stored) -> list[files.NewTensor]:
    """What to write: parameters, buffers, then what `stored` holds beyond them."""
    tensors = []
    for name, (path, variable) in weights.named_parameters(model).items():
        array = variable.get_raw_value()
        shape = weights.hf_shape(path, array.shape)
        read = lambda path=path, array=array: weights.to_hf(path, _on_host(array))  # noqa: E731
        tensors.append(files.new_tensor(name, shape, np.dtype(array.dtype), read))
    for name, buffer in weights.named_buffers(model).items():
        code = stored[name].dtype if name in stored else ""
        dtype = files.FLOATS.get(code, np.dtype(model.config.param_dtype))
        read = functools.partial(weights.buffer_array, buffer, dtype)
        tensors.append(files.new_tensor(name, buffer.shape, dtype, read))
    written = {tensor.name for tensor in tensors} | {check.TIED_HEAD}
    return tensors + [tensor.copied() for name, tensor in stored.items() if name not in written]


def _on_host(array: jax.Array) -> np.ndarray:
    """The values of `array`; collective if other processes hold some of them."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        return multihost_utils.process_allgather(array, tiled=True)
    shards = {str(shard.index): shard for shard in array.addressable_shards}.values()
    if len(shards) == 1:
        return np.asarray(_uncached(next(iter(shards)).data))
    result = np.empty(array.shape, array.dtype)
    for shard in shards:
        result[shard.index] = np.asarray(_uncached(shard.data))
    return result


def _uncached(shard: jax.Array) -> jax.Array:
    """A copy off the CPU, where an array remembers its host value: that would be all of them."""
    on_cpu = all(device.platform == "cpu" for device in shard.devices())
    return shard if on_cpu else jnp.copy(shard)


def _hf_config(model: Gemma4Model, origin: Path | None, names: list[str]) -> dict[str, Any]:
    """The `config.json`: the origin's where the model says nothing, without absent towers."""
    config = model.config
    if origin is not None:
        config = dataclasses.replace(config, source=ModelConfig.from_hf(origin).source)
    result = config.to_hf()
    if check.SCORE_HEAD in names:
        result |= {"architectures": [type(model).__name__], "num_labels": 1}
    for key, prefixes in (("vision_config", check.VISION), ("audio_config", check.AUDIO)):
        if not any(name.startswith(prefixes) for name in names):
            result[key] = None
    sizes: collections.Counter[str] = collections.Counter()
    for _, variable in weights.named_parameters(model).values():
        sizes[np.dtype(variable.dtype).name] += variable.size
    ((result["dtype"], _),) = sizes.most_common(1)
    for key in ("text_config", "vision_config", "audio_config"):
        if result.get(key) and result[key].get("dtype"):
            result[key]["dtype"] = result["dtype"]
    return result
