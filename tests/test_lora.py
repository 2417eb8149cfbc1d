# SPDX-License-Identifier: Apache-2.0
"""Adapters: where they go, what they compute, what they cost."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from small_models import draw_images, draw_tokens, forward, random_model

from tunix_gemma4.lora import LoraConfig, apply_lora, describe
from tunix_gemma4.lora.adapters import LoraLinear, adapted, count_parameters
from tunix_gemma4.lora.targets import as_regex, linears, resolve
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration, stack_layers
from tunix_gemma4.planning.measure import count_flops
from tunix_gemma4.sharding import shard_model
from tunix_gemma4.testing.tiny import tiny_config

QUANTIZE = [None, "nf4", "int8"]


@functools.cache
def base(preset="e2b", **fields):
    return random_model(preset, text_only=False, **fields)


def plain(**fields):
    """Two layers and a tower of two with fresh weights: well conditioned, and quick to compile."""
    config = dataclasses.replace(tiny_config("demo"), text_only=False, **fields)
    return Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0))


def inputs(model, rows=2):
    tokens, _ = draw_tokens(model.config, *["t(ii)tt(iiii)ttttt"] * rows)
    return {"tokens": tokens, "images": draw_images(model.config, *[[(2, 1), (2, 2)]] * rows)}


def perturb(model, *, seed=0, size=0.03):
    """Gives every B values, so that the adapters do something."""
    for index, module in enumerate(adapted(model).values()):
        b = module.kernel_lora_b
        b[...] = size * jax.random.normal(jax.random.key(seed + index), b.shape)
    return model


@nnx.jit
def loss_and_gradients(model, tokens, images):
    def loss(model):
        return jnp.mean(jnp.square(model(tokens, images=images)[0]))

    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)


def assert_trees_close(found, expected, relative):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(
            f, e, rtol=0, atol=relative * max(np.abs(e).max(), 1e-30)
        ),
        jax.device_get(nnx.to_pure_dict(found)),
        jax.device_get(nnx.to_pure_dict(expected)),
    )


# ---- Where adapters go.


@pytest.mark.parametrize(
    "preset, targets, expected",
    [
        # Six layers of which three compute keys and values; two layers in the tower.
        ("e2b", "language", 3 * 7 + 3 * 5),
        ("e2b", "vision", 2 * 7),
        ("e2b", "all", 3 * 7 + 3 * 5 + 2 * 7),
        # Five layers; the two full ones have no v_proj. No router, no experts.
        ("26b_a4b", "language", 3 * 7 + 2 * 6),
        ("31b", "all", 3 * 7 + 2 * 6 + 2 * 7),
    ],
)
def test_named_targets_reach_the_seven_projections_that_exist(preset, targets, expected):
    names = resolve(base(preset), targets)
    assert len(names) == expected
    last = {name.removesuffix(".linear").split(".")[-1] for name in names}
    assert last == {f"{word}_proj" for word in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all(name.endswith(".linear") == name.startswith("vision_tower") for name in names)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("q_proj|v_proj", 6 + 3 + 2 + 2),
        (r".*self_attn\.q_proj", 6),
        (r"model\.language_model\.layers\.0\..*_proj", 7),
        ("language_model/layers/[01]/mlp/.*", 6),
        (r"language_model\.layers\.\d+\.per_layer_input_gate", 6),
        (r"embed_vision\.embedding_projection", 1),
    ],
)
def test_a_pattern_matches_dotted_names_slashed_names_or_the_last_word(pattern, expected):
    assert len(resolve(base(), pattern)) == expected


@pytest.mark.parametrize(
    "preset, pattern, same_as",
    [
        ("e2b", "q_einsum", r"language_model.*\.q_proj"),
        ("e2b", ".*q_einsum|.*kv_einsum", r"language_model.*\.[qkv]_proj"),
        ("31b", ".*kv_einsum", r"language_model.*\.[kv]_proj"),
        ("31b", ".*k_einsum", r"language_model\.layers\.[24]\.self_attn\.k_proj"),
        ("e2b", "layers/0/attn/.*einsum", r"language_model\.layers\.0\.self_attn\..*"),
        (
            "e2b",
            ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum",
            "language",
        ),
    ],
)
def test_tunix_names_mean_our_projections(preset, pattern, same_as):
    assert resolve(base(preset), pattern) == resolve(base(preset), same_as)


@pytest.mark.parametrize(
    "names, same_as",
    [
        (["q_proj", "v_proj"], "q_proj|v_proj"),
        (["self_attn.q_proj"], r".*self_attn\.q_proj(\.linear)?"),
        (("layers.0.mlp.up_proj", "o_proj"), r".*\.0\.mlp\.up_proj(\.linear)?|o_proj"),
        (["attn/q_einsum", "k_proj"], r"language_model.*\.q_proj|k_proj"),
    ],
)
def test_a_list_names_ends_as_in_peft(names, same_as):
    assert resolve(base(), names) == resolve(base(), same_as)
    assert hash(LoraConfig(targets=names)) == hash(LoraConfig(targets=tuple(names)))


@pytest.mark.parametrize("names", [["q_proj", "proj"], ["q_pro", "q_proj"]])
def test_each_name_of_a_list_must_reach_something(names):
    with pytest.raises(ValueError, match="^targets='(proj|q_pro)' matches no projection"):
        resolve(base(), names)


def test_a_pattern_that_matches_nothing_lists_what_could_match():
    with pytest.raises(ValueError, match="'q_porj' matches no projection") as error:
        apply_lora(base(), LoraConfig(targets="q_porj"))
    assert "language_model.layers.*.self_attn.q_proj (6)" in str(error.value)
    assert "vision_tower.encoder.layers.*.mlp.down_proj.linear (2)" in str(error.value)


@pytest.mark.parametrize(
    "pattern, idle",
    [
        ("q_proj|v_porj", "'v_porj'"),
        (r".*\.(?:q|k|w)_proj", "'w'"),
        (r"language_model\.layers\.(?:0|1|99)\.self_attn\.q_proj", "'99'"),
        (".*q_einsum|.*qkv_einsum", "'.*qkv_einsum'"),
        (".*q_einsum|.*k_einsum", "'.*k_einsum'"),  # Of models whose keys are values.
        (".*q_einsum|.*o_proj", "'.*o_proj'"),  # Two languages in one pattern.
        ("q_proj|(v|nope)_proj|", "'', 'nope'"),
    ],
)
def test_an_alternative_that_reaches_nothing_is_refused(pattern, idle):
    with pytest.raises(ValueError, match=f"{re.escape(idle)} matches no projection") as error:
        resolve(base(), pattern)
    assert "language_model.layers.*.self_attn.q_proj (6)" in str(error.value)


@pytest.mark.parametrize(
    "pattern, same_as",
    [
        (r"(?i)Q_PROJ|V_PROJ", "q_proj|v_proj"),
        (r"language_model(?:\.|\d|layers)+\.mlp\.up_proj", r"language_model.*up_proj"),
        (r".*_proj|.*q_proj", r".*_proj"),  # The first is enough, and the second reaches some.
        (r"(?:|model\.)language_model.*q_proj", r"language_model.*q_proj"),
        (r"(?!vision|audio).*\.q_proj", r"language_model.*q_proj"),
        (r"language_model.*[q|k]_proj", r"language_model.*(q|k)_proj"),
    ],
)
def test_alternatives_that_reach_something_are_left_alone(pattern, same_as):
    assert resolve(base(), pattern) == resolve(base(), same_as)


def test_vision_targets_of_a_text_only_model_name_the_setting():
    model = random_model("e2b", text_only=True)
    with pytest.raises(ValueError, match="text_only=True"):
        resolve(model, "vision")
    assert resolve(model, "all") == resolve(model, "language")


@pytest.mark.parametrize("pattern", [".*", r".*experts\.down_proj", ".*experts.*"])
def test_a_pattern_that_reaches_experts_is_refused(pattern):
    with pytest.raises(ValueError, match="reaches the experts.*Name projections one by one"):
        resolve(base("26b_a4b"), pattern)


def test_common_patterns_reach_the_dense_mlp_beside_the_experts():
    names = resolve(base("26b_a4b"), r"language_model.*(gate|up|down)_proj")
    assert len(names) == 5 * 3


def test_a_broken_pattern_is_a_value_error():
    with pytest.raises(ValueError, match=r"'\(q_proj': not a regular expression"):
        resolve(base(), "(q_proj")


def test_as_regex_matches_these_names_and_no_others():
    for preset in ("e2b", "31b"):
        names = list(linears(base(preset)))
        for chosen in (resolve(base(preset), "all"), names[3:7], names[-1:]):
            assert resolve(base(preset), as_regex(chosen)) == chosen


# ---- What they compute.


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_new_adapters_change_nothing(quantize):
    model = base()
    lora = apply_lora(model, LoraConfig(targets="all", quantize=quantize))
    expected = forward(model, **inputs(model))[0]
    if quantize is not None:
        kernels = {name: module.kernel for name, module in adapted(lora).items()}
        model = nnx.clone(model)
        for name, kernel in kernels.items():
            arrays = jax.tree.map(lambda leaf: leaf[...], kernel, is_leaf=_is_variable)
            linears(model)[name].kernel[...] = qwix.dequantize(arrays)
        exact, expected = expected, forward(model, **inputs(model))[0]
        assert np.abs(exact - expected).max() > 1e-3  # Quantising does change something.
    np.testing.assert_array_equal(forward(lora, **inputs(model))[0], expected)


def _is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


def test_the_update_is_a_times_b_scaled_by_alpha_over_rank():
    linear = nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0))
    for config, scale in [
        (LoraConfig(rank=4, alpha=10), 2.5),
        (LoraConfig(rank=4, alpha=10, use_rslora=True), 5.0),
    ]:
        model = perturb(add_to(linear, config))
        x = jax.random.normal(jax.random.key(1), (3, 6))
        module = model.language_model
        a, b = module.kernel_lora_a[...], module.kernel_lora_b[...]
        expected = x @ linear.kernel[...] + scale * (x @ a) @ b
        np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=1e-5)


def add_to(linear, config):
    class Model(nnx.Module):
        def __init__(self):
            self.language_model = linear

    return apply_lora(Model(), dataclasses.replace(config, targets="language_model"))


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("rank", [4, 8, 16])
def test_a_rank_equal_to_a_kernel_size_is_not_dropped(rank, quantize):
    linear = nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(0))
    model = add_to(linear, LoraConfig(rank=rank, quantize=quantize))
    x = jnp.ones((2, 16))
    before = model.language_model(x)
    assert np.abs(perturb(model).language_model(x) - before).max() > 0.1


@pytest.mark.parametrize("quantize", [None, "nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_bfloat16_model_keeps_its_activations_and_gets_float32_adapters(quantize):
    model = plain(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    lora = perturb(apply_lora(model, LoraConfig(targets="all", quantize=quantize)))
    for module in adapted(lora).values():
        assert module.kernel_lora_a.dtype == module.kernel_lora_b.dtype == jnp.float32
    module = next(iter(adapted(lora).values()))
    x = jnp.ones((2, module.in_features), jnp.bfloat16)
    assert module(x).dtype == jnp.bfloat16
    assert forward(lora, **inputs(lora), skip_lm_head=True)[0].dtype == jnp.bfloat16
    _, gradients = loss_and_gradients(lora, **inputs(lora))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients))


def test_float32_gradients_of_a_bfloat16_input_keep_its_dtype():
    linear = nnx.Linear(16, 8, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    module = perturb(add_to(linear, LoraConfig(rank=4))).language_model
    gradient = jax.grad(lambda x: module(x).astype(jnp.float32).sum())(jnp.ones((16,), "bfloat16"))
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "remat, quantize",
    [
        ("decoder", None),
        ("block", "nf4"),
        ("decoder", "int8"),
        pytest.param("block", None, marks=pytest.mark.slow),
        pytest.param("decoder", "nf4", marks=pytest.mark.slow),
        pytest.param("block", "int8", marks=pytest.mark.slow),
    ],
)
def test_remat_changes_neither_loss_nor_gradients(remat, quantize):
    config = LoraConfig(rank=4, targets="all", quantize=quantize)
    model = plain(remat_config=remat)
    found, found_gradients = loss_and_gradients(perturb(apply_lora(model, config)), **inputs(model))
    loss, gradients = loss_and_gradients(perturb(apply_lora(plain(), config)), **inputs(model))
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert_trees_close(found_gradients, gradients, 1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_mesh_changes_neither_loss_nor_gradients(quantize):
    config = LoraConfig(rank=4, targets="all", quantize=quantize)
    model = plain(remat_config="decoder")
    batch = inputs(model, rows=4)
    loss, gradients = loss_and_gradients(perturb(apply_lora(model, config)), **batch)
    lora = perturb(apply_lora(shard_model(nnx.clone(model), mesh()), config))
    found, found_gradients = loss_and_gradients(lora, **batch)
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert_trees_close(found_gradients, gradients, 1e-4)


def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def test_adapters_of_a_sharded_kernel_are_spread_over_the_mesh_along_its_axes_first():
    lora = apply_lora(shard_model(nnx.clone(base()), mesh()), LoraConfig(quantize="nf4"))
    modules = adapted(lora)
    expected = {"q_proj": ("fsdp", "tp"), "down_proj": ("tp", "fsdp")}
    for name, module in modules.items():
        rows, columns = expected.get(name.split(".")[-1], (None, None))
        if rows is None:
            continue
        a, b = module.kernel_lora_a, module.kernel_lora_b
        assert a.get_metadata()["out_sharding"] == ((rows, columns), None)
        assert b.get_metadata()["out_sharding"] == (None, (columns, rows))
        assert a.get_raw_value().sharding.spec == jax.P((rows, columns))
        assert b.get_raw_value().sharding.spec == jax.P(None, (columns, rows))
        assert module.kernel.qvalue.get_raw_value().sharding.spec == jax.P(rows, columns)


def test_the_same_adapters_are_drawn_on_every_mesh():
    single = apply_lora(base(), LoraConfig())
    sharded = apply_lora(shard_model(nnx.clone(base()), mesh()), LoraConfig())
    assert_trees_close(
        nnx.state(sharded, nnx.LoRAParam), nnx.state(single, nnx.LoRAParam), relative=0
    )


# ---- What they cost.


def test_trainable_and_total_parameters_are_told(capsys):
    model = base()
    lora = apply_lora(model, LoraConfig(rank=2, targets="q_proj", quantize="int8"))
    assert not capsys.readouterr().out
    assert describe(model) == "No adapters; apply_lora adds them."
    printed = describe(lora)
    own = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    trainable = sum(2 * (m.in_features + m.out_features) for m in adapted(lora).values())
    assert count_parameters(lora) == (trainable, own + trainable)
    assert f"Trainable parameters: {trainable:,} of {own + trainable:,}" in printed
    assert "language_model: q_proj 6; vision_tower: q_proj 2" in printed
    assert "int8" in printed


def test_only_targeted_kernels_are_quantised_to_the_size_that_was_asked_for():
    lora = apply_lora(base(), LoraConfig(targets="language", quantize="nf4"))
    for name, module in linears(lora).items():
        if not isinstance(module, LoraLinear):
            assert isinstance(module.kernel, nnx.Param), name
            continue
        assert module.kernel.qvalue.dtype == jnp.uint4
        assert module.kernel.scale.dtype == jnp.float32
        assert module.kernel.scale.shape[0] * 64 >= module.in_features


def test_a_kernel_that_no_tile_divides_is_named():
    linear = nnx.Linear(24, 8, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="language_model: its input size 24 .*tile_size"):
        add_to(linear, LoraConfig(quantize="nf4"))
    assert add_to(linear, LoraConfig(quantize="nf4", tile_size=12))


def test_lora_is_traced_without_memory():
    config = tiny_config("e2b")

    def build():
        model = Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0))
        return apply_lora(model, LoraConfig(quantize="nf4"))

    inside = nnx.eval_shape(build)
    shapes = nnx.eval_shape(lambda: Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
    of_shapes = apply_lora(shapes, LoraConfig(quantize="nf4"))
    assert nnx.graphdef(inside) == nnx.graphdef(of_shapes) == nnx.graphdef(build())
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(of_shapes))
    )


# ---- Being a good neighbour.


def test_the_given_model_is_left_as_it_is_and_its_class_is_kept():
    model = base()
    before = nnx.graphdef(model)
    lora = apply_lora(model, LoraConfig(quantize="nf4"))
    assert nnx.graphdef(model) == before
    assert type(lora) is type(model)
    embedding = "language_model", "embed_tokens", "embedding"
    given, shared = (functools.reduce(getattr, embedding, m).get_raw_value() for m in (model, lora))
    assert given is shared


def test_a_second_apply_is_refused():
    lora = apply_lora(base(), LoraConfig())
    with pytest.raises(ValueError, match="has adapters already"):
        apply_lora(lora, LoraConfig())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, "rank: expected at least 1, found 0"),
        (
            {"quantize": "int3"},
            "quantize: expected None .null. or one of nf4, int8, found",
        ),
        ({"tile_size": 0}, "tile_size: expected at least 1, found 0"),
        ({"tile_size": 30}, "tile_size: found 30 without quantize"),
        ({"use_rslora": "no"}, "use_rslora: expected true or false, found 'no'"),
        ({"targets": []}, r"targets: expected a name, .* or a list of names, found \[\]"),
        ({"targets": ["q_proj", 3]}, r"targets: expected a name, .*, found \['q_proj', 3\]"),
        ({"targets": None}, "targets: expected a name, .*, found None"),
        ({"targets": ["q_proj", "language"]}, "entries of a list .* alone: targets='language'"),
        ({"targets": [".*q_proj"]}, r"entries of a list .* alone: targets='\.\*q_proj'"),
        ({"targets": "all-linear"}, "targets: write 'all', .* found 'all-linear'"),
        ({"targets": ["all-linear"]}, r"targets: write 'all', .* found \['all-linear'\]"),
    ],
)
def test_a_config_says_what_is_wrong_with_it(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**fields)


@pytest.mark.parametrize("stacked", [False, True])
def test_checkpointed_layers_cost_two_forward_passes_and_one_back(stacked):
    """Not three: weights that are not trained get no gradient."""
    model = apply_lora(plain(remat_config="decoder"), LoraConfig(rank=1))
    graphdef, adapters, weights = nnx.split(
        stack_layers(model) if stacked else model, nnx.LoRAParam, ...
    )
    tokens = jnp.ones((2, 24), jnp.int32)

    def total(adapters):
        return nnx.merge(graphdef, adapters, weights)(tokens, skip_lm_head=True)[0].sum()

    forward, step = (
        count_flops(jax.make_jaxpr(function)(adapters)) for function in (total, jax.grad(total))
    )
    assert 2.5 < step / forward < 3.4


def test_qwix_itself_can_adapt_the_model_under_the_same_names():
    model = plain(remat_config="decoder")
    provider = qwix.LoraProvider(module_path=".*q_proj|.*q_proj/linear", rank=2, alpha=4.0)
    theirs = qwix.apply_lora_to_model(model, provider, **model.get_model_input(), rngs=nnx.Rngs(0))
    ours = apply_lora(model, LoraConfig(rank=2, targets="q_proj"))
    paths = [
        {path for path, _ in nnx.to_flat_state(nnx.state(lora, nnx.LoRAParam))}
        for lora in (theirs, ours)
    ]
    assert paths[0] == paths[1]
    with pytest.raises(ValueError, match="8 LoRA matrices, 0 of them made by apply_lora"):
        adapted(theirs)
