# SPDX-License-Identifier: Apache-2.0
"""A model of scores against transformers' body of the directory that it is saved to."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma4ForConditionalGeneration

from tunix_gemma4.checkpoint import save_checkpoint
from tunix_gemma4.model.gemma4 import Gemma4ForTokenScores

from . import oracle

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("size", ["e2b", "26b_a4b"])
def test_scores_are_transformers_final_states_times_the_saved_head(size, tmp_path):
    config = oracle.our_config(size, images=True)
    scores = Gemma4ForTokenScores.from_policy(oracle.our_model(config, oracle.hf_model(config)))
    kernel = scores.score.kernel
    kernel[...] = jax.random.normal(jax.random.key(0), kernel.shape)
    save_checkpoint(scores, tmp_path / "critic")

    hf, info = Gemma4ForConditionalGeneration.from_pretrained(
        tmp_path / "critic", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) == {"score.weight"}
    hf.config._experts_implementation = "eager"
    head = load_file(tmp_path / "critic" / "model.safetensors")["score.weight"]
    inputs = oracle.image_inputs()

    def run(hf):
        with torch.no_grad():
            states = hf.model(**oracle.hf_arguments(config, inputs, hf.dtype)).last_hidden_state
        return (states @ head.T).numpy()[inputs.real]

    theirs = run(hf.eval())
    ours = np.asarray(oracle.our_forward(scores, inputs))[inputs.real]
    assert ours.shape[-1] == 1
    noise = oracle.noise_floor(run, hf, theirs)
    oracle.assert_agrees(f"{size} scores", ours, theirs, noise=noise)
