# SPDX-License-Identifier: Apache-2.0
"""What the config settles against the modules that transformers builds from the same file."""

import dataclasses
import itertools
import json

import pytest
import torch
from transformers import Gemma4Config, Gemma4UnifiedConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedTextModel

from tunix_gemma4.config.model import _TEXT_FIELDS, ModelConfig, VisionConfig
from tunix_gemma4.testing.tiny import tiny_hf_config

pytestmark = pytest.mark.parity

SLIDING, FULL = "sliding_attention", "full_attention"


HF_CLASSES = {"gemma4": Gemma4Config, "gemma4_unified": Gemma4UnifiedConfig}


def assert_layers_are_those_of_transformers(config: ModelConfig, hf_config=None):
    unified = config.model_type == "gemma4_unified"
    hf_config = hf_config or HF_CLASSES[config.model_type].from_dict(config.to_hf())
    with torch.device("meta"):
        hf = (Gemma4UnifiedTextModel if unified else Gemma4TextModel)(hf_config.text_config)
    sources = {}
    for spec, layer in zip(config.layers, hf.layers, strict=True):
        attention = layer.self_attn
        assert spec.shares_kv is attention.is_kv_shared_layer
        if attention.store_full_length_kv:
            sources[attention.layer_type] = spec.index
    for spec, layer in zip(config.layers, hf.layers, strict=True):
        attention = layer.self_attn
        assert spec.kind == ("sliding" if attention.is_sliding else "full")
        assert spec.window == attention.sliding_window
        assert spec.head_dim == attention.head_dim
        assert spec.mlp_dim == layer.mlp.gate_proj.out_features
        assert spec.moe is bool(getattr(layer, "enable_moe_block", False))
        if spec.shares_kv:
            assert spec.kv_from == sources[attention.layer_type]
        else:
            assert spec.kv_from == spec.index
            assert spec.num_kv_heads * spec.head_dim == attention.k_proj.out_features
            assert spec.k_eq_v is (attention.v_proj is None)


@pytest.mark.parametrize("model_type, hf_class", HF_CLASSES.items())
def test_what_a_file_leaves_out_is_the_default_of_its_own_class(model_type, hf_class):
    ours = ModelConfig.from_hf({"model_type": model_type, "vision_config": {}})
    theirs = hf_class(vision_config={})
    written = theirs.to_dict() | theirs.text_config.to_dict()
    # The first two are compared layer by layer below; 12B's class does not have the others.
    of_layers = {"global_head_dim", "num_global_key_value_heads"}
    absent = {"hidden_size_per_layer_input", "enable_moe_block"}
    unused = {"vocab_size_per_layer_input", "num_experts", "top_k_experts", "moe_intermediate_size"}
    names = {*_TEXT_FIELDS, *(name for name in written if name.endswith("_token_id"))}
    names &= {field.name for field in dataclasses.fields(ModelConfig)}
    assert len(names) > 30
    assert names - written.keys() <= of_layers | absent | unused
    for name in names & written.keys():
        assert getattr(ours, name) == written[name], name
    if model_type == "gemma4":
        vision = theirs.vision_config.to_dict()
        for field in dataclasses.fields(VisionConfig):
            if field.name != "rope_parameters":
                assert getattr(ours.tower_config, field.name) == vision[field.name], field.name
        assert ours.tower_config.rope_theta == vision["rope_parameters"]["rope_theta"]
    assert not {name for name in absent - written.keys() if getattr(ours, name)}
    assert_layers_are_those_of_transformers(ours, theirs)


@pytest.mark.parametrize("size", ["e2b", "e4b", "12b", "26b_a4b", "31b"])
def test_what_transformers_writes_of_a_released_size_is_that_size(size):
    config = getattr(ModelConfig, f"gemma4_{size}")()
    written = json.loads(HF_CLASSES[config.model_type](**config.to_hf()).to_json_string(False))
    assert ModelConfig.from_hf(written).layers == config.layers
    assert ModelConfig.from_hf(written) == config


@pytest.mark.parametrize("size", ["e2b", "e4b", "12b", "26b_a4b", "31b"])
def test_layers_of_released_sizes_are_those_that_transformers_builds(size):
    assert_layers_are_those_of_transformers(getattr(ModelConfig, f"gemma4_{size}")())


@pytest.mark.parametrize("shared", range(5))
def test_layers_of_every_pattern_are_those_that_transformers_builds(shared):
    seen = 0
    for head in itertools.product((SLIDING, FULL), repeat=4):
        content = tiny_hf_config("e2b")
        layer_types = [*head, FULL]
        content["text_config"] |= {
            "layer_types": layer_types,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": shared,
        }
        if set(layer_types[5 - shared :]) <= set(layer_types[: 5 - shared]):
            assert_layers_are_those_of_transformers(ModelConfig.from_hf(content))
            seen += 1
    assert seen == {0: 16, 1: 15, 2: 13, 3: 9, 4: 1}[shared]
