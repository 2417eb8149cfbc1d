# SPDX-License-Identifier: Apache-2.0
"""Which models are given `segment_ids`, and that others keep what they compute with Tunix alone."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.rl import common

import tunix_gemma4
from tunix_gemma4.lora import LoraConfig, apply_lora
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration, Gemma4ForTokenScores
from tunix_gemma4.testing.tiny import tiny_config

WORDS = 64
PAD, EOS = 0, 1
SIZES = {"num_layers": 1, "embed_dim": 16, "hidden_dim": 16, "num_heads": 2, "head_dim": 8}

PROMPTS = jnp.array([[0, 0, 5, 6], [7, 8, 9, 10]])
COMPLETIONS = jnp.array([[11, 12, 1], [13, 1, 0]])
PACKING = {
    "segment_ids": jnp.array([[1, 1, 2], [1, 2, 2]]),
    "segment_positions": jnp.array([[0, 1, 0], [0, 0, 1]]),
}


@pytest.fixture(autouse=True)
def _registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


class Toy(nnx.Module):
    """Words to logits, without a look at other words."""

    def __init__(self, outputs=WORDS):
        self.table = nnx.Param(jnp.sin(jnp.arange(WORDS * outputs).reshape(WORDS, outputs)))


class ToyOfTokens(Toy):
    def __call__(self, tokens, positions, cache):
        return self.table[...][tokens], cache


class ToyWithMask(Toy):
    def __call__(self, tokens, positions, cache, attention_mask):
        return self.table[...][tokens] + attention_mask.sum(-1, keepdims=True), cache


class ToyWithSegments(Toy):
    def __call__(self, tokens, positions, cache, attention_mask=None, segment_ids=None):
        return self.table[...][tokens] + segment_ids[..., None], cache


class ToyWithKeywords(Toy):
    """Takes what it is given, and wraps nothing."""

    def __call__(self, tokens, **inputs):
        return self.table[...][tokens] + inputs["segment_ids"][..., None], None


class Wrapper(nnx.Module):
    """Passes keyword arguments on to a model that it keeps under a `name`."""

    def __init__(self, model, name="model", outputs=None):
        self.head = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.name, self.outputs = name, outputs
        setattr(self, name, model)

    def __call__(self, tokens, **kwargs):
        logits, cache = getattr(self, self.name)(tokens, **kwargs)
        return logits[..., : self.outputs], cache


class Plain:
    """No module at all."""

    def __init__(self, transformer):
        self.transformer = transformer

    def __call__(self, *args, **kwargs):
        return self.transformer(*args, **kwargs)


@functools.cache
def family(name):
    """A tiny model of another family, for text."""
    rngs = nnx.Rngs(0)
    if name == "gemma3":
        return gemma3.Gemma3(
            gemma3.ModelConfig(
                num_embed=WORDS, num_kv_heads=1, sliding_window_size=4, param_dtype=jnp.float32,
                **SIZES,
            ),
            rngs=rngs,
        )  # fmt: skip
    if name == "llama3":
        return llama3.Llama3(
            llama3.ModelConfig(
                vocab_size=WORDS, num_kv_heads=1, rope_theta=10_000, norm_eps=1e-6, **SIZES
            ),
            rngs=rngs,
        )
    return {"tokens alone": ToyOfTokens, "mask": ToyWithMask, "segments": ToyWithSegments}[name]()


@functools.cache
def gemma4(adapter=None, kind=Gemma4ForConditionalGeneration):
    model = kind(tiny_config("demo", text_only=True), rngs=nnx.Rngs(0))
    if adapter == "ours":
        return apply_lora(model, LoraConfig(rank=2, targets="all"))
    if adapter == "qwix":
        provider = qwix.LoraProvider(module_path=".*q_proj", rank=2, alpha=2.0)
        inputs = model.get_model_input()
        return qwix.apply_lora_to_model(model, provider, **inputs, rngs=nnx.Rngs(0))
    return model


def logps(model, **inputs):
    return common.compute_per_token_logps(
        *nnx.split(model), PROMPTS, COMPLETIONS, pad_id=PAD, eos_id=EOS, **inputs
    )


def score(model, **inputs):
    return common.compute_score(model, PROMPTS, COMPLETIONS, PAD, EOS, **inputs)


def dpo_logps(model):
    tokens, positions, mask, _ = common.process_ids(PROMPTS, COMPLETIONS, PAD, EOS)
    return common.get_per_token_logps(model, tokens, positions, mask, logits_to_keep=3)


def packed(function, model):
    """`function` of rows that hold prompts and completions already, as the host packs them."""
    if function is logps:
        return common.compute_per_token_logps(
            *nnx.split(model), PROMPTS[:, :0], COMPLETIONS, pad_id=PAD, eos_id=EOS, **PACKING
        )
    return common.compute_score(model, PROMPTS[:, :0], COMPLETIONS, PAD, EOS, **PACKING)


ACCEPTING = {
    "ours": gemma4,
    "ours under our LoRA": lambda: gemma4("ours"),
    "ours under Qwix's LoRA": lambda: gemma4("qwix"),
    "our scores": lambda: gemma4(kind=Gemma4ForTokenScores),
    "declared": ToyWithSegments,
    "keywords that nothing inside contradicts": ToyWithKeywords,
    "a wrapper": lambda: Wrapper(ToyWithSegments()),
    "a wrapper of another name": lambda: Wrapper(ToyWithSegments(), "policy"),
    "a wrapper of a wrapper": lambda: Wrapper(Wrapper(ToyWithSegments(), "policy")),
    "a wrapper of our LoRA": lambda: Wrapper(gemma4("ours"), "base_model"),
    "a wrapper of Qwix's LoRA": lambda: Wrapper(gemma4("qwix"), "base_model"),
    "a wrapper that is no module": lambda: Plain(ToyWithSegments()),
    "a function": lambda: lambda tokens, segment_ids=None: tokens,
}
REFUSING = {
    "gemma3": lambda: family("gemma3"),
    "llama3": lambda: family("llama3"),
    "tokens alone": ToyOfTokens,
    "mask": ToyWithMask,
    "a wrapper": lambda: Wrapper(ToyWithMask()),
    "a wrapper of tokens alone": lambda: Wrapper(ToyOfTokens()),
    "a wrapper of another name": lambda: Wrapper(ToyWithMask(), "policy"),
    "a wrapper of a wrapper": lambda: Wrapper(Wrapper(ToyWithMask()), "policy"),
    "a wrapper of gemma3": lambda: Wrapper(family("gemma3"), "transformer"),
    "a wrapper of llama3": lambda: Wrapper(family("llama3"), "net"),
    "a wrapper that is no module": lambda: Plain(ToyWithMask()),
    "a function": lambda: lambda tokens: tokens,
    "nothing that can be called": lambda: Toy(),
}


@pytest.mark.parametrize("name", ACCEPTING)
def test_models_that_take_segment_ids_are_recognised(name):
    assert common._model_accepts_segment_ids(ACCEPTING[name]()) is True


@pytest.mark.parametrize("name", REFUSING)
def test_models_that_take_no_segment_ids_are_recognised(name):
    assert common._model_accepts_segment_ids(REFUSING[name]()) is False


@pytest.mark.parametrize("adapter", [None, "ours", "qwix"])
def test_ours_takes_part_under_any_adapter(adapter):
    found, entropy = nnx.eval_shape(lambda model: logps(model, return_logits=True), gemma4(adapter))
    assert found.shape == entropy.shape == COMPLETIONS.shape
    assert nnx.eval_shape(dpo_logps, gemma4(adapter)).shape == COMPLETIONS.shape
    found = nnx.eval_shape(lambda model: packed(logps, model), gemma4(adapter))
    assert found.shape == COMPLETIONS.shape


@pytest.mark.parametrize("wrapped", [False, True])
def test_our_scores_take_part(wrapped):
    model = gemma4(kind=Gemma4ForTokenScores)
    model = Wrapper(model) if wrapped else model
    assert nnx.eval_shape(score, model).shape == (2, 7)
    assert nnx.eval_shape(lambda model: packed(score, model), model).shape == COMPLETIONS.shape


def with_tunix_alone(compute, model):
    tunix_gemma4.unregister()
    try:
        return compute(model)
    finally:
        tunix_gemma4.register()


@pytest.mark.parametrize("name", ["gemma3", "llama3", "mask", "segments"])
def test_other_families_keep_their_log_probabilities_bit_for_bit(name):
    model = family(name)
    for compute in (logps,) if name == "segments" else (logps, dpo_logps):
        expected = with_tunix_alone(compute, model)
        assert jnp.isfinite(expected).all() and jnp.unique(expected).size > 2
        np.testing.assert_array_equal(compute(model), expected)


def test_a_score_model_that_takes_segment_ids_keeps_its_scores_bit_for_bit():
    model = ToyWithSegments(outputs=1)
    expected = with_tunix_alone(score, model)
    np.testing.assert_array_equal(score(model), expected)
    segments = packed(score, model)
    expected = with_tunix_alone(lambda model: packed(score, model), model)
    np.testing.assert_array_equal(segments, expected)


@pytest.mark.parametrize("name", ["gemma3", "llama3", "mask", "tokens alone"])
def test_models_without_segment_ids_can_score(name):
    model = family(name)
    scores = score(Wrapper(model, "policy", outputs=1))
    tokens, positions, mask, _ = common.process_ids(PROMPTS, COMPLETIONS, PAD, EOS)
    inputs = {} if name == "tokens alone" else {"attention_mask": mask}
    plain = nnx.jit(lambda model: model(tokens, positions=positions, cache=None, **inputs)[0])
    np.testing.assert_array_equal(scores, plain(model)[..., 0])


def test_a_wrapper_around_a_model_without_segment_ids_gives_that_models_log_probabilities():
    model = family("mask")
    with pytest.raises(TypeError, match="segment_ids"):
        with_tunix_alone(logps, Wrapper(model))
    np.testing.assert_array_equal(logps(Wrapper(model)), logps(model))
    assert jnp.isfinite(logps(Wrapper(family("tokens alone")))).all()


def test_a_wrapper_around_a_model_with_segment_ids_passes_the_padding_on():
    model = family("segments")
    np.testing.assert_array_equal(logps(Wrapper(model)), logps(model))
    one = ToyWithSegments(outputs=1)
    np.testing.assert_array_equal(score(Wrapper(one, "policy")), score(one))
    assert not np.array_equal(score(one)[:, :2], score(ToyOfTokens(outputs=1))[:, :2])


# Those that the host could call at all.
MODULES = [name for name in REFUSING if not name.endswith(("no module", "function", "be called"))]


@pytest.mark.parametrize("function", [logps, score])
@pytest.mark.parametrize("name", MODULES)
def test_packing_is_refused_where_sequences_would_see_each_other(name, function):
    with pytest.raises(ValueError, match=r"segment_ids: \w+ takes none.*leave packing off"):
        packed(function, REFUSING[name]())


@pytest.mark.parametrize("wrapped", [False, True])
def test_packing_ids_reach_models_that_take_them(wrapped):
    one, many = ToyWithSegments(outputs=1), ToyWithSegments()
    found = packed(score, Wrapper(one) if wrapped else one)
    padding = ToyOfTokens(outputs=1).table[...][COMPLETIONS][..., 0]
    np.testing.assert_allclose(found - padding, PACKING["segment_ids"], atol=1e-6)
    assert packed(logps, Wrapper(many) if wrapped else many).shape == COMPLETIONS.shape


def test_the_gate_is_published_only_while_registered():
    assert common._model_accepts_segment_ids(ToyWithSegments())
    tunix_gemma4.unregister()
    assert "_model_accepts_segment_ids" not in vars(common)
