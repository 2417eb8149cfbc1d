# SPDX-License-Identifier: Apache-2.0
"""Directories in and out: what is read, what is refused and in which words, what is kept."""

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl import logging
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_models import random_model

from tunix_gemma4.checkpoint import (
    load_checkpoint,
    load_save as checkpoint,
    names as weights,
    save_checkpoint,
)
from tunix_gemma4.checkpoint.files import read_header
from tunix_gemma4.config import ModelConfig
from tunix_gemma4.sharding import param_shardings
from tunix_gemma4.testing.tiny import tiny_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.language_model.norm.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


# ---- Helpers.


@pytest.fixture
def directory(tiny_checkpoint, tmp_path):
    """A tiny E2B directory of the test's own, with an audio tower."""
    return shutil.copytree(tiny_checkpoint("e2b", audio=True), tmp_path / "e2b")


@pytest.fixture
def sharded(tiny_checkpoint, tmp_path):
    """The same in several files with an index."""
    model = load_checkpoint(tiny_checkpoint("e2b", audio=True), text_only=False)
    save_checkpoint(model, tmp_path / "sharded", max_shard_bytes=100_000)
    return tmp_path / "sharded"


def stored(directory) -> dict[str, np.ndarray]:
    """Every tensor of a directory, read by the safetensors package."""
    tensors = {}
    for file in directory.glob("*.safetensors"):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def rewrite(directory, change) -> None:
    """Lets `change` edit the tensors of a single-file directory."""
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def edit_json(file, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def in_hf_layout(model) -> dict[str, np.ndarray]:
    found = {
        name: np.asarray(weights.to_hf(path, variable.get_raw_value()))
        for name, (path, variable) in weights.named_parameters(model).items()
    }
    for name, buffer in weights.named_buffers(model).items():
        found[name] = weights.buffer_array(buffer).astype(np.float32)
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def make_mesh(fsdp: int, tp: int):
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), axis_types=axis_types)


def refusal(directory, **arguments) -> str:
    with pytest.raises(ValueError) as caught:
        load_checkpoint(directory, **arguments)
    return str(caught.value)


# ---- Loading.


@pytest.mark.parametrize("preset", ["e2b", "e4b", "12b", "26b_a4b", "31b"])
def test_every_tensor_arrives_where_its_name_says(tiny_checkpoint, preset):
    directory = tiny_checkpoint(preset)
    model = load_checkpoint(directory, text_only=preset == "12b")
    assert_same(in_hf_layout(model), stored(directory))


def test_the_loaded_model_is_one_that_was_built_and_filled(tiny_checkpoint):
    loaded = load_checkpoint(tiny_checkpoint("e2b"), text_only=False)
    built = random_model("e2b")
    assert jax.tree.structure(nnx.state(loaded)) == jax.tree.structure(nnx.state(built))
    assert loaded.config == built.config
    kernel = loaded.language_model.layers[0].self_attn.q_proj.kernel
    assert (
        kernel.get_metadata()
        == built.language_model.layers[0].self_attn.q_proj.kernel.get_metadata()
    )


def test_text_only_leaves_the_tower_out_and_says_so_in_one_line(directory, caplog):
    logging.set_verbosity(logging.INFO)
    with caplog.at_level("INFO", logger="absl"):
        model = load_checkpoint(directory)
    assert not any("vision" in name for name in weights.named_parameters(model))
    (line,) = [r.getMessage() for r in caplog.records if "on purpose" in r.getMessage()]
    assert re.search(
        r"left out on purpose: \d+ of vision \(text_only=True\), 70 of audio|"
        r"left out on purpose: 70 of audio, \d+ of vision \(text_only=True\)",
        line,
    )


def test_arrays_do_not_live_in_the_pages_of_the_file(directory):
    model = load_checkpoint(directory, text_only=False)
    before = {name: array.copy() for name, array in in_hf_layout(model).items()}
    file = directory / SINGLE
    with file.open("r+b") as stream:
        stream.seek(8 + struct.unpack("<Q", stream.read(8))[0])
        stream.write(b"\x7f" * (file.stat().st_size - stream.tell()))
    assert_same(in_hf_layout(model), before)


def test_each_tensor_keeps_its_own_dtype(directory):
    def mix(tensors):
        name = "model.language_model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
        tensors[NORM] = tensors[NORM].astype(np.float16)

    rewrite(directory, mix)
    model = load_checkpoint(directory, text_only=False)
    assert model.language_model.layers[0].self_attn.q_proj.kernel.dtype == jnp.bfloat16
    assert model.language_model.norm.weight.dtype == jnp.float16
    assert model.language_model.embed_tokens.embedding.dtype == jnp.float32
    expected = {name: a for name, a in stored(directory).items() if "audio" not in name}
    assert_same(in_hf_layout(model), expected)


def test_dtype_casts_every_parameter_and_settles_the_config(directory):
    model = load_checkpoint(directory, dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(nnx.state(model))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert model.config.dtype == model.config.param_dtype == jnp.bfloat16
    expected = stored(directory)[NORM].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(model.language_model.norm.weight[...]), expected)


def test_float16_is_stored_and_never_computed_in(directory):
    edit_json(directory / "config.json", lambda content: content.update(dtype="float16"))
    with pytest.raises(ValueError, match=r"json: dtype: .* in bfloat16 or float32, found f"):
        load_checkpoint(directory)
    settled = ModelConfig.from_hf(directory, dtype="bfloat16")
    assert load_checkpoint(directory, config=settled).config.param_dtype == jnp.float16


def test_float64_values_are_cast_only_when_asked_for(directory):
    rewrite(directory, lambda tensors: tensors.update({NORM: tensors[NORM].astype(np.float64)}))
    model = load_checkpoint(directory, dtype=jnp.float32)
    expected = stored(directory)[NORM].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(model.language_model.norm.weight[...]), expected)


@pytest.mark.parametrize(
    ("fsdp", "tp", "dtype"), [(8, 1, None), (4, 2, None), (4, 2, jnp.bfloat16), (2, 4, None)]
)
def test_a_mesh_gets_each_parameter_on_its_own_shards(tiny_checkpoint, fsdp, tp, dtype):
    directory, mesh = tiny_checkpoint("26b_a4b"), make_mesh(fsdp, tp)
    model = load_checkpoint(directory, mesh, text_only=False, dtype=dtype)
    alone = load_checkpoint(directory, text_only=False, dtype=dtype)
    state = nnx.state(model)
    expected = dict(nnx.to_flat_state(param_shardings(state, mesh)))
    for path, variable in nnx.to_flat_state(state):
        sharding = expected[path].get_raw_value()
        assert variable.get_raw_value().sharding.is_equivalent_to(sharding, variable.ndim), path
    assert_same(in_hf_layout(model), in_hf_layout(alone))
    q_kernel = model.language_model.layers[0].self_attn.q_proj.kernel.get_raw_value()
    assert q_kernel.addressable_shards[0].data.size * fsdp * tp == q_kernel.size


def test_a_shard_is_read_as_its_slice_alone():
    reads = []

    class Watched(np.ndarray):
        def __getitem__(self, index):
            block = super().__getitem__(index)
            reads.append(block.shape)
            return block

    view = np.arange(64, dtype=np.float32).reshape(8, 8).view(Watched)
    sharding = jax.NamedSharding(make_mesh(4, 2), jax.P("fsdp"))
    placed = checkpoint._place(view, sharding, np.dtype(np.float32))
    assert reads == [(2, 8)] * 4  # Two devices hold each quarter; it is read once.
    np.testing.assert_array_equal(np.asarray(placed), np.asarray(view))


def test_both_spellings_of_shared_layers_load(directory):
    def add_unused(tensors):
        for layer in (3, 4, 5):
            for part in ("k_proj", "v_proj", "k_norm"):
                name = f"model.language_model.layers.{layer}.self_attn.{part}.weight"
                assert name not in tensors
                tensors[name] = np.ones((3, 5), np.float32)

    plain = in_hf_layout(load_checkpoint(directory))
    rewrite(directory, add_unused)
    assert_same(in_hf_layout(load_checkpoint(directory)), plain)


@pytest.mark.parametrize(
    "name",
    ["model.embed_vision.embedding.weight", "model.embed_audio.embedding.weight"],
)
def test_tensors_that_nothing_reads_are_skipped(directory, name):
    rewrite(directory, lambda tensors: tensors.update({name: np.ones((2, 2), np.float32)}))
    load_checkpoint(directory, text_only=False)


@pytest.mark.parametrize("spelling", ["vision_embedder.patch_dense", "embed_vision.patch_dense"])
def test_both_spellings_of_the_12b_vision_embedder_are_skipped(tiny_checkpoint, tmp_path, spelling):
    directory = shutil.copytree(tiny_checkpoint("12b"), tmp_path / "12b")
    extra = {f"model.{spelling}.weight": np.ones((2, 2), np.float32)}
    rewrite(directory, lambda tensors: tensors.update(extra))
    load_checkpoint(directory)


def test_a_config_of_the_caller_is_used_and_remembers_the_directory(directory):
    config = tiny_config("e2b", text_only=True, remat_config="decoder")
    model = load_checkpoint(directory, config=config)
    assert model.config.remat is config.remat
    assert not model.config.has_vision
    assert model.config.source_directory == str(directory)
    assert config.source_directory is None


# ---- Refusing.


def test_one_error_lists_what_is_missing_unexpected_and_misshapen(directory):
    def corrupt(tensors):
        del tensors["model.language_model.embed_tokens.weight"]
        del tensors["model.language_model.layers.0.layer_scalar"]
        tensors["model.language_model.layers.9.mlp.bias"] = np.ones(2, np.float32)
        tensors[NORM] = np.ones(7, np.float32)

    rewrite(directory, corrupt)
    message = refusal(directory)
    assert message.startswith(f"{directory}: ")
    assert (
        "2 missing: model.language_model.embed_tokens.weight, "
        "model.language_model.layers.0.layer_scalar\n" in message
    )
    assert "1 unexpected: model.language_model.layers.9.mlp.bias (in model.safetensors)" in message
    assert f"1 misfit: {NORM}: expected shape (32,), found (7,) in model.safetensors" in message
    assert "nothing was loaded" in message


def test_a_tensor_that_is_not_of_floats_is_refused(directory):
    rewrite(directory, lambda tensors: tensors.update({NORM: np.ones(32, np.int8)}))
    message = refusal(directory)
    assert f"{NORM}: expected one of F64, F32, F16, BF16, found I8 in model.safetensors" in message


def test_long_lists_are_cut_and_counted(directory):
    rewrite(directory, lambda tensors: [tensors.pop(name) for name in list(tensors)[1:]])
    message = refusal(directory)
    assert re.search(r"\d+ missing: (model\.[\w.]+, ){19}model\.[\w.]+ and \d+ more", message)


def test_a_truncated_file_is_refused_with_both_sizes(directory):
    file = directory / SINGLE
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    message = refusal(directory)
    assert f"{file}: truncated: its header describes {size:,} bytes" in message
    assert f"the file has {size - 1:,}" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a valid safetensors file ("),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a valid safetensors file ("),
        (struct.pack("<Q", 50) + b"{", "truncated: its header describes 58 bytes"),
        (struct.pack("<Q", 4) + b"{a}}", "not a valid safetensors file (invalid JSON in"),
    ],
    ids=["empty", "git-lfs-pointer", "cut-header", "bad-json"],
)
def test_a_file_that_is_no_safetensors_file_is_refused(directory, content, expected):
    (directory / SINGLE).write_bytes(content)
    message = refusal(directory)
    assert message.startswith(str(directory / SINGLE))
    assert expected in message


def entry(begin, end, *, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(0, 8, shape=(2,)), "b": entry(4, 12, shape=(2,))}, 12),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4),
        ({"a": entry(4, 8)}, 8),
        ({"a": entry(-4, 0)}, 4),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
        ({"a": entry(0, 4)}, 8),
        ({"a": entry(0, 4, shape=(2,))}, 4),
        ({"a": entry(0, 4, shape=(-1,))}, 4),
        ({"a": entry(0, 4, dtype="F64")}, 4),
        ({"a": entry(0, 4, dtype="Q4")}, 4),
        ({"a": entry(0.0, 4.0)}, 4),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4),
        ({"__metadata__": {"format": 1}, "a": entry(0, 4)}, 4),
        ([entry(0, 4)], 4),
        (f'{{"a":{json.dumps(entry(0, 4))},"a":{json.dumps(entry(0, 4))}}}', 4),
        (f'{{"a":{json.dumps(entry(0, 4))},"a":{json.dumps(entry(4, 8))}}}', 8),
    ],
    ids=[
        *("overlap", "same place", "shifted", "negative", "hole", "bytes behind", "short", "shape"),
        *("width", "dtype", "fractions", "no offsets", "metadata", "list", "twice", "two places"),
    ],
)
def test_what_the_format_forbids_is_refused(tmp_path, header, size):
    file = tmp_path / SINGLE
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(ValueError, match="not a valid safetensors file") as error:
        read_header(file)
    assert str(error.value).startswith(f"{file}: ")


def test_bytes_before_the_file_are_refused(directory):
    file = directory / SINGLE
    file.write_bytes(b"\0" + file.read_bytes())
    assert refusal(directory).startswith(f"{file}: not a valid safetensors file (")


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_refused_before_anything_is_loaded(directory, tied):
    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING].copy()
        tensors[HEAD][7, 3] += 1

    rewrite(directory, change)
    edit_json(directory / "config.json", lambda config: config.update(tie_word_embeddings=tied))
    message = refusal(directory)
    assert message.startswith(
        f"{directory}: lm_head.weight differs from the embedding, first in ro"
    )
    assert "row 7. Here the embedding is the head" in message


def test_a_head_that_is_untied_and_not_there_is_named(directory):
    edit_json(directory / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert "config.json says tie_word_embeddings: false, and there is no lm_head" in refusal(
        directory
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_token_beyond_the_embedding_is_refused_when_the_directory_is_read(directory, name):
    def change(content):
        if name == "tokenizer.json":
            content["added_tokens"].append({"id": 384, "content": "<new>"})
        elif name == "added_tokens.json":
            content["<new>"] = 384
        else:
            content["added_tokens_decoder"] = {"384": {"content": "<new>"}}

    if name == "added_tokens.json":
        (directory / name).write_text("{}")
    edit_json(directory / name, change)
    message = refusal(directory)
    assert message.startswith(f"{directory / name}: 1 tokens have no row in the embedding")
    assert "'<new>' with id 384: there are 384 rows" in message


def test_weights_that_a_quantizer_wrote_are_named(directory):
    extra = {f"{NORM}_scale": np.ones(1, np.float32)}
    rewrite(directory, lambda tensors: tensors.update(extra))
    assert "The weights are quantised" in refusal(directory)


def test_a_missing_file_of_several_is_named(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    files[1].unlink()
    message = refusal(sharded)
    assert f"names {len(files)} files, 1 of them missing: {files[1].name}" in message


def test_an_index_that_does_not_describe_its_files_is_refused(sharded):
    def change(index):
        index["weight_map"]["model.ghost.weight"] = files[1].name
        del index["weight_map"][NORM]

    files = sorted(sharded.glob("*.safetensors"))
    edit_json(sharded / INDEX, change)
    message = refusal(sharded)
    assert f"not in {files[1].name}, where it should be: model.ghost.weight" in message
    assert re.search(
        rf"in model-\d+-of-\d+\.safetensors, but not there in the index: {NORM}", message
    )


def test_an_index_without_a_weight_map_is_refused(sharded):
    (sharded / INDEX).write_text("{}")
    assert "expected a weight_map of tensors" in refusal(sharded)


def test_a_directory_with_two_sets_of_weights_is_refused(sharded):
    (sharded / SINGLE).write_bytes(b"")
    assert f"found both {SINGLE} and {INDEX}" in refusal(sharded)


def test_a_directory_of_another_model_is_refused(directory):
    edit_json(directory / "config.json", lambda config: config.update(model_type="llama"))
    message = refusal(directory)
    assert message == (
        f"{directory / 'config.json'}: model_type: found 'llama'; supported: 'gemma4', "
        "'gemma4_unified'"
    )


def test_weights_of_another_size_are_refused(directory, tiny_checkpoint):
    shutil.copy(tiny_checkpoint("e4b") / SINGLE, directory / SINGLE)
    message = refusal(directory)
    assert "6 layers of width 32" in message
    assert "unexpected: model.language_model.layers.6." in message


def test_a_config_of_the_caller_that_does_not_fit_is_refused(directory):
    message = refusal(directory, config=tiny_config("12b"))
    assert "expected model_type 'gemma4_unified', as in the config given, found 'gemma4'" in message
    message = refusal(directory, config=tiny_config("e2b", text_only=True), text_only=False)
    assert message == "text_only=False: the config given has text_only=True; set it there"


def test_what_is_not_a_checkpoint_directory_is_refused(directory, tmp_path):
    assert "not a directory" in refusal(directory / SINGLE)
    assert "not a directory" in refusal(tmp_path / "nowhere")
    (directory / SINGLE).unlink()
    assert f"found neither {SINGLE} nor {INDEX}" in refusal(directory)


def test_images_from_a_directory_without_a_tower_are_refused(tiny_checkpoint):
    message = refusal(tiny_checkpoint("12b"), text_only=False)
    assert "text_only=False: model_type 'gemma4_unified'" in message


# ---- Saving.


@pytest.mark.parametrize("text_only", [True, False], ids=["text", "images"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000], ids=["single", "several"])
def test_load_then_save_is_the_identity(directory, tmp_path, text_only, max_shard_bytes):
    model = load_checkpoint(directory, text_only=text_only)
    save_checkpoint(model, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert_same(stored(tmp_path / "out"), stored(directory))
    files = {path.name for path in directory.iterdir()} - {SINGLE}
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}
    for name in files - {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    configs = [json.loads((d / "config.json").read_text()) for d in (directory, tmp_path / "out")]
    for key, value in configs[0].items():
        assert configs[1][key] == value or value.items() <= configs[1][key].items(), key


def test_a_sharded_model_is_saved_like_a_whole_one(directory, tmp_path):
    save_checkpoint(load_checkpoint(directory, make_mesh(4, 2), text_only=False), tmp_path / "out")
    assert_same(stored(tmp_path / "out"), stored(directory))


def test_files_are_cut_by_size_and_listed_in_the_index(directory, tmp_path):
    model = load_checkpoint(directory, text_only=False)
    save_checkpoint(model, tmp_path / "out", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    sizes = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        sizes[file.name] = sum(array.nbytes for array in tensors.values())
        assert sizes[file.name] <= 50_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
    assert len(sizes) > 3
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert len(index["weight_map"]) == len(stored(directory))


def test_every_tensor_begins_at_a_multiple_of_its_width(directory, tmp_path):
    def halve_the_smallest(tensors):
        scalars = [name for name in tensors if name.endswith("input_min")]
        tensors.update({name: tensors[name].astype(ml_dtypes.bfloat16) for name in scalars[:3]})

    rewrite(directory, halve_the_smallest)
    save_checkpoint(load_checkpoint(directory, text_only=False), tmp_path / "out")
    assert_same(stored(tmp_path / "out"), stored(directory))
    data = (tmp_path / "out" / SINGLE).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__")["format"] == "pt"
    widths = {"F32": 4, "BF16": 2}
    assert {entry["dtype"] for entry in header.values()} == set(widths)
    assert not [n for n, e in header.items() if e["data_offsets"][0] % widths[e["dtype"]]]


def test_unused_keys_and_values_are_kept(directory, tmp_path):
    name = "model.language_model.layers.4.self_attn.k_proj.weight"
    extra = {name: np.full((3, 5), 2.0, np.float32)}
    rewrite(directory, lambda tensors: tensors.update(extra))
    save_checkpoint(load_checkpoint(directory), tmp_path / "out")
    assert_same(stored(tmp_path / "out"), stored(directory))


def test_a_head_that_is_the_embedding_is_read_but_not_kept(directory, tmp_path):
    expected = stored(directory)
    for tied in (False, True):
        edit_json(
            directory / "config.json", lambda c, tied=tied: c.update(tie_word_embeddings=tied)
        )
        rewrite(directory, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING]}))
        model = load_checkpoint(directory)
    save_checkpoint(model, tmp_path / "out")
    assert_same(stored(tmp_path / "out"), expected)


def test_what_training_changed_is_what_is_saved(directory, tmp_path):
    model = load_checkpoint(directory, text_only=False)
    model.language_model.norm.weight[...] = jnp.full((32,), 3.0)
    kernel = model.vision_tower.encoder.layers[1].mlp.down_proj.linear.kernel
    kernel[...] = kernel[...].at[0, 1].set(7.0)
    save_checkpoint(model, tmp_path / "out")
    expected = stored(directory)
    expected[NORM] = np.full((32,), 3.0, np.float32)
    expected["model.vision_tower.encoder.layers.1.mlp.down_proj.linear.weight"][1, 0] = 7.0
    assert_same(stored(tmp_path / "out"), expected)


def test_a_cast_model_is_saved_in_its_dtype_with_buffers_as_they_were(directory, tmp_path):
    model = load_checkpoint(directory, text_only=False, dtype=jnp.bfloat16)
    save_checkpoint(model, tmp_path / "out")
    original, found = stored(directory), stored(tmp_path / "out")
    for name in weights.named_parameters(model):
        np.testing.assert_array_equal(found[name], original[name].astype(ml_dtypes.bfloat16))
    for name in weights.named_buffers(model):
        np.testing.assert_array_equal(found[name], original[name])
        assert found[name].dtype == np.float32
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"


def test_a_model_of_its_own_is_saved_without_the_towers_it_lacks(tmp_path):
    model = random_model("e2b", text_only=True)
    save_checkpoint(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"] is None
    assert config["audio_config"] is None
    assert_same(stored(tmp_path / "out"), in_hf_layout(model))
    assert_same(in_hf_layout(load_checkpoint(tmp_path / "out")), in_hf_layout(model))


def test_a_source_completes_a_model_that_was_not_loaded_from_it(directory, tmp_path):
    model = random_model("e2b", text_only=True)
    save_checkpoint(model, tmp_path / "out", source=directory)
    expected = stored(directory) | in_hf_layout(model)
    assert_same(stored(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["audio_config"] is not None
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_source_of_another_model_is_refused(tiny_checkpoint, tmp_path):
    model = random_model("e2b", text_only=True)
    with pytest.raises(ValueError, match=r"expected model_type 'gemma4'.*'gemma4_unified'"):
        save_checkpoint(model, tmp_path / "out", source=tiny_checkpoint("12b"))
    with pytest.raises(ValueError, match="its tensors are not those of the model"):
        save_checkpoint(model, tmp_path / "out", source=tiny_checkpoint("31b"))
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_gone_is_named_with_the_ways_out(directory, tmp_path):
    model = load_checkpoint(directory)
    shutil.rmtree(directory)
    with pytest.raises(ValueError, match=r"is gone.*pass source=, or set model\.config\.source_di"):
        save_checkpoint(model, tmp_path / "out")
    model.config.source_directory = None
    save_checkpoint(model, tmp_path / "out")
    assert_same(in_hf_layout(load_checkpoint(tmp_path / "out")), in_hf_layout(model))


def test_adapters_must_be_merged_first(directory, tmp_path):
    model = load_checkpoint(directory)
    model.language_model.layers[0].self_attn.q_proj.kernel_lora_a = nnx.LoRAParam(jnp.ones((2, 2)))
    expected = (
        r"language_model\.layers\.0\.self_attn\.q_proj\.kernel_lora_a; call merge_lora\(model\)"
    )
    with pytest.raises(ValueError, match=expected):
        save_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_holds_something_is_refused(directory, tmp_path):
    model, before = load_checkpoint(directory), stored(directory)
    with pytest.raises(ValueError, match="exists and is not empty; choose another directory"):
        save_checkpoint(model, directory)
    with pytest.raises(ValueError, match="replaces only what save_checkpoint wrote"):
        save_checkpoint(model, directory, overwrite=True)
    with pytest.raises(ValueError, match="exists and is not a directory"):
        save_checkpoint(model, directory / "config.json")
    assert_same(stored(directory), before)


def test_an_empty_target_is_filled(directory, tmp_path):
    (tmp_path / "out").mkdir()
    save_checkpoint(load_checkpoint(directory), tmp_path / "out")
    assert_same(stored(tmp_path / "out"), stored(directory))


def test_an_earlier_output_is_replaced_when_asked_also_by_a_model_read_from_it(directory, tmp_path):
    """What others have put into it stays."""
    out = tmp_path / "out"
    save_checkpoint(load_checkpoint(directory), out, max_shard_bytes=50_000)
    model = load_checkpoint(out)
    model.language_model.norm.weight[...] = jnp.full((32,), 3.0)
    with pytest.raises(ValueError, match="pass overwrite=True to replace an earlier output"):
        save_checkpoint(model, out)
    (out / "README.md").write_text("a model card")
    (out / "eval").mkdir()
    (out / "eval" / "r.json").write_text("{}")
    save_checkpoint(model, out, overwrite=True)
    assert (out / "README.md").read_text() == "a model card"
    assert (out / "eval" / "r.json").read_text() == "{}"
    assert_same(stored(out), stored(directory) | {NORM: np.full((32,), 3.0, np.float32)})
    assert not (out / INDEX).exists()
    assert {path.name for path in tmp_path.iterdir()} == {"e2b", "out"}


@pytest.mark.parametrize("earlier", [False, True], ids=["fresh", "earlier-output"])
def test_a_failure_leaves_no_half_directory_and_keeps_what_was_there(
    directory, tmp_path, monkeypatch, earlier
):
    model, out = load_checkpoint(directory), tmp_path / "out"
    if earlier:
        save_checkpoint(model, out)

    def fail(array):
        if array.shape == model.language_model.embed_tokens.embedding.shape:
            raise OSError("disk full")
        return np.asarray(array)

    monkeypatch.setattr(checkpoint, "_on_host", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, out, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"e2b", *(["out"] if earlier else [])}
    if earlier:
        assert_same(stored(out), stored(directory))


def test_only_the_first_process_writes(directory, tmp_path, monkeypatch):
    gathered = []
    monkeypatch.setattr(checkpoint.jax, "process_index", lambda: 1)
    on_host = checkpoint._on_host
    monkeypatch.setattr(checkpoint, "_on_host", lambda array: gathered.append(1) or on_host(array))
    model = load_checkpoint(directory)
    save_checkpoint(model, tmp_path / "out")
    assert len(gathered) == len(weights.named_parameters(model))
    assert not (tmp_path / "out").exists()


def test_a_preset_is_saved_and_read_as_itself(tmp_path):
    config = ModelConfig.gemma4_e2b()
    config.num_layers = 20
    small = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "head_dim": 8}
    small |= {"global_head_dim": 8, "vocab_size_per_layer_input": 32}
    small |= {"hidden_size_per_layer_input": 4}
    for name, value in small.items():
        setattr(config, name, value)
    config.dtype = config.param_dtype = jnp.dtype(jnp.float32)
    model = checkpoint.Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0))
    save_checkpoint(model, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").config.layers == config.layers


# ---- Several processes.

_PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[4]}", 2, int(sys.argv[1]))
from tunix_gemma4.checkpoint import load_checkpoint, save_checkpoint
mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
model = load_checkpoint(sys.argv[2], mesh, text_only=False)
kernel = model.language_model.layers[0].self_attn.q_proj.kernel.get_raw_value()
assert not kernel.is_fully_addressable
save_checkpoint(model, sys.argv[3], max_shard_bytes=100_000)
"""


@pytest.mark.slow
def test_two_processes_read_their_shards_and_write_one_directory(directory, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    root = str(Path(checkpoint.__file__).parents[2])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    arguments = [str(directory), str(tmp_path / "out"), port]
    processes = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, rank, *arguments], env=environment)
        for rank in "01"
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert_same(stored(tmp_path / "out"), stored(directory))
