# SPDX-License-Identifier: Apache-2.0
"""Sharding: where parameters go on a mesh, what a mesh may not cut, and who says which mesh."""

import functools

import jax
import numpy as np
import pytest
from absl import logging
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from small_models import assert_logits_agree, draw_image, draw_tokens, forward, random_model

from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.config import ModelConfig
from tunix_gemma4.lora import LoraConfig, apply_lora
from tunix_gemma4.model.gemma4 import abstract_model
from tunix_gemma4.sharding import param_shardings, shard_model
from tunix_gemma4.testing.tiny import tiny_config


def make_mesh(fsdp: int, tp: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp), ("fsdp", "tp"))


def specs(model, mesh) -> dict[str, PartitionSpec]:
    """The spec of every parameter, by dotted path."""
    placed = nnx.to_flat_state(param_shardings(nnx.state(model), mesh))
    return {".".join(map(str, path)): variable.get_raw_value().spec for path, variable in placed}


_ATTENTION = "language_model.layers.0.self_attn."


@pytest.mark.parametrize(("tp", "whole"), [(2, False), (4, True)])
def test_key_value_heads_are_split_between_heads_or_not_at_all(tp, whole):
    # 4 query heads and 2 key/value heads of 8 columns: 4 parts would cut the latter in half.
    found = specs(apply_lora(abstract_model(tiny_config("e4b")), LoraConfig()), make_mesh(2, tp))
    keys = PartitionSpec(("fsdp", "tp")) if whole else PartitionSpec("fsdp", "tp")
    for name in ("k_proj", "v_proj"):
        assert found[f"{_ATTENTION}{name}.kernel"] == keys
        adapter = PartitionSpec(None, ("fsdp", "tp") if whole else ("tp", "fsdp"))
        assert found[f"{_ATTENTION}{name}.kernel_lora_b"] == adapter
    assert found[f"{_ATTENTION}q_proj.kernel"] == PartitionSpec("fsdp", "tp")
    assert found[f"{_ATTENTION}o_proj.kernel"] == PartitionSpec("tp", "fsdp")
    assert found["language_model.layers.0.mlp.up_proj.kernel"] == PartitionSpec("fsdp", "tp")


def test_a_tower_whose_heads_do_not_divide_is_whole():
    # The tiny tower has 2 heads of 16 columns, the released E2B's 12 of 64.
    name = "vision_tower.encoder.layers.0.self_attn.q_proj.linear.kernel"
    model = abstract_model(tiny_config("e2b", text_only=False))
    assert specs(model, make_mesh(4, 2))[name] == PartitionSpec("fsdp", "tp")
    assert specs(model, make_mesh(2, 4))[name] == PartitionSpec(("fsdp", "tp"))


@functools.cache
def with_images() -> tuple:
    """Tokens and images of four rows, and their logits on one device."""
    model = random_model("e2b", text_only=False)
    tokens, _ = draw_tokens(model.config, *["tt(ii)ttttttttt"] * 4)
    images = np.stack([draw_image(model.config, 2, 1, seed=row)[None] for row in range(4)])
    return tokens, images, forward(model, tokens, images=images)[0]


@pytest.mark.parametrize(("fsdp", "tp"), [(4, 2), (2, 4)])
def test_replicated_key_value_heads_change_no_logit(fsdp, tp):
    tokens, images, expected = with_images()
    model, mesh = random_model("e2b", text_only=False), make_mesh(fsdp, tp)
    assert model.config.num_key_value_heads == 1
    with mesh:
        found, _ = forward(shard_model(model, mesh), tokens, images=images)
    assert_logits_agree(found, expected)


def test_a_dimension_that_the_mesh_does_not_divide_is_split_along_the_axis_that_does():
    model, mesh = random_model("26b_a4b"), make_mesh(3, 2)
    found = specs(model, mesh)
    assert model.config.num_experts % 3
    assert found["language_model.layers.0.experts.down_proj"] == PartitionSpec("tp")
    tokens, _ = draw_tokens(model.config, *["ttttttttttt"] * 3)
    expected, _ = forward(model, tokens)
    with mesh:
        logits, _ = forward(shard_model(model, mesh), tokens)
    assert_logits_agree(logits, expected)


def test_query_heads_that_would_be_cut_are_refused_before_anything_moves(tiny_dir):
    model, mesh = random_model("12b"), make_mesh(1, 8)
    before = model.language_model.norm.weight[...].sharding
    message = (
        r"mesh: 4 query heads \(num_attention_heads\) cannot be split over tp of size 8; "
        "sizes of tp that work: 1, 2, 4"
    )
    with pytest.raises(ValueError, match=message):
        shard_model(model, mesh)
    assert model.language_model.norm.weight[...].sharding == before
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tiny_dir, mesh)


def test_every_released_size_runs_with_tp_8():
    for name in ("e2b", "e4b", "12b", "26b_a4b", "31b"):
        config = getattr(ModelConfig, f"gemma4_{name}")()
        assert config.num_attention_heads % 8 == 0, name


def test_replicated_heads_are_said_once(monkeypatch, caplog):
    monkeypatch.setattr(logging, "_log_counter_per_token", {})
    monkeypatch.setattr(logging.get_absl_logger(), "propagate", True)
    model = abstract_model(tiny_config("26b_a4b"))
    for _ in range(2):
        param_shardings(nnx.state(model), make_mesh(2, 4))
    assert [record.getMessage() for record in caplog.records] == [
        "mesh: key/value heads (1, 2) and vision heads (2) cannot be split over tp of size 4; "
        "each part of tp has all of them."
    ]
