# SPDX-License-Identifier: Apache-2.0
"""Gradients of every tensor against transformers' autograd, with images, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tunix_gemma4.checkpoint import names as weights

from . import oracle

pytestmark = pytest.mark.parity


def targets(inputs):
    """Random next tokens, and which positions are supervised: a third of the real ones."""
    random = np.random.default_rng(17)
    words = random.integers(oracle.FIRST_WORD, oracle.VOCABULARY, inputs.tokens.shape)
    return words, inputs.real & (random.random(inputs.tokens.shape) < 0.33)


def hf_gradients(model, config, inputs):
    """Name to gradient, of the mean negative log-likelihood of the supervised targets."""
    words, supervised = targets(inputs)
    model.zero_grad()
    logits = model(**oracle.hf_arguments(config, inputs)).logits
    chosen = torch.from_numpy(supervised)
    loss = torch.nn.functional.cross_entropy(logits[chosen], torch.from_numpy(words)[chosen])
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def our_gradients(model, inputs):
    """Path to gradient, of the same loss."""
    words, supervised = targets(inputs)
    tokens, images = jnp.asarray(inputs.tokens), jnp.asarray(inputs.images)
    mask = model.get_attention_mask(tokens, inputs_mask=jnp.asarray(inputs.mask))

    def loss(model):
        logits, _ = model(tokens, jnp.asarray(inputs.positions), None, mask, images=images)
        logps = jax.nn.log_softmax(logits)
        logps = jnp.take_along_axis(logps, jnp.asarray(words)[..., None], axis=-1)[..., 0]
        return -jnp.sum(logps * supervised) / supervised.sum()

    gradients = nnx.jit(nnx.grad(loss))(model)
    return {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(gradients)}


@pytest.mark.parametrize("size", ["e2b", "26b_a4b"])
def test_every_gradient_equals_transformers(size):
    config = oracle.our_config(size, images=True)
    inputs = oracle.image_inputs()
    hf = oracle.hf_model(config)
    theirs = hf_gradients(hf, config, inputs)
    ours = our_gradients(oracle.our_model(config, hf), inputs)
    noise = dict.fromkeys(theirs, 0.0)
    for seed in (1, 2):
        with oracle.perturbed(hf, seed=seed):
            for name, moved in hf_gradients(hf, config, inputs).items():
                noise[name] = max(noise[name], float((moved - theirs[name]).abs().max()))

    names = {weights.hf_name(path) for path in ours}
    assert names == set(theirs)
    for path, gradient in ours.items():
        name = weights.hf_name(path)
        expected = weights.from_hf(path, theirs[name].numpy())
        assert np.abs(expected).max() > 0, f"{name}: the oracle's gradient is zero"
        oracle.assert_agrees(f"{size} {name}", gradient, expected, noise=noise[name])
