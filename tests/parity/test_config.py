# SPDX-License-Identifier: Apache-2.0
"""What the config settles against the modules that transformers builds from the same file."""

import itertools

import pytest
import torch
from transformers import Gemma4Config, Gemma4UnifiedConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedTextModel

from tunix_gemma4.config import ModelConfig
from tunix_gemma4.tiny import tiny_hf_config

pytestmark = pytest.mark.parity

SLIDING, FULL = "sliding_attention", "full_attention"


def assert_layers_are_those_of_transformers(config: ModelConfig):
    unified = config.model_type == "gemma4_unified"
    hf_config = (Gemma4UnifiedConfig if unified else Gemma4Config).from_dict(config.to_hf())
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
