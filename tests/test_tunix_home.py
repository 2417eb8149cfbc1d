# SPDX-License-Identifier: Apache-2.0
"""What is written for Tunix's own Gemma 4 works here with only the import changed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from small_models import assert_logits_agree, draw_tokens, forward, random_model
from tunix.models.gemma4 import model as upstream

import tunix_gemma4
from tunix_gemma4 import model as model_lib
from tunix_gemma4.config import ModelConfig
from tunix_gemma4.lora.targets import resolve
from tunix_gemma4.testing.tiny import tiny_config

# ---- Its forward tests (v0.1.7, and pull request 1608 but for SigLIP), with a small vocabulary.

SMALL = {
    "num_layers": 1,
    "num_embed": 512,
    "embed_dim": 64,
    "hidden_dim": 128,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 1,
}


def small(factory="gemma4_e2b", **fields):
    config = getattr(model_lib.ModelConfig, factory)()
    for name, value in (SMALL | fields).items():
        setattr(config, name, value)
    return config


def one_mask(length):
    """A causal mask for all rows: bool [1, T, T]."""
    return jnp.tril(jnp.ones((length, length), jnp.bool_))[None, ...]


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "expert_dim": 32}


@pytest.mark.parametrize(
    "factory, fields, how",
    [
        ("gemma4_e2b", {"frac_shared_layers": 0.0}, "plain"),
        ("gemma4_26b_a4b", EXPERTS, "plain"),
        ("gemma4_e2b", {"remat_config": model_lib.RematConfig.DECODER}, "differentiated"),
        ("gemma4_e2b", {"remat_config": upstream.RematConfig.BLOCK}, "differentiated"),
        ("gemma4_e2b", {"remat_config": upstream.RematConfig.BLOCK}, "in a while loop"),
    ],
)
def test_a_small_model_made_by_assignments_computes(factory, fields, how):
    config = small(factory, **fields)
    model = model_lib.Gemma4(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.PRNGKey(0), (2, 8), 0, config.num_embed)
    inputs = {
        "positions": jnp.tile(jnp.arange(8)[None, :], (2, 1)),
        "attention_mask": one_mask(8),
    }
    if how == "differentiated":
        loss = lambda model: jnp.sum(model(tokens, **inputs)[0])  # noqa: E731
        value, gradients = nnx.jit(nnx.value_and_grad(loss))(model)
        assert np.isfinite(value) and jax.tree.leaves(gradients)
        return
    if how == "plain":
        logits, cache = forward(model, tokens, **inputs)
        assert cache is None
    else:
        graphdef, state = nnx.split(model, nnx.Param)

        @jax.jit
        def decode(state):
            def body(carry):
                return carry[0] + 1, nnx.merge(graphdef, state)(tokens, **inputs)[0]

            start = jnp.array(0), jnp.zeros((2, 8, config.num_embed))
            return jax.lax.while_loop(lambda carry: carry[0] < 1, body, start)[1]

        logits = decode(state)
    assert logits.shape == (2, 8, config.num_embed)


def test_a_text_only_model_has_no_tower_under_any_name():
    config = small()
    assert config.vision_config is None and ModelConfig.gemma4_e2b(False).vision_config is not None
    model = model_lib.Gemma4(config, rngs=nnx.Rngs(0))
    assert model.vision_encoder is None
    assert not hasattr(model.embedder, "mm_input_projection")
    tokens = jnp.array([[1, 2, 3, 0, 0]])
    expected = np.tril(np.ones((5, 5), bool)) & (np.arange(5) < 3)
    assert (model.get_attention_mask(tokens) == expected[None]).all()
    images = jnp.zeros((1, 1, 32, 32, 3), jnp.float32)
    with pytest.raises(ValueError, match="images"):
        model(tokens, attention_mask=one_mask(5), images=images)


# ---- Masks.


@pytest.mark.parametrize("cached", [False, True])
def test_masks_of_any_broadcastable_shape_mean_the_full_one(cached):
    model = random_model("demo", text_only=True)
    tokens, real = draw_tokens(model.config, "ttttttttt", "ttttttt..")
    length = 12 if cached else 9
    keys = jnp.pad(real, ((0, 0), (0, length - 9)), constant_values=1)

    def logits(mask):
        cache = model.init_cache(2, length, jnp.float32) if cached else None
        return forward(model, tokens, cache=cache, attention_mask=mask)[0]

    causal = jnp.arange(9)[:, None] >= jnp.arange(length)
    expected = logits(causal[None] & keys.astype(bool)[:, None])
    assert_logits_agree(logits(keys[:, None]), expected)
    whole = logits(causal[None] & jnp.ones((2, 1, 1), bool))
    for mask in (causal[None], causal[None].astype(jnp.int32), jnp.ones((1, 1, 1), bool)):
        assert_logits_agree(logits(mask), whole)
    assert not np.allclose(whole[1, -1], expected[1, -1], atol=1e-3)


@pytest.mark.parametrize(
    "mask, message",
    [
        (jnp.ones((2, 9), bool), r"expected shape \(2, 9, 9\), any axis of which may be 1"),
        (jnp.ones((2, 1, 9, 9), bool), r"found \(2, 1, 9, 9\)"),
        (jnp.ones((3, 9, 9), bool), r"found \(3, 9, 9\)"),
        (jnp.zeros((2, 9, 9)), "expected bool or int.* found float32"),
    ],
)
def test_other_masks_are_refused(mask, message):
    model = random_model("demo", text_only=True)
    with pytest.raises(ValueError, match=message):
        model(jnp.ones((2, 9), jnp.int32), attention_mask=mask)


# ---- Its names of a configuration's fields.

LOCAL, GLOBAL = upstream.AttentionType.LOCAL_SLIDING, upstream.AttentionType.GLOBAL
OURS = model_lib.AttentionType
# A value for each field of Tunix's, and what of ours it becomes.
FIELDS = {
    "num_layers": (4, {"num_hidden_layers": 4, "num_kv_shared_layers": 1}),
    "num_embed": (99, {"vocab_size": 99, "vocab_size_per_layer_input": 99}),
    "embed_dim": (8, {"hidden_size": 8}),
    "hidden_dim": (8, {"intermediate_size": 8}),
    "num_heads": (8, {"num_attention_heads": 8}),
    "head_dim": (8, {"head_dim": 8}),
    "num_kv_heads": (2, {"num_key_value_heads": 2}),
    "final_logit_softcap": (5.0, {"final_logit_softcapping": 5.0}),
    "sliding_window_size": (7, {"sliding_window": 7}),
    "per_layer_input_dim": (0, {"hidden_size_per_layer_input": 0}),
    "num_global_kv_heads": (None, {"num_global_key_value_heads": None}),
    "global_key_size": (64, {"global_head_dim": 64}),
    "attention_pattern": (
        (LOCAL, GLOBAL),
        {"layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "frac_shared_layers": (1 / 3, {"num_kv_shared_layers": 2}),
    "global_rope_proportion": (0.5, {}),
    "local_rope_proportion": (1.0, {}),
    "k_eq_v_global": (True, {"attention_k_eq_v": True}),
    "override_kv_shared_ffw_hidden": (None, {"use_double_wide_mlp": False}),
    "local_base_frequency": (500, {}),
    "global_base_frequency": (700, {}),
    "local_scale_factor": (1.0, {}),
    "global_scale_factor": (8.0, {}),
    "shd_config": (upstream.ShardingConfig.get_default_sharding(), {}),
    "remat_config": (upstream.RematConfig.BLOCK, {}),
    "param_dtype": (jnp.bfloat16, {"param_dtype": jnp.dtype("bfloat16")}),
    "dtype": (jnp.bfloat16, {"dtype": jnp.dtype("bfloat16")}),
    "use_flash_attention": (True, {}),
    "flash_attention_block_size": (256, {}),
    "use_sliding_window_kv_cache": (False, {}),
    "enable_moe": (True, {"enable_moe_block": True}),
    "num_experts": (4, {"num_experts": 4}),
    "num_experts_per_tok": (2, {"top_k_experts": 2}),
    "expert_dim": (8, {"moe_intermediate_size": 8}),
    "moe_dense_hidden_dim": (8, {"intermediate_size": 8}),
}


def test_the_list_of_names_is_that_of_the_host():
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(upstream.ModelConfig)}


@pytest.mark.parametrize("name", FIELDS)
def test_a_name_of_tunix_reads_and_writes_ours(name):
    value, ours = FIELDS[name]
    config = tiny_config("e2b")
    setattr(config, name, value)
    if name == "attention_pattern":
        assert config.attention_pattern == (OURS.LOCAL_SLIDING, OURS.GLOBAL) * 3
    else:
        assert getattr(config, name) == value
    assert {field: getattr(config, field) for field in ours} == ours
    if name != "enable_moe":  # It needs others beside it.
        assert dataclasses.replace(tiny_config("e2b"), **{name: value}) == config
    # Each can be written back as it was read.
    config = tiny_config("e2b")
    for _ in range(2):
        setattr(config, name, getattr(config, name))
    assert config == tiny_config("e2b")


def test_rotary_names_reach_the_layers():
    config = tiny_config("e2b")
    config.global_rope_proportion, config.global_scale_factor = 0.5, 8.0
    config.local_base_frequency, config.global_base_frequency = 500, 700
    layers = {spec.kind: spec for spec in config.layers}
    assert (layers["full"].rope_fraction, layers["full"].rope_factor) == (0.5, 8.0)
    assert (layers["sliding"].rope_theta, layers["full"].rope_theta) == (500, 700)
    # What a config.json says of sliding layers beyond that, transformers does not read.
    config.rope_parameters["sliding_attention"] |= {"factor": 8.0, "partial_rotary_factor": 0.5}
    sliding = next(spec for spec in config.layers if spec.kind == "sliding")
    assert (sliding.rope_fraction, sliding.rope_factor) == (1.0, 1.0)


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("shd_config", "fsdp", ValueError, "follows from the axes of the mesh"),
        ("local_rope_proportion", 0.5, ValueError, "rope_parameters.*'partial_rotary_factor'"),
        ("local_scale_factor", 8.0, ValueError, "rope_parameters.*'factor'"),
        ("global_scale_factor", 0.5, ValueError, "expected at least 1, found 0.5"),
        ("override_kv_shared_ffw_hidden", 5, ValueError, "use_double_wide_mlp.*found 5"),
        ("num_global_kv_heads", 3, ValueError, r"k_eq_v_global \(attention_k_eq_v\)"),
        ("frac_shared_layers", 1.0, ValueError, "expected from 0 to below 1"),
        ("attention_pattern", ("full_attention",), ValueError, "strings are for layer_types"),
        ("sliding_windows", 5, AttributeError, "no field 'sliding_windows'.*mean sliding_window"),
        ("vision_encoder", None, AttributeError, "the vision tower is vision_config"),
        ("_private", 1, AttributeError, "assigning it would change nothing"),
        ("layers", (), AttributeError, "no field 'layers'"),
    ],
)
def test_what_has_no_counterpart_is_refused_on_assignment(name, value, error, message):
    with pytest.raises(error, match=message):
        setattr(tiny_config("e2b"), name, value)


def test_a_tower_has_no_other_fields_either():
    with pytest.raises(AttributeError):
        tiny_config("e2b", text_only=False).vision_config.depth = 3


def test_a_contradiction_by_assignment_is_found_when_the_model_is_built():
    config = tiny_config("e2b")
    config.num_heads, config.num_kv_heads = 3, 2
    with pytest.raises(ValueError, match="num_attention_heads: 3 is not divisible"):
        model_lib.Gemma4(config, rngs=nnx.Rngs(0))
    config = tiny_config("e2b")
    config.sliding_window_size = None
    with pytest.raises(ValueError, match="sliding_window: expected a whole number .* found None"):
        model_lib.Gemma4(config, rngs=nnx.Rngs(0))


# Of other types, and a width that Tunix never reads.
DIFFERENT = {"attention_pattern", "shd_config", "remat_config", "moe_dense_hidden_dim"}


def test_a_configuration_in_tunix_names_has_its_defaults():
    named = {**SMALL, "num_layers": 7, "sliding_window_size": 4}
    found, theirs = ModelConfig(**named), upstream.ModelConfig(**named)
    for name in FIELDS.keys() - DIFFERENT:
        assert getattr(found, name) == getattr(theirs, name), name
    kinds = [kind.name for kind in found.attention_pattern]
    assert kinds == ["LOCAL_SLIDING"] * 5 + ["GLOBAL", "LOCAL_SLIDING"]
    with pytest.raises(TypeError, match="depth"):
        ModelConfig(depth=3)


def test_the_tower_of_a_text_only_config_is_kept():
    config = ModelConfig.gemma4_e2b()
    assert config.vision_config is None
    both = dataclasses.replace(config, text_only=False)
    assert both == ModelConfig.gemma4_e2b(False)
    assert both.vision_config == config.tower_config
    assert config.to_hf() == both.to_hf() and config.to_hf()["vision_config"]
    assert dataclasses.replace(config, vision_config=None).tower_config is None


# ---- Its factories.


def test_factories_take_a_sharding_config_as_the_hosts_do():
    default = upstream.ShardingConfig.get_default_sharding()
    plain = ModelConfig.gemma4_e2b()
    for config in (
        ModelConfig.gemma4_e2b(sharding_config=default),
        ModelConfig.gemma4_e2b(default),
        ModelConfig.gemma4_e2b_it(upstream.ShardingConfig.get_default_sharding(True)),
    ):
        assert config == plain and config.text_only and config.shd_config is not None
    assert not ModelConfig.gemma4_e2b(False, sharding_config=default).text_only


@pytest.mark.parametrize(
    "arguments, keywords",
    [
        (("false",), {}),
        ((0,), {}),
        ((None,), {}),
        ((), {"sharding_config": True}),
        ((), {"sharding_config": "fsdp"}),
    ],
)
def test_factories_refuse_what_is_neither(arguments, keywords):
    with pytest.raises(ValueError, match="ShardingConfig"):
        ModelConfig.gemma4_e2b(*arguments, **keywords)


def test_a_sharding_that_would_not_be_followed_is_refused():
    other = dataclasses.replace(upstream.ShardingConfig.get_default_sharding(), emb_vd=(None, "tp"))
    with pytest.raises(ValueError, match="follows from the axes of the mesh"):
        ModelConfig.gemma4_e2b(sharding_config=other)


# ---- Its notebooks' adapters.

PATTERN = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum"


def adapters(pattern, *, model=None, provider=None):
    """Names of the projections that Qwix adapted."""
    model = model or random_model("demo", text_only=True)
    provider = provider or qwix.LoraProvider(module_path=pattern, rank=2, alpha=4.0)
    lora = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))
    return {
        ".".join(map(str, path[:-1]))
        for path, _ in nnx.to_flat_state(nnx.state(lora, nnx.LoRAParam))
    }


@pytest.fixture
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


def test_qwix_reaches_our_projections_by_tunix_names(registered):
    model = random_model("demo", text_only=False)
    assert adapters(PATTERN, model=model) == set(resolve(model, "language"))
    rules = [
        qwix.LoraRule(module_path=".*attn_vec_einsum", rank=2, alpha=4.0, weight_qtype="nf4"),
        qwix.LoraRule(module_path=".*up_proj", rank=4, alpha=4.0),
    ]
    found = adapters(None, model=model, provider=qwix.LoraProvider(rules))
    assert found == set(resolve(model, r"language_model.*(o|up)_proj"))
    tunix_gemma4.unregister()
    assert adapters(PATTERN, model=model) == set(resolve(model, "language_model.*mlp.*"))


@pytest.mark.parametrize(
    "pattern, message",
    [
        (".*qkv_einsum", r"targets='\.\*qkv_einsum' matches no projection"),
        (".*q_einsum|.*router_einsum", r"'\.\*router_einsum' matches no projection"),
        (".*q_porj", r"module_path='\.\*q_porj' matches no projection"),
        (".*q_proj|.*v_porj", r"'\.\*v_porj' matches no projection"),
    ],
)
def test_qwix_is_given_no_pattern_that_reaches_nothing(registered, pattern, message):
    with pytest.raises(ValueError, match=message) as error:
        adapters(pattern)
    assert "language_model.layers.*.self_attn.q_proj (2)" in str(error.value)


class OtherModel(nnx.Module):
    def __init__(self):
        self.q_einsum = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.q_einsum(x)

    def get_model_input(self):
        return {"x": jnp.ones((1, 4))}


def test_qwix_treats_all_else_as_ever(registered):
    assert adapters(".*q_einsum", model=OtherModel()) == {"q_einsum"}
    assert adapters(".*none", model=OtherModel()) == set()
    model = random_model("demo", text_only=True)
    assert adapters(".*q_proj", model=model) == set(resolve(model, "q_proj"))
    other = qwix.PtqProvider([qwix.QuantizationRule(module_path=".*none", weight_qtype="int8")])
    assert adapters(None, model=model, provider=other) == set()
