# SPDX-License-Identifier: Apache-2.0
"""Adapters against PEFT, both ways, and merged models against transformers."""

import functools
import re

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from tunix_gemma4.checkpoint import load_checkpoint, save_checkpoint
from tunix_gemma4.lora import LoraConfig, apply_lora, load_adapter, merge_lora, save_adapter
from tunix_gemma4.lora.adapters import adapted
from tunix_gemma4.lora.targets import linears, resolve

from . import oracle

pytestmark = pytest.mark.parity

CASES = [
    ("e2b", "language"),
    ("e2b", "vision"),
    ("e2b", "all"),
    ("31b", "all"),
    ("26b_a4b", "all"),
    ("12b", "language"),
]


@functools.cache
def pair(size):
    """The transformers model, ours with the same weights, and inputs with images if it has any."""
    images = size != "12b"
    config = oracle.our_config(size, images=images)
    hf = oracle.hf_model(config)
    inputs = oracle.image_inputs() if images else oracle.text_inputs()
    return hf, oracle.our_model(config, hf), inputs


def trained(lora, *, size=0.1):
    """Both matrices of every adapter random, small enough to keep the model well conditioned."""
    for index, module in enumerate(adapted(lora).values()):
        b = module.kernel_lora_b
        b[...] = size * jax.random.normal(jax.random.key(index), b.shape)
    return lora


def assert_moved(found, base):
    assert np.abs(found - base).max() > 1e-2 * np.abs(base).max()


@pytest.mark.parametrize("size, targets", CASES)
def test_peft_computes_what_we_do_with_a_saved_adapter(size, targets, tmp_path):
    hf, ours, inputs = pair(size)
    config = ours.config
    lora = trained(apply_lora(ours, LoraConfig(rank=4, alpha=6, targets=targets)))
    save_adapter(lora, tmp_path / "adapter")
    base = oracle.hf_logits(hf, config, inputs)
    loaded = peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    try:
        run = functools.partial(oracle.hf_logits, config=config, inputs=inputs)
        expected = run(loaded)
        noise = oracle.noise_floor(run, loaded, expected)
        layers = [m for m in loaded.modules() if isinstance(m, peft.tuners.lora.Linear)]
    finally:
        loaded.unload()
    assert len(layers) == len(adapted(lora))
    found = oracle.our_logits(lora, inputs)
    oracle.assert_agrees(f"{size} {targets}", found, expected, noise=noise)
    assert_moved(found, base)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("size, targets", [("e2b", "all"), ("31b", "language")])
def test_we_compute_what_peft_does_with_an_adapter_it_saved(size, targets, rslora, tmp_path):
    hf, ours, inputs = pair(size)
    config = ours.config
    names = [f"model.{name}" for name in resolve(ours, targets)]
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=names,
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    base = oracle.hf_logits(hf, config, inputs)
    torch.manual_seed(0)
    made = peft.get_peft_model(hf, settings).eval()
    try:
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(0.3)
        made.save_pretrained(tmp_path / "adapter")
        run = functools.partial(oracle.hf_logits, config=config, inputs=inputs)
        expected = run(made)
        noise = oracle.noise_floor(run, made, expected)
    finally:
        made.unload()
    lora = load_adapter(ours, tmp_path / "adapter")
    assert len(adapted(lora)) == len(names)
    found = oracle.our_logits(lora, inputs)
    oracle.assert_agrees(f"{size} {targets} from PEFT", found, expected, noise=noise)
    assert_moved(found, base)


def test_the_initial_update_is_drawn_as_peft_draws_it():
    """A uniform up to 1 / sqrt(in), B zero: learning rates carry over."""
    hf, ours, _ = pair("e2b")
    lora = apply_lora(ours, LoraConfig(rank=64, targets="language"))
    settings = peft.LoraConfig(
        r=64, target_modules=r".*language_model\.layers.*(self_attn|mlp)\..*_proj"
    )
    made = peft.get_peft_model(hf, settings)
    try:
        for name, module in adapted(lora).items():
            theirs = made.get_submodule(f"base_model.model.model.{name}")
            a = np.asarray(module.kernel_lora_a[...])
            bound = module.in_features**-0.5
            for matrix in (a, theirs.lora_A["default"].weight.detach().numpy()):
                assert 0.98 * bound < np.abs(matrix).max() <= bound, name
                assert abs(matrix.std() / bound - 3**-0.5) < 0.03, name
            assert not np.any(module.kernel_lora_b[...])
            assert not theirs.lora_B["default"].weight.any()
        assert len([m for m in made.modules() if isinstance(m, peft.tuners.lora.Linear)]) == len(
            adapted(lora)
        )
    finally:
        made.unload()


@pytest.mark.parametrize("size", ["e2b", "31b", "26b_a4b"])
def test_transformers_computes_what_a_merged_model_does(size, tmp_path):
    hf, _, inputs = pair(size)
    hf.save_pretrained(tmp_path / "base")
    ours = load_checkpoint(tmp_path / "base", text_only=False)
    lora = trained(apply_lora(ours, LoraConfig(rank=4, alpha=6, targets="all")))
    save_checkpoint(merge_lora(lora), tmp_path / "merged")
    merged = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", experts_implementation="eager"
    ).eval()
    run = functools.partial(oracle.hf_logits, config=ours.config, inputs=inputs)
    expected = run(merged)
    noise = oracle.noise_floor(run, merged, expected)
    found = oracle.our_logits(lora, inputs)
    oracle.assert_agrees(f"{size} merged", found, expected, noise=noise)
    assert_moved(found, run(hf))


def test_adapters_stand_on_the_same_modules_as_in_peft():
    hf, ours, _ = pair("e2b")
    theirs = {
        name.removeprefix("model.")
        for name, module in hf.named_modules()
        if isinstance(module, torch.nn.Linear) and not re.search("lm_head|router", name)
    }
    assert set(linears(ours)) == theirs
