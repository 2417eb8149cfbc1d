# SPDX-License-Identifier: Apache-2.0
"""What a config.json becomes, layer by layer, and which ones are refused in which words."""

import copy
import dataclasses
import enum
import itertools
import json

import jax.numpy as jnp
import pytest
from transformers import Gemma4Config, Gemma4UnifiedConfig

from tunix_gemma4.config import LayerSpec, ModelConfig, RematConfig
from tunix_gemma4.model.gemma4 import abstract_model, num_parameters
from tunix_gemma4.testing.tiny import tiny_config, tiny_hf_config

SIZES = ("e2b", "e4b", "12b", "26b_a4b", "31b")
SLIDING, FULL = "sliding_attention", "full_attention"


def factory(size: str):
    return getattr(ModelConfig, f"gemma4_{size}")


def raw(preset: str = "e2b", **text) -> dict:
    """A tiny config.json with `text` changed in its text_config; it ends in 6 layers."""
    content = copy.deepcopy(tiny_hf_config(preset))
    content["text_config"] |= text
    return content


def refusal(content, **arguments) -> str:
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf(content, **arguments)
    return str(caught.value)


# ---- The released sizes.


@pytest.mark.parametrize(
    ("size", "text_only", "expected"),
    [
        ("e2b", False, 4_797_114_083),
        ("e4b", False, 7_632_344_554),
        ("26b_a4b", False, 25_805_936_206),
        ("31b", False, 31_273_088_876),
        ("e2b", True, 4_628_569_379),
        ("e4b", True, 7_463_013_418),
        ("26b_a4b", True, 25_233_141_790),
        ("31b", True, 30_697_345_340),
        ("12b", True, 11_907_350_320),
    ],
)
def test_released_sizes_have_exactly_their_parameters(size, text_only, expected):
    assert num_parameters(abstract_model(factory(size)(text_only))) == expected


@pytest.mark.parametrize("size", SIZES)
def test_factories_need_no_argument_and_have_a_twin(size):
    config = factory(size)()
    assert config.text_only
    assert not config.has_vision
    assert config == factory(f"{size}_it")()
    assert config.dtype == config.param_dtype == jnp.bfloat16
    assert factory(size)() is not config  # Tunix assigns fields of what it gets.


@pytest.mark.parametrize("size", ["e2b", "e4b", "26b_a4b", "31b"])
def test_factories_build_a_tower_when_asked(size):
    assert factory(size)(text_only=False).has_vision


def test_12b_has_no_tower_yet():
    with pytest.raises(ValueError, match="images are supported for model_type 'gemma4'"):
        ModelConfig.gemma4_12b(text_only=False)


def test_e2b_layers_are_settled():
    layers = ModelConfig.gemma4_e2b().layers
    assert [spec.index for spec in layers if spec.kind == "full"] == [4, 9, 14, 19, 24, 29, 34]
    assert [spec.kv_from for spec in layers[:15]] == list(range(15))
    assert {(spec.kind, spec.kv_from) for spec in layers[15:]} == {("sliding", 13), ("full", 14)}
    assert [spec.mlp_dim for spec in layers] == [6144] * 15 + [12_288] * 20
    assert layers[13] == LayerSpec(
        index=13,
        kind="sliding",
        head_dim=256,
        num_kv_heads=1,
        window=512,
        rope_theta=10_000.0,
        rope_fraction=1.0,
        rope_factor=1.0,
        mlp_dim=6144,
        k_eq_v=False,
        kv_from=13,
        moe=False,
    )


def test_e4b_shares_from_the_last_layers_of_either_kind_and_keeps_its_mlp():
    layers = ModelConfig.gemma4_e4b().layers
    assert {(spec.kind, spec.kv_from) for spec in layers[24:]} == {("sliding", 22), ("full", 23)}
    assert {spec.mlp_dim for spec in layers} == {10_240}


@pytest.mark.parametrize(
    ("size", "sliding_heads", "full_heads"), [("12b", 8, 1), ("26b_a4b", 8, 2), ("31b", 16, 4)]
)
def test_large_sizes_use_keys_as_values_in_full_layers_alone(size, sliding_heads, full_heads):
    for spec in factory(size)().layers:
        full = spec.index % 6 == 5
        assert spec.kind == ("full" if full else "sliding")
        assert spec.k_eq_v is full
        assert spec.num_kv_heads == (full_heads if full else sliding_heads)
        assert (spec.head_dim, spec.window) == ((512, None) if full else (256, 1024))
        assert (spec.rope_theta, spec.rope_fraction) == ((1e6, 0.25) if full else (1e4, 1.0))
        assert spec.moe is (size == "26b_a4b")
        assert not spec.shares_kv


# ---- Sharing of keys and values.


def transformers_rule(layer_types: list[str], shared: int) -> list[int | None]:
    """Layer whose K/V each layer reads, by walking as transformers' forward does.

    Layers before the shared ones write their K/V under their kind; shared ones read there. None
    stands for reading what nobody wrote.
    """
    written: dict[str, int] = {}
    sources: list[int | None] = []
    for index, kind in enumerate(layer_types):
        if index < len(layer_types) - shared:
            written[kind] = index
            sources.append(index)
        else:
            sources.append(written.get(kind))
    return sources


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_sharing_follows_the_integer_rule_for_every_pattern_and_count(count):
    for head in itertools.product((SLIDING, FULL), repeat=count - 1):
        layer_types = [*head, FULL]
        for shared in range(count):
            expected = transformers_rule(layer_types, shared)
            content = raw(
                layer_types=layer_types, num_hidden_layers=count, num_kv_shared_layers=shared
            )
            if None in expected:
                message = refusal(content)
                index = expected.index(None)
                assert message == (
                    f"num_kv_shared_layers: with {shared} shared layers, layer {index} "
                    f"({layer_types[index]}) has no unshared layer of its kind to read from"
                )
                continue
            layers = ModelConfig.from_hf(content).layers
            assert [spec.kv_from for spec in layers] == expected
            wide = [128 if index >= count - shared else 64 for index in range(count)]
            assert [spec.mlp_dim for spec in layers] == wide


@pytest.mark.parametrize("size", ["e2b", "e4b"])
def test_every_share_count_of_the_released_patterns_is_settled(size):
    config = factory(size)()
    count = config.num_hidden_layers
    for shared in range(count):
        expected = transformers_rule(config.layer_types, shared)
        if None in expected:
            with pytest.raises(ValueError, match="has no unshared layer of its kind"):
                dataclasses.replace(config, num_kv_shared_layers=shared)
        else:
            layers = dataclasses.replace(config, num_kv_shared_layers=shared).layers
            assert [spec.kv_from for spec in layers] == expected


def test_mlp_stays_narrow_where_the_model_is_not_double_wide():
    content = raw(use_double_wide_mlp=False)
    assert {spec.mlp_dim for spec in ModelConfig.from_hf(content).layers} == {64}


def test_global_kv_heads_count_only_where_keys_are_values():
    # transformers reads num_global_key_value_heads under attention_k_eq_v alone.
    content = raw("12b", attention_k_eq_v=False)
    assert {spec.num_kv_heads for spec in ModelConfig.from_hf(content).layers} == {2}


# ---- Reading and writing.


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("text_only", [True, False])
def test_config_survives_writing_and_reading(size, text_only):
    if size == "12b" and not text_only:
        text_only = True
    for config in (factory(size)(text_only), tiny_config(size, text_only=text_only)):
        written = json.loads(json.dumps(config.to_hf()))
        again = ModelConfig.from_hf(written, text_only=text_only)
        assert again == config
        assert again.layers == config.layers
        assert again.to_hf() == written


@pytest.mark.parametrize("size", SIZES)
def test_transformers_reads_what_we_write_and_writes_what_we_read(size):
    for config in (factory(size)(), tiny_config(size, text_only=True)):
        hf_class = Gemma4UnifiedConfig if size == "12b" else Gemma4Config
        theirs = hf_class.from_dict(config.to_hf())
        assert theirs.text_config.layer_types == config.layer_types
        again = json.loads(theirs.to_json_string(use_diff=False))
        assert ModelConfig.from_hf(again) == config


def test_unchanged_files_keep_every_key():
    content = raw() | {"a_key_of_tomorrow": {"x": [1, 2]}}
    content["text_config"]["another"] = "kept"
    content["vision_config"]["default_output_length"] = 280
    before = copy.deepcopy(content)
    written = ModelConfig.from_hf(content).to_hf()
    assert content == before
    assert written["a_key_of_tomorrow"] == {"x": [1, 2]}
    for section in ("text_config", "vision_config"):
        assert content[section].items() <= written[section].items()


def test_changed_fields_are_written():
    config = ModelConfig.from_hf(raw())
    config.sliding_window = 5
    config.param_dtype = jnp.dtype(jnp.bfloat16)
    written = config.to_hf()
    assert written["text_config"]["sliding_window"] == 5
    assert written["dtype"] == "bfloat16"


def test_directory_file_and_mapping_read_alike(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw()))
    config = ModelConfig.from_hf(tmp_path)
    assert config == ModelConfig.from_hf(tmp_path / "config.json") == ModelConfig.from_hf(raw())
    assert config == ModelConfig.from_hf(str(tmp_path))
    assert config.source_directory == str(tmp_path)
    assert ModelConfig.from_hf(raw()).source_directory is None


def test_fields_given_to_from_hf_override_the_file():
    config = ModelConfig.from_hf(raw(), dtype="bfloat16", sliding_window=3)
    assert (config.dtype, config.param_dtype) == (jnp.bfloat16, jnp.float32)
    assert config.layers[0].window == 3


@pytest.mark.parametrize("place", ["dtype", "torch_dtype", "text_config"])
def test_dtype_is_found_in_every_place_transformers_wrote_it(place):
    content = raw()
    del content["dtype"], content["text_config"]["dtype"]
    target = content["text_config"] if place == "text_config" else content
    target["dtype" if place == "text_config" else place] = "bfloat16"
    assert ModelConfig.from_hf(content).dtype == jnp.bfloat16


def of_today(content: dict, **changes) -> dict:
    """`content` as transformers from 5.15 on writes it; `changes` of each full layer."""
    text = content["text_config"]
    own = {"head_dim": text.pop("global_head_dim")}
    heads = text.pop("num_global_key_value_heads", None)
    if text["attention_k_eq_v"] and heads is not None:
        own["num_key_value_heads"] = heads
    width = len(str(len(text["layer_types"]) - 1))
    text["per_layer_config"] = {
        str(index).zfill(width): own | changes
        for index, kind in enumerate(text["layer_types"])
        if kind == FULL
    }
    return content


@pytest.mark.parametrize("size", SIZES)
def test_per_layer_config_is_what_older_files_say_in_two_fields(size):
    for config in (factory(size)(), tiny_config(size, text_only=True)):
        content = of_today(config.to_hf())
        if config.vision_config is not None:
            content["vision_config"]["rope_parameters"]["rope_type"] = "axial"
        again = ModelConfig.from_hf(content)
        assert again.layers == config.layers
        assert again.to_hf() == config.to_hf()  # In the fields that older readers know too.


def test_layers_without_an_override_have_the_general_head():
    content = of_today(raw("31b"))
    content["text_config"]["per_layer_config"] = {}
    layers = ModelConfig.from_hf(content).layers
    assert {(spec.head_dim, spec.num_kv_heads) for spec in layers} == {(8, 2)}


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("31b", {"2": {"head_dim": 64}}, "per_layer_config: head_dim of the full_attention layers"),
        (
            "e2b",
            {"2": {"num_key_value_heads": 2}, "5": {"num_key_value_heads": 2}},
            "per_layer_config: full_attention layers with num_key_value_heads of their own (2",
        ),
        ("31b", {"2": {"intermediate_size": 8}}, "per_layer_config['2'].intermediate_size: found"),
        ("31b", {"2": {"skip": ["mlp"]}}, "per_layer_config['2'].skip: found ['mlp']; what may"),
        ("31b", {"5": {}}, "per_layer_config['5']: expected each layer once, by a number below 5"),
        ("31b", {"2": {}, "02": {}}, "per_layer_config['02']: expected each layer once"),
        ("31b", {"2": 5}, "per_layer_config['2']: expected an object, found 5"),
        ("31b", {"2": {"head_dim": 0.5}}, "per_layer_config['2'].head_dim: expected a positive"),
        ("31b", [], "per_layer_config: expected an object, found []"),
    ],
)
def test_layers_that_differ_in_what_has_one_value_here_are_named(preset, overrides, message):
    content = of_today(raw(preset))
    content["text_config"]["per_layer_config"] = overrides
    assert refusal(content).startswith(message)


def test_two_spellings_that_contradict_each_other_are_refused():
    content = of_today(raw("31b"))
    content["text_config"]["global_head_dim"] = 48
    assert refusal(content).startswith("per_layer_config: it gives global_head_dim 16, and")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config (bitsand"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config (c"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "quantization_config: "),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantization (mlx): "),
        (
            {"text_config": {"quantization_config": {"quant_method": "awq"}}},
            "quantization_config (",
        ),
    ],
)
def test_quantized_directories_are_named_with_the_way_out(change, named):
    message = refusal(raw() | change)
    assert message.startswith(named)
    assert "model.dequantize()" in message


def test_the_files_of_other_quantizers_count_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw() | {"quantization_config": None}))
    assert ModelConfig.from_hf(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'}: hf_quant_config.json: the")


def test_a_last_layer_that_slides_is_made_full_as_transformers_does():
    layer_types = [FULL, SLIDING, SLIDING]
    content = raw(layer_types=layer_types, num_hidden_layers=3, num_kv_shared_layers=0)
    theirs = Gemma4Config.from_dict(copy.deepcopy(content)).text_config.layer_types
    assert ModelConfig.from_hf(content).layer_types == theirs == [FULL, SLIDING, FULL]


@pytest.mark.parametrize("count", [1, 5, 6, 7, 12])
def test_a_pattern_that_is_left_out_is_transformers_own(count):
    content = raw(layer_types=None, num_hidden_layers=count, num_kv_shared_layers=0)
    theirs = Gemma4Config.from_dict(copy.deepcopy(content)).text_config.layer_types
    assert ModelConfig.from_hf(content).layer_types == theirs


# ---- As Tunix uses it.


def test_tunix_names_read_and_write_the_same_fields():
    config = tiny_config("e2b")
    pairs = {
        "num_kv_heads": "num_key_value_heads",
        "num_heads": "num_attention_heads",
        "embed_dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "num_embed": "vocab_size",
    }
    for alias, name in pairs.items():
        assert getattr(config, alias) == getattr(config, name)
        setattr(config, alias, 4)
        assert getattr(config, name) == 4


def test_num_layers_cuts_the_stack_and_its_sharing():
    config = tiny_config("e2b")  # 6 layers, the last 3 share.
    config.num_layers = 4
    assert config.num_layers == len(config.layers) == 4
    assert [spec.kv_from for spec in config.layers] == [0, 1, 2, 1]
    config.num_layers = 2
    assert [spec.shares_kv for spec in config.layers] == [False, False]
    with pytest.raises(ValueError, match="num_layers: expected 1 to 2 .* found 3"):
        config.num_layers = 3


class TunixRemat(enum.Enum):
    NONE = enum.auto()
    BLOCK = enum.auto()
    DECODER = enum.auto()


@pytest.mark.parametrize(
    "spelling", [RematConfig.DECODER, 3, "decoder", "DECODER", TunixRemat.DECODER]
)
def test_remat_is_understood_in_every_spelling(spelling):
    assert tiny_config("e2b", remat_config=spelling).remat is RematConfig.DECODER


def test_configs_are_compared_by_content_but_not_by_origin(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw() | {"extra": 1}))
    config = ModelConfig.from_hf(tmp_path)
    assert config == ModelConfig.from_hf(raw())
    assert hash(config) == hash(ModelConfig.from_hf(raw()))
    assert config != dataclasses.replace(config, sliding_window=7)


# ---- Refusing.

OTHERS = "'gemma4', 'gemma4_unified'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            {"layer_types": [SLIDING, FULL]},
            "layer_types: expected 6 entries (num_hidden_layers), found 2",
        ),
        (
            {"layer_types": [SLIDING, SLIDING, FULL, "chunked", SLIDING, FULL]},
            "layer_types[3]: found 'chunked'; supported: 'sliding_attention', 'full_attention'",
        ),
        (
            {"num_kv_shared_layers": 6},
            "num_kv_shared_layers: expected 0 to 5 (num_hidden_layers - 1), found 6",
        ),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads: 4 is not divisible by the 3 key/value heads of layer 0 (sliding)",
        ),
        (
            {"use_bidirectional_attention": "all"},
            "use_bidirectional_attention: found 'all'; supported: None, 'vision'",
        ),
        ({"attention_bias": True}, "text_config.attention_bias: found True; supported: False"),
        ({"attention_dropout": 0.1}, "text_config.attention_dropout: found 0.1; supported: 0.0"),
        (
            {"hidden_activation": "silu"},
            "text_config.hidden_activation: found 'silu'; supported: 'gelu_pytorch_tanh'",
        ),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
            "moe_intermediate_size: enable_moe_block needs it, found None",
        ),
        (
            {
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 8,
                "moe_intermediate_size": 8,
            },
            "top_k_experts: expected at most num_experts (4), found 8",
        ),
        (
            {
                "rope_parameters": {
                    SLIDING: {"rope_type": "yarn", "rope_theta": 1.0},
                    FULL: {"rope_type": "proportional", "rope_theta": 1.0},
                }
            },
            "rope_parameters['sliding_attention']: expected rope_type 'default' with a rope_theta, "
            "found {'rope_type': 'yarn', 'rope_theta': 1.0}",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_text_settings_that_contradict_or_are_unsupported_are_named(text, message):
    assert refusal(raw(**text)) == message


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (
            {"num_key_value_heads": 1},
            "vision_config.num_key_value_heads: expected num_attention_heads (2), found 1; "
            "grouped vision attention is not supported",
        ),
        ({"head_dim": 6}, "vision_config.head_dim: expected a multiple of 4, found 6"),
    ],
    ids=["grouped", "head_dim"],
)
def test_vision_settings_that_are_unsupported_are_named(vision, message):
    content = raw()
    content["vision_config"] |= vision
    assert refusal(content, text_only=False) == message


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4_text", None])
def test_other_model_types_are_refused(model_type):
    content = raw() | {"model_type": model_type}
    assert refusal(content) == f"model_type: found {model_type!r}; supported: {OTHERS}"


def test_images_of_the_12b_are_refused():
    assert refusal(raw("12b"), text_only=False) == (
        "text_only=False: model_type 'gemma4_unified' (Gemma 4 12B) is supported for text only so "
        "far; images are supported for model_type 'gemma4' (E2B, E4B, 26B-A4B, 31B)"
    )


def test_images_without_a_vision_config_are_refused():
    assert refusal(raw() | {"vision_config": None}, text_only=False) == (
        "text_only=False: this config has no vision_config; use text_only=True"
    )


def test_audio_is_refused():
    assert refusal(raw(), audio=True).startswith(
        "audio=True: the audio tower is not supported; supported: text and images."
    )


@pytest.mark.parametrize("value", [0, 4, "all", None])
def test_remat_that_does_not_exist_is_refused(value):
    assert refusal(raw(), remat_config=value) == (
        f"remat_config: expected one of none (1), block (2), decoder (3), found {value!r}"
    )


def test_attention_that_does_not_exist_or_contradicts_itself_is_refused():
    assert refusal(raw(), attention_implementation="sdpa") == (
        "attention_implementation: found 'sdpa'; supported: 'auto', 'xla', 'splash', 'triton'"
    )
    assert refusal(raw(), use_flash_attention=True, attention_implementation="xla").startswith(
        "use_flash_attention: found True with attention_implementation='xla'"
    )
    assert refusal(raw(), flash_attention_block_size=64) == (
        "flash_attention_block_size: expected at least 128, found 64"
    )


def test_tunixs_flash_attention_is_a_kernel():
    assert tiny_config("e2b").attention == "auto"
    assert not tiny_config("e2b").wants_kernel
    assert tiny_config("e2b", use_flash_attention=True).wants_kernel


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'}: no such file")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path).startswith(f"{tmp_path}: this is an adapter (adapter_config.json)")
    (tmp_path / "config.json").write_text("{")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'}: not valid JSON (")
