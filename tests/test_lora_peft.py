# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk, without PEFT: names, shapes, refusals. With PEFT: tests/parity."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_models import random_model

from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.lora import LoraConfig, apply_lora, load_adapter, save_adapter
from tunix_gemma4.lora.adapters import adapted
from tunix_gemma4.lora.peft import check_adapter
from tunix_gemma4.sharding import shard_model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DECODER = "base_model.model.model.language_model.layers"
TOWER = "base_model.model.model.vision_tower.encoder.layers"


@pytest.fixture(scope="module")
def model():
    return random_model("e2b", text_only=False)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A model with adapters on everything, and its adapter's directory: copy it to change it."""
    lora = trained(apply_lora(model, LoraConfig(rank=4, alpha=6, targets="all")))
    directory = tmp_path_factory.mktemp("lora") / "adapter"
    save_adapter(lora, directory, base_model_name_or_path="some/base")
    return lora, directory


@pytest.fixture
def edit(saved, tmp_path):
    """`edit(settings, tensors)` copies the adapter with other settings and tensors (None: drop)."""

    def copy(settings=None, tensors=None):
        (tmp_path / "edited").mkdir()
        content = json.loads((saved[1] / CONFIG).read_text()) | (settings or {})
        (tmp_path / "edited" / CONFIG).write_text(json.dumps(content))
        arrays = load_file(saved[1] / TENSORS) | (tensors or {})
        arrays = {name: array for name, array in arrays.items() if array is not None}
        save_file(arrays, tmp_path / "edited" / TENSORS)
        return tmp_path / "edited"

    return copy


def trained(lora):
    for index, module in enumerate(adapted(lora).values()):
        b = module.kernel_lora_b
        b[...] = jax.random.normal(jax.random.key(index), b.shape)
    return lora


def matrices(model):
    return jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, matrices(found), matrices(expected))


def test_tensors_carry_pefts_names_and_layout(saved):
    lora, directory = saved
    tensors = load_file(directory / TENSORS)
    assert len(tensors) == len(jax.tree.leaves(nnx.state(lora, nnx.LoRAParam)))
    attention = lora.language_model.layers[2].self_attn
    name = f"{DECODER}.2.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], attention.q_proj.kernel_lora_a[...].T)
    linear = lora.vision_tower.encoder.layers[1].mlp.up_proj.linear
    name = f"{TOWER}.1.mlp.up_proj.linear.lora_B.weight"
    np.testing.assert_array_equal(tensors[name], linear.kernel_lora_b[...].T)
    # Layers 3 to 5 reuse keys and values.
    assert f"{DECODER}.2.self_attn.k_proj.lora_A.weight" in tensors
    assert f"{DECODER}.3.self_attn.k_proj.lora_A.weight" not in tensors
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}


def test_the_settings_are_pefts(saved):
    settings = json.loads((saved[1] / CONFIG).read_text())
    targets = settings.pop("target_modules")
    assert settings == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
    }
    assert r"model\.language_model\.layers\.(?:0|1|2)\." in targets


def test_files_of_the_base_come_along(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("e2b")
    lora = apply_lora(load_checkpoint(source), LoraConfig(rank=2))
    save_adapter(lora, tmp_path / "adapter")
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    copied = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert names | {"chat_template.jinja", CONFIG, TENSORS} <= copied
    assert not copied & {"config.json", "model.safetensors"}
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert settings["base_model_name_or_path"] == str(source)


def test_an_adapter_loads_into_the_base_and_into_an_adapted_model(saved, model):
    lora, directory = saved
    assert_same(load_adapter(model, directory), lora)
    fresh = apply_lora(model, LoraConfig(rank=4, alpha=6, targets="all", quantize="nf4"))
    loaded = load_adapter(fresh, directory)
    assert_same(loaded, lora)
    assert adapted(loaded)["language_model.layers.0.mlp.up_proj"].kernel.qvalue.dtype == jnp.uint4
    assert not np.any(adapted(fresh)["language_model.layers.0.mlp.up_proj"].kernel_lora_b[...])


def test_an_adapter_loads_onto_the_mesh_of_its_base(saved, model):
    lora, directory = saved
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    loaded = load_adapter(shard_model(nnx.clone(model), mesh), directory)
    assert_same(loaded, lora)
    a = loaded.language_model.layers[0].self_attn.q_proj.kernel_lora_a.get_raw_value()
    assert a.sharding.spec == jax.P(("fsdp", "tp"))


def test_an_adapter_of_the_text_only_class_loads(saved, edit, model):
    _, directory = saved
    tensors = load_file(directory / TENSORS)
    renamed = {
        name.replace("model.language_model.layers", "model.layers"): array
        for name, array in tensors.items()
        if "language_model" in name
    }
    other = edit(tensors=dict.fromkeys(tensors) | renamed)
    loaded = load_adapter(model, other)
    assert set(adapted(loaded)) == {n for n in adapted(saved[0]) if n.startswith("language_model")}


def test_the_projection_of_per_layer_inputs_has_two_spellings(saved, edit, model):
    name = "per_layer_model_projection.lora_{}.weight"
    a, b = np.ones((4, 32), np.float32), np.ones((6 * 8, 4), np.float32)
    extra = {name.format("A"): a, name.format("B"): b}
    both = []
    for prefix in ("base_model.model.model.", "base_model.model.model.language_model."):
        tensors = {f"{prefix}{key}": array for key, array in extra.items()}
        directory = saved[1].with_name(f"spelt-{len(both)}")
        edit(tensors=tensors).rename(directory)
        both.append(load_adapter(model, directory))
    assert "language_model.per_layer_model_projection" in adapted(both[0])
    assert_same(*both)


def test_keys_and_values_that_are_never_computed_are_skipped(saved, edit, model):
    extra = {
        f"{DECODER}.4.self_attn.k_proj.lora_A.weight": np.zeros((4, 32), np.float32),
        f"{DECODER}.4.self_attn.k_proj.lora_B.weight": np.zeros((8, 4), np.float32),
    }
    assert_same(load_adapter(model, edit(tensors=extra)), saved[0])


# ---- Refusals.


def test_an_earlier_adapter_is_replaced_and_anything_else_is_not(saved, tmp_path):
    lora, _ = saved
    target = tmp_path / "adapter"
    target.mkdir()
    save_adapter(lora, target)
    (target / "notes.txt").write_text("mine")
    (target / "tokenizer.json").write_text("of another base")
    save_adapter(lora, target)
    assert (target / "notes.txt").read_text() == "mine"
    assert not (target / "tokenizer.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no adapter that save_adapter wrote"):
        save_adapter(lora, other)
    assert [file.name for file in other.iterdir()] == ["notes.txt"]


def test_a_failed_save_leaves_the_earlier_adapter(saved, tmp_path, monkeypatch):
    lora, directory = saved
    target = tmp_path / "adapter"
    save_adapter(lora, target)
    before = load_file(target / TENSORS)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("tunix_gemma4.lora.peft.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained(nnx.clone(lora)), target)
    after = load_file(target / TENSORS)
    assert before.keys() == after.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_whole_layers_without_tensors_are_missing(saved, edit, model):
    names = load_file(saved[1] / TENSORS)
    second = {name: None for name in names if name.startswith(f"{DECODER}.1.")}
    with pytest.raises(ValueError, match=rf"missing: .*{DECODER}\.1\.self_attn\.q_proj"):
        load_adapter(model, edit(tensors=second))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"target_modules": ["q_proj"]}, r"\.q_proj\."),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]}, r"\.q_proj\."),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, r"\.1\..*\.q_proj\."),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
            r"\.1\..*\.q_proj\.",
        ),
        ({"target_modules": r"model\.layers\.0\.self_attn\.(q|o)_proj"}, r"\.0\..*\.[qo]_proj\."),
    ],
)
def test_what_the_settings_leave_out_is_not_missing(settings, kept, saved, edit, model):
    dropped = {
        name: None
        for name in load_file(saved[1] / TENSORS)
        if not (name.startswith(DECODER) and re.search(kept, name))
    }
    assert adapted(load_adapter(model, edit(settings, dropped)))


def test_an_adapter_that_is_not_finite_is_refused(saved, edit, model):
    name = f"{DECODER}.2.self_attn.q_proj.lora_A.weight"
    spoilt = np.full_like(load_file(saved[1] / TENSORS)[name], np.nan)
    with pytest.raises(ValueError, match=f"NaN or infinity in .*{name}"):
        load_adapter(model, edit(tensors={name: spoilt}))


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(edit, model):
    q, up = f"{DECODER}.0.self_attn.q_proj", f"{DECODER}.1.mlp.up_proj"
    directory = edit(
        tensors={
            f"{q}.lora_B.weight": None,
            f"{up}.lora_A.weight": np.zeros((4, 7), np.float32),
            f"{DECODER}.9.mlp.up_proj.lora_A.weight": np.zeros((4, 32), np.float32),
        }
    )
    with pytest.raises(ValueError) as error:
        load_adapter(model, directory)
    message = str(error.value)
    assert f"missing: {q}.lora_B.weight" in message
    assert f"unexpected: {DECODER}.9.mlp.up_proj.lora_A.weight" in message
    assert "up_proj.lora_A.weight: expected shape (4, 32), found (4, 7)" in message


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("model.language_model.layers.0.router.proj", "router (2 tensors, such as base_model.mod"),
        ("model.audio_tower.layers.0.self_attn.q_proj.linear", "audio (2 tensors"),
        ("model.embed_audio.embedding_projection", "exclude_modules='.*audio.*'"),
        ("lm_head", "head or embedding (2 tensors"),
        ("model.language_model.embed_tokens", "the embedding is the head here"),
    ],
)
def test_what_cannot_be_carried_is_named_before_a_base_is_loaded(edit, module, reason):
    extra = {
        f"base_model.model.{module}.lora_{side}.weight": np.ones((4, 4), np.float32)
        for side in "AB"
    }
    directory = edit(tensors=extra)
    with pytest.raises(ValueError) as error:
        check_adapter(directory)
    assert str(error.value).startswith(f"{directory / TENSORS}: what cannot be carried:\n")
    assert reason in str(error.value)


def test_a_vision_adapter_on_a_text_only_model_names_the_setting(saved):
    with pytest.raises(ValueError, match=r"text_only=False\?\nunexpected: .*vision_tower"):
        load_adapter(random_model("e2b", text_only=True), saved[1])


def test_an_adapter_of_another_scale_is_not_poured_into_existing_adapters(saved, model):
    lora = apply_lora(model, LoraConfig(rank=4, alpha=8, targets="all"))
    with pytest.raises(ValueError, match=r"rank 4 and scale 1\.5; .* rank 4 and scale 2"):
        load_adapter(lora, saved[1])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "LOHA"}, "peft_type: found 'LOHA'; supported: 'LORA'"),
        ({"use_dora": True}, "unsupported settings {'use_dora': True}"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: found lm_head: the embedding is the"),
        ({"modules_to_save": ["model.embed_tokens"]}, "modules_to_save: found model.embed_tokens"),
        ({"modules_to_save": ["norm"]}, "'modules_to_save'"),
        ({"r": 0}, "adapter_config.json: r: expected a whole number of at least 1, found 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a positive number, found nan"),
        ({"rank_pattern": {"q_proj": 8}}, "'rank_pattern'"),
        ({"bias": "all"}, "{'bias': 'all'}"),
        ({"init_lora_weights": "pissa"}, "{'init_lora_weights': 'pissa'}"),
        ({"a_setting_of_the_future": 1}, "a_setting_of_the_future"),
    ],
)
def test_settings_that_change_the_maths_are_refused(edit, model, settings, message):
    with pytest.raises(ValueError, match=message):
        load_adapter(model, edit(settings))


def test_a_directory_without_an_adapter_is_named(model, tmp_path):
    with pytest.raises(ValueError, match=f"{CONFIG}: no such file"):
        load_adapter(model, tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(ValueError, match=f"{TENSORS}: no such file"):
        load_adapter(model, tmp_path)
    (tmp_path / TENSORS).write_bytes(b"\0" * 4)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        load_adapter(model, tmp_path)
    save_file({}, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="holds no tensors"):
        load_adapter(model, tmp_path)


def test_a_model_without_adapters_has_nothing_to_save(model, tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
