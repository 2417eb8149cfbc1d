# SPDX-License-Identifier: Apache-2.0
"""Directories against transformers itself: it saves and we load, we save and it loads."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import (
    AutoConfig,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

from tunix_gemma4.checkpoint import load_checkpoint, save_checkpoint
from tunix_gemma4.testing.tiny import build_tiny_checkpoint

from . import oracle

pytestmark = pytest.mark.parity

SIZES = ("e2b", "e4b", "12b", "26b_a4b", "31b")


# ---- Helpers.


def hf_load(directory, hf_class=Gemma4ForConditionalGeneration):
    """transformers' model of `directory`, which must fill every tensor and leave none over."""
    model, info = hf_class.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    model.config._experts_implementation = "eager"
    return model.eval()


def class_of(size):
    return (
        Gemma4UnifiedForConditionalGeneration if size == "12b" else Gemma4ForConditionalGeneration
    )


def has_images(size):
    return size in oracle.IMAGE_SIZES


def assert_same_logits(what, model, hf, images):
    """Within the tolerance of a whole model, on rows with images or on text."""
    config = model.config
    inputs = oracle.image_inputs() if images else oracle.text_inputs()

    def run(hf):
        return oracle.hf_logits(hf, config, inputs)

    theirs = run(hf)
    noise = oracle.noise_floor(run, hf, theirs)
    oracle.assert_agrees(what, oracle.our_logits(model, inputs), theirs, noise=noise)


def assert_same_tensors(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def move_parameters(model):
    """As training does: every parameter moves, no buffer does."""
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda leaf: leaf * 1.01, state))


def saved_by_hf(tmp_path, size, **options):
    config = oracle.our_config(size, images=has_images(size))
    hf = oracle.hf_model(config, seed=3)
    hf.save_pretrained(tmp_path / "theirs", **options)
    return tmp_path / "theirs", hf


def make_mesh():
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=axis_types)


# ---- Both ways.


@pytest.mark.parametrize("shard", ["5GB", "40KB"], ids=["single", "several"])
@pytest.mark.parametrize("size", SIZES)
def test_what_transformers_saves_we_load_with_equal_logits(tmp_path, size, shard):
    directory, hf = saved_by_hf(tmp_path, size, max_shard_size=shard)
    assert (len(list(directory.glob("*.safetensors"))) > 3) is (shard == "40KB")
    model = load_checkpoint(directory, text_only=not has_images(size))
    assert_same_logits(f"{size} loaded", model, hf, has_images(size))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000], ids=["single", "several"])
@pytest.mark.parametrize("size", SIZES)
def test_what_we_save_transformers_loads_with_equal_logits(tmp_path, size, max_shard_bytes):
    directory, _ = saved_by_hf(tmp_path, size)
    model = load_checkpoint(directory, text_only=not has_images(size))
    move_parameters(model)
    save_checkpoint(model, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    hf = hf_load(tmp_path / "ours", class_of(size))
    assert_same_logits(f"{size} saved", model, hf, has_images(size))


@pytest.mark.parametrize("size", SIZES)
def test_load_then_save_changes_nothing_for_transformers(tmp_path, size):
    directory, hf = saved_by_hf(tmp_path, size)
    save_checkpoint(load_checkpoint(directory, text_only=not has_images(size)), tmp_path / "ours")
    assert_same_tensors(hf_load(tmp_path / "ours", class_of(size)), hf)
    # As transformers reads them: its versions write the same in several ways.
    configs = [AutoConfig.from_pretrained(where) for where in (directory, tmp_path / "ours")]
    theirs, ours = (config.to_dict() for config in configs)
    assert ours["text_config"] == theirs["text_config"]
    assert ours.get("vision_config") == theirs.get("vision_config")


def test_a_model_on_a_mesh_goes_both_ways(tmp_path):
    directory, hf = saved_by_hf(tmp_path, "26b_a4b", max_shard_size="40KB")
    model = load_checkpoint(directory, make_mesh(), text_only=False)
    assert_same_logits("26b_a4b on a mesh", model, hf, images=True)
    save_checkpoint(model, tmp_path / "ours")
    assert_same_tensors(hf_load(tmp_path / "ours"), hf)


@pytest.mark.parametrize("size", ["e2b", "26b_a4b"])
def test_bfloat16_goes_both_ways_bit_for_bit(tmp_path, size):
    hf = oracle.hf_model(oracle.our_config(size, images=True), seed=3).to(torch.bfloat16)
    hf.save_pretrained(tmp_path / "theirs")
    save_checkpoint(load_checkpoint(tmp_path / "theirs", text_only=False), tmp_path / "ours")
    assert_same_tensors(hf_load(tmp_path / "ours"), hf)


# ---- Towers that are not loaded.


@pytest.mark.parametrize("text_only", [False, True], ids=["images", "text"])
@pytest.mark.parametrize("size", ["e2b", "e4b"])
def test_a_directory_with_an_audio_tower_keeps_it(tmp_path, size, text_only):
    hf = hf_load(build_tiny_checkpoint(tmp_path / "tiny", preset=size, audio=True))
    assert sum("audio" in name for name in hf.state_dict()) > 60
    hf.save_pretrained(tmp_path / "theirs")
    model = load_checkpoint(tmp_path / "theirs", text_only=text_only)
    assert_same_logits(f"{size} beside audio", model, hf, images=False)
    save_checkpoint(model, tmp_path / "ours")
    again = hf_load(tmp_path / "ours")
    assert_same_tensors(again, hf)
    assert again.config.audio_config.to_dict() == hf.config.audio_config.to_dict()
    assert again.config.vision_config.to_dict() == hf.config.vision_config.to_dict()


def test_a_text_only_model_keeps_the_towers_of_its_source_and_changes_the_text(tmp_path):
    directory, hf = saved_by_hf(tmp_path, "31b")
    model = load_checkpoint(directory)
    move_parameters(model)
    save_checkpoint(model, tmp_path / "ours")
    again = hf_load(tmp_path / "ours")
    assert_same_logits("31b text", model, again, images=False)
    before, after = hf.state_dict(), again.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        name
        for name in before
        if ("language_model" in name or name == "lm_head.weight") and "layer_scalar" not in name
    }


@pytest.mark.parametrize("size", SIZES)
def test_a_text_only_model_without_a_source_is_whole_for_transformers(tmp_path, size):
    directory, _ = saved_by_hf(tmp_path, size)
    model = load_checkpoint(directory)
    model.config.source_directory = None
    save_checkpoint(model, tmp_path / "ours")
    hf = hf_load(tmp_path / "ours", class_of(size))
    assert hf.config.vision_config is None
    assert hf.config.audio_config is None
    assert_same_logits(f"{size} text alone", model, hf, images=False)


def test_a_12b_keeps_its_embedders_of_images_and_audio(tmp_path):
    plain = oracle.our_config("12b")
    raw = plain.to_hf() | {
        "vision_config": {
            "patch_size": 4,
            "pooling_kernel_size": 3,
            "mm_embed_dim": 24,
            "mm_posemb_size": 10,
            "output_proj_dims": 24,
        },
        "audio_config": {"audio_embed_dim": 16, "audio_samples_per_token": 16},
    }
    torch.manual_seed(0)
    hf = Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(**raw)).eval()
    hf.set_attn_implementation("eager")
    hf.save_pretrained(tmp_path / "theirs")
    model = load_checkpoint(tmp_path / "theirs")
    assert_same_logits("12b beside its embedders", model, hf, images=False)
    save_checkpoint(model, tmp_path / "ours")
    again = hf_load(tmp_path / "ours", Gemma4UnifiedForConditionalGeneration)
    assert sum("embed_vision" in name for name in again.state_dict()) > 5
    assert sum("embed_audio" in name for name in again.state_dict()) > 0
    assert_same_tensors(again, hf)


def test_unused_keys_and_values_of_a_hub_file_do_not_disturb(tmp_path):
    directory, hf = saved_by_hf(tmp_path, "e2b")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    for part, shape in (("k_proj", (16, 48)), ("v_proj", (16, 48)), ("k_norm", (16,))):
        name = f"model.language_model.layers.6.self_attn.{part}.weight"
        assert name not in tensors
        tensors[name] = np.full(shape, np.nan, np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = load_checkpoint(directory, text_only=False)
    assert_same_logits("e2b as on the hub", model, hf, images=True)
    save_checkpoint(model, tmp_path / "ours")
    assert_same_tensors(hf_load(tmp_path / "ours"), hf)
