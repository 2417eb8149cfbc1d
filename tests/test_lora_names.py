# SPDX-License-Identifier: Apache-2.0
"""Tunix's `lora_config` sections."""

import jax.numpy as jnp
import pytest

from tunix_gemma4.lora import LoraConfig
from tunix_gemma4.plugin.lora import lora_config

SECTION = {"module_path": ".*q_einsum|.*kv_einsum", "rank": 64, "alpha": 64.0}


def test_a_section_is_read_as_ours():
    assert lora_config(SECTION) == LoraConfig(64, 64.0, SECTION["module_path"])


@pytest.mark.parametrize("qtype", ["int8", jnp.int8, jnp.dtype("int8")])
def test_a_quantised_section_keeps_its_type_and_tile(qtype):
    config = lora_config(SECTION | {"weight_qtype": qtype, "tile_size": 128})
    assert (config.quantize, config.tile_size) == ("int8", 128)
    assert lora_config(SECTION | {"weight_qtype": "nf4"}).quantize == "nf4"


@pytest.mark.parametrize(
    "section, message",
    [
        (SECTION | {"dropout": 0.1}, "unknown dropout; known are module_path, rank"),
        ({"rank": 4, "alpha": 4}, "module_path missing"),
        (
            SECTION | {"weight_qtype": "int4"},
            "expected None .* or one of nf4, int8, found 'int4'",
        ),
        (SECTION | {"weight_qtype": "q4"}, "weight_qtype 'q4' is no dtype"),
    ],
)
def test_what_has_no_counterpart_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        lora_config(section)
