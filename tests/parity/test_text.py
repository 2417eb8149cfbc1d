# SPDX-License-Identifier: Apache-2.0
"""Text logits of the five shapes against transformers, float32."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from . import oracle

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("size", oracle.TEXT_SIZES)
def test_text_logits_equal_transformers(size):
    config = oracle.our_config(size)
    inputs = oracle.text_inputs()
    hf = oracle.hf_model(config)

    def run(model):
        return oracle.hf_logits(model, config, inputs)

    theirs = run(hf)
    ours = oracle.our_logits(oracle.our_model(config, hf), inputs)

    noise = oracle.noise_floor(run, hf, theirs)
    oracle.assert_agrees(f"{size} text", ours, theirs, noise=noise)


@pytest.mark.parametrize("size", ["e2b", "26b_a4b"])
def test_text_logits_equal_transformers_own_masks_and_positions_when_nothing_is_padded(size):
    # Neither side is told positions or a mask, so both defaults are compared.
    config = oracle.our_config(size)
    inputs = oracle.text_inputs()
    inputs.tokens[inputs.tokens == oracle.PAD] = oracle.FIRST_WORD
    hf = oracle.hf_model(config, seed=3)
    with torch.no_grad():
        theirs = hf(input_ids=torch.from_numpy(inputs.tokens).long(), use_cache=False).logits
    ours, _ = oracle.our_model(config, hf)(jnp.asarray(inputs.tokens))

    oracle.assert_agrees(f"{size} defaults", np.asarray(ours), theirs.numpy(), noise=0.0)


def test_hidden_states_are_had_as_the_docstring_says():
    """The lines of `output_hidden_states` give transformers' `hidden_states`."""
    config = oracle.our_config("e2b")
    inputs = oracle.text_inputs()
    inputs.tokens[inputs.tokens == oracle.PAD] = oracle.FIRST_WORD
    hf = oracle.hf_model(config, seed=3)
    with torch.no_grad():
        theirs = hf.model(
            input_ids=torch.from_numpy(inputs.tokens).long(),
            use_cache=False,
            output_hidden_states=True,
        )
    model, tokens = oracle.our_model(config, hf), jnp.asarray(inputs.tokens)
    last, _ = model(tokens, skip_lm_head=True, output_hidden_states=True)
    states = nnx.pop(model, nnx.Intermediate)["all_hidden_states"].get_value()
    found = (model.language_model.embed(tokens), *states)
    expected = [state.numpy() for state in theirs.hidden_states]
    assert len(found) == len(expected) == config.num_hidden_layers + 1
    for index, (ours, other) in enumerate(zip(found, expected, strict=True)):
        oracle.assert_agrees(f"hidden state {index}", np.asarray(ours), other, noise=0.0)
    oracle.assert_agrees("last", np.asarray(last), theirs.last_hidden_state.numpy(), noise=0.0)
    # Logits are what is returned without skip_lm_head, as in Tunix.
    logits, _ = model(tokens, output_hidden_states=True)
    assert logits.shape[-1] == config.vocab_size


def test_a_window_off_by_one_would_be_noticed():
    config = oracle.our_config("e2b")
    inputs = oracle.text_inputs()
    hf = oracle.hf_model(config)
    theirs = oracle.hf_logits(hf, config, inputs)
    wider = oracle.our_config("e2b", sliding_window=oracle.WINDOW + 1)

    with pytest.raises(AssertionError, match="wider window"):
        ours = oracle.our_logits(oracle.our_model(wider, hf), inputs)
        oracle.assert_agrees("wider window", ours, theirs, noise=1e-4)


@pytest.mark.parametrize("size", oracle.TEXT_SIZES)
def test_the_soft_cap_bites(size):
    # Guards the oracle: uncapped logits must reach well into the bend of the cap.
    config = oracle.our_config(size)
    theirs = oracle.hf_logits(oracle.hf_model(config), config, oracle.text_inputs())
    assert np.abs(theirs).max() > 0.5 * config.final_logit_softcapping
