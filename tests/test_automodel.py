# SPDX-License-Identifier: Apache-2.0
"""Tunix's AutoModel gives this model: by name, by directory, from a fake hub; others as ever."""

import importlib
import json
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from small_models import forward
from tunix.cli.utils import model as cli_model
from tunix.models import automodel, naming

import tunix_gemma4
from tunix_gemma4 import params, params_safetensors
from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.config import ModelConfig
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration

SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
SPELLINGS = ("google/gemma-4-{}", "google/gemma-4-{}-it", "GOOGLE/Gemma-4-{}-IT")
OTHERS = ("qwen3-0.6b", "gemma-3-4b-it", "gemma-2-2b", "gemma-2b", "llama-3.1-8b")
Source = automodel.ModelSource
AutoModel = automodel.AutoModel


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


@pytest.fixture(autouse=True)
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


@pytest.fixture
def hub(monkeypatch, tiny_dir, tmp_path):
    """A hub that has the tiny directory under every id, and the calls it got."""
    calls = []

    def snapshot_download(repo_id, *, local_dir=None, allow_patterns=None):
        calls.append((repo_id, local_dir, tuple(allow_patterns)))
        target = tmp_path / "hub/snapshots/0f3ad1" if local_dir is None else local_dir
        shutil.copytree(tiny_dir, target, dirs_exist_ok=True)
        return str(target)

    def refuse(*args, **kwargs):
        raise AssertionError("nothing else of the hub is needed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name in ("list_repo_files", "hf_hub_download", "login"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return calls


def same_weights(left, right):
    pairs = zip(
        nnx.to_flat_state(nnx.state(left)), nnx.to_flat_state(nnx.state(right)), strict=True
    )
    return all(
        a == b and bool((x[...] == y[...]).all()) and x.dtype == y.dtype for (a, x), (b, y) in pairs
    )


def renamed(tiny_dir, target, **config):
    shutil.copytree(tiny_dir, target)
    if config:
        path = target / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


# ---- Names.


@pytest.mark.parametrize("size", SIZES)
def test_every_size_in_every_spelling_comes_from_the_hub(hub, size):
    for spelling in SPELLINGS:
        model_id = spelling.format(size)
        automodel.download_model(model_id, None, Source.HUGGINGFACE)
        assert hub[-1] == (model_id, None, ("*.json", "*.safetensors", "*.model", "*.jinja"))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_model_of_the_hub_is_ours_from_the_hubs_own_cache(hub, mesh, spelling):
    model, path = AutoModel.from_pretrained(spelling.format("26B-A4B"), mesh)
    assert type(model) is Gemma4ForConditionalGeneration
    assert [call[:2] for call in hub] == [(spelling.format("26B-A4B"), None)]
    assert path.endswith("snapshots/0f3ad1")
    assert model.config.source_directory == path


def test_a_download_path_is_where_the_hub_writes(hub, mesh, tiny_dir, tmp_path):
    target = str(tmp_path / "models")
    model, path = AutoModel.from_pretrained(
        "google/gemma-4-E2B-it", mesh, model_download_path=target
    )
    assert path == target
    assert hub[0][1] == target
    assert same_weights(model, load_checkpoint(tiny_dir, mesh))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("suffix", ["", "-it", "-IT"])
def test_names_give_the_released_configurations(size, suffix):
    config = automodel.call_model_config(f"gemma-4-{size}{suffix}")
    preset = getattr(ModelConfig, f"gemma4_{size.lower().replace('-', '_')}")()
    assert type(config) is ModelConfig
    assert config == preset
    assert config.text_only


@pytest.mark.parametrize("kind", list(automodel.ModelModule))
def test_modules_of_the_family_are_ours(kind):
    ours = importlib.import_module(f"tunix_gemma4.{kind.value}")
    for name in ("gemma-4-e2b", "gemma-4-26B-A4B-it", "gemma4_31b_it"):
        assert automodel.get_model_module(name, kind) is ours


# ---- Directories.


@pytest.mark.parametrize("name", ["my model", "gemma-3-4b-it", "Qwen3-0.6B", "snapshots/9c1d"])
def test_a_directory_is_known_by_its_config_whatever_its_name(mesh, tiny_dir, tmp_path, name):
    directory = renamed(tiny_dir, tmp_path / name)
    model, path = AutoModel.from_pretrained(str(directory), mesh)
    assert type(model) is Gemma4ForConditionalGeneration
    assert path == str(directory)
    assert same_weights(model, load_checkpoint(tiny_dir, mesh))


def test_the_configuration_is_the_directorys_not_the_names(mesh, tiny_dir, tmp_path):
    directory = renamed(tiny_dir, tmp_path / "gemma-4-31B-it")
    model, _ = AutoModel.from_pretrained(str(directory), mesh)
    assert model.config == ModelConfig.from_hf(tiny_dir)


@pytest.mark.parametrize("source", [Source.GCS, Source.INTERNAL])
def test_sources_with_a_model_path_take_a_local_directory(mesh, tiny_dir, source):
    model, path = AutoModel.from_pretrained(
        "google/gemma-4-E2B", mesh, model_source=source, model_path=str(tiny_dir)
    )
    assert type(model) is Gemma4ForConditionalGeneration
    assert path == str(tiny_dir)


def test_text_only_and_dtype_reach_the_model(mesh, tiny_dir):
    model, _ = AutoModel.from_pretrained(
        str(tiny_dir), mesh, text_only=False, dtype="bfloat16", remat_config=2
    )
    expected = load_checkpoint(tiny_dir, mesh, text_only=False, dtype=jnp.bfloat16)
    assert model.config.has_vision
    assert model.config.dtype == jnp.bfloat16
    assert model.config.remat.name == "BLOCK"
    assert same_weights(model, expected)


def test_what_the_command_line_says_to_every_model_is_taken(mesh, tiny_dir):
    model, _ = AutoModel.from_pretrained(
        str(tiny_dir), mesh, rng_seed=0, intermediate_ckpt_dir="", use_flash_attention=False
    )
    assert type(model) is Gemma4ForConditionalGeneration


def test_arguments_that_would_do_nothing_are_refused(mesh, tiny_dir):
    with pytest.raises(ValueError, match="text_onyl unknown"):
        AutoModel.from_pretrained(str(tiny_dir), mesh, text_onyl=False)


def test_a_path_that_holds_no_gemma_4_is_refused_before_the_hub_is_asked(hub, mesh, tmp_path):
    with pytest.raises(ValueError, match="is no directory"):
        AutoModel.from_pretrained(str(tmp_path / "gemma-4-e2b"), mesh)
    (tmp_path / "gemma-4-e4b").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json of a Gemma 4"):
        AutoModel.from_pretrained(str(tmp_path / "gemma-4-e4b"), mesh)
    with pytest.raises(ValueError, match="hub id such as google/"):
        AutoModel.from_pretrained("gemma-4-e2b", mesh)
    assert not hub


# ---- Other families.


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_have_the_hosts_own_modules_and_configurations(name):
    module = automodel.get_model_module(name, automodel.ModelModule.MODEL)
    assert module.__name__.startswith("tunix.models.")
    ours = automodel.call_model_config(name)
    tunix_gemma4.unregister()
    assert automodel.get_model_module(name, automodel.ModelModule.MODEL) is module
    assert automodel.call_model_config(name) == ours


def test_directories_of_other_families_go_to_the_host(monkeypatch, mesh, tiny_dir, tmp_path):
    directory = renamed(tiny_dir, tmp_path / "gemma-3-4b-it", model_type="gemma3")
    with pytest.raises(NotImplementedError, match="Gemma 3 models are only supported"):
        monkeypatch.setattr("tunix.oss.utils.hf_pipeline", lambda path, target: path)
        AutoModel.from_pretrained(str(directory), mesh)
    other = renamed(tiny_dir, tmp_path / "plain", model_type="llama")
    with pytest.raises(ValueError, match="model ID format|model family"):
        AutoModel.from_pretrained(str(other), mesh)


def test_unregistering_gives_the_hosts_model_back():
    tunix_gemma4.unregister()
    module = automodel.get_model_module("gemma-4-e2b", automodel.ModelModule.MODEL)
    assert module.__name__ == "tunix.models.gemma4.model"
    with pytest.raises(AttributeError, match="gemma4_e2b_it"):
        automodel.call_model_config("gemma-4-e2b-it")
    with pytest.raises(ValueError, match="model ID format|model family"):
        AutoModel.from_pretrained("/data/anything", None)


def test_nothing_of_the_hosts_naming_changes():
    before = [naming.ModelNaming(model_name=name) for name in ("gemma-4-e2b-it", *OTHERS)]
    tunix_gemma4.unregister()
    assert before == [naming.ModelNaming(model_name=name) for name in ("gemma-4-e2b-it", *OTHERS)]


# ---- Scripts that name the family's modules themselves.


def test_the_two_imports_of_a_script_load_a_model(mesh, tiny_dir):
    from tunix_gemma4 import model as gemma4_model

    config = gemma4_model.ModelConfig.from_hf(tiny_dir, text_only=False)
    loaded = params_safetensors.create_model_from_safe_tensors(
        file_dir=str(tiny_dir), config=config, mesh=mesh, dtype=jnp.bfloat16, mode="original"
    )
    assert isinstance(loaded, gemma4_model.Gemma4)
    assert loaded.config.has_vision
    assert stored_types(loaded) == {"bfloat16"}
    with pytest.raises(AttributeError, match="ShardingConfig"):
        _ = gemma4_model.ShardingConfig


def stored_types(model):
    return {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))}


def test_stored_and_computing_types_are_set_apart_as_in_tunix(mesh, tiny_dir):
    """`dtype` of its loaders is that of what is stored, `config.dtype` of what is computed."""
    load = params_safetensors.create_model_from_safe_tensors
    tokens = jnp.arange(20, 28)[None]
    for stored, computing in (("float32", "bfloat16"), ("bfloat16", "float32")):
        config = ModelConfig.from_hf(tiny_dir, dtype=computing)
        others = (
            params.create_model_from_checkpoint(tiny_dir, config, dtype=stored),
            AutoModel.from_pretrained(str(tiny_dir), mesh, dtype=computing, param_dtype=stored)[0],
        )
        model = load(tiny_dir, config, dtype=stored)
        hidden = forward(model, tokens, skip_lm_head=True)[0]
        assert hidden.dtype == computing
        for found in (model, *others):
            assert (stored_types(found), found.config.dtype) == ({stored}, computing)
            assert found.config.param_dtype == stored
    # What is stored in bfloat16 and computed in float32 is not computed in bfloat16.
    rounded = forward(load_checkpoint(tiny_dir, dtype="bfloat16"), tokens, skip_lm_head=True)[0]
    difference = jnp.abs(hidden - rounded).max()
    assert 1e-4 < difference < 0.2 * jnp.abs(hidden).max()


def test_loaders_and_model_take_text_only(tiny_dir):
    config = ModelConfig.from_hf(tiny_dir)
    loaders = (
        params_safetensors.create_model_from_safe_tensors,
        params.create_model_from_checkpoint,
    )
    for load in loaders:
        model = load(tiny_dir, config, text_only=False)
        assert model.vision_encoder is not None and model.config.has_vision
        assert load(tiny_dir, model.config, text_only=True).vision_encoder is None
        assert load(tiny_dir, model.config).vision_encoder is not None
    both = nnx.eval_shape(
        lambda: Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0), text_only=False)
    )
    assert both.vision_encoder is not None and config.text_only


def test_an_unknown_mode_of_the_loader_is_refused(tiny_dir):
    with pytest.raises(ValueError, match="mode: expected one of auto, optimized, original"):
        params_safetensors.create_model_from_safe_tensors(
            tiny_dir, ModelConfig.from_hf(tiny_dir), mode="fast"
        )


def test_checkpoints_of_another_kind_are_refused_by_name(tiny_dir, tmp_path):
    config = ModelConfig.from_hf(tiny_dir)
    assert params.create_model_from_checkpoint(tiny_dir, config).config == config
    for place in (tmp_path, "gs://bucket/gemma4/e2b"):
        with pytest.raises(ValueError, match="Orbax checkpoints and remote paths are not read"):
            params.create_model_from_checkpoint(place, config)


# ---- The command line's way to a model.


def model_section(directory, **changes):
    return {
        "model_name": "gemma-4-e2b-it",
        "model_source": "huggingface",
        "model_id": str(directory),
        "model_display": False,
        "intermediate_ckpt_dir": "unused",
        **changes,
    }


def test_the_model_section_reaches_model_and_adapters(caplog, mesh, tiny_dir):
    lora = {"module_path": ".*q_einsum|.*gate_proj", "rank": 4, "alpha": 8.0}
    section = model_section(tiny_dir, text_only=False, dtype="bfloat16", lora_config=lora)
    caplog.set_level("INFO", logger="absl")
    model, path = cli_model.create_model(section, {"tokenizer_path": "here"}, mesh)
    assert path == "here"
    assert model.config.has_vision
    assert model.config.dtype == jnp.bfloat16
    assert "gate_proj 6, q_proj 6" in caplog.text
    plain, _ = cli_model.create_model(model_section(tiny_dir), {"tokenizer_path": ""}, mesh)
    assert not plain.config.has_vision


def test_a_pattern_that_reaches_nothing_is_refused(mesh, tiny_dir):
    lora = {"module_path": ".*query_einsum", "rank": 4, "alpha": 8.0}
    with pytest.raises(ValueError, match="matches no projection"):
        cli_model.create_model(
            model_section(tiny_dir, lora_config=lora), {"tokenizer_path": ""}, mesh
        )


def test_adapters_of_other_models_are_the_hosts(monkeypatch, mesh):
    class Asked(Exception):
        pass

    class Toy(nnx.Module):
        def get_model_input(self):
            raise Asked

    with pytest.raises(Asked):
        cli_model.apply_lora_to_model(Toy(), mesh, {"module_path": ".*", "rank": 2, "alpha": 1.0})
