# SPDX-License-Identifier: Apache-2.0
"""Names under which vLLM and SGLang get our weights, read by Tunix's own functions."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import random_model
from tunix.generate import utils
from tunix.generate.mappings import BackendMappingMixin, MappingConfig

import tunix_gemma4
from tunix_gemma4.config import ModelConfig
from tunix_gemma4.lora import LoraConfig, apply_lora, merge_lora
from tunix_gemma4.model import backend_names
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration, abstract_model
from tunix_gemma4.plugin.engines import to_vllm

SIZES = ("e2b", "e4b", "12b", "26b_a4b", "31b")
BACKENDS = ("vllm_jax", "sglang_jax")


@pytest.fixture(autouse=True)
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


def cut(size):
    """A released size, real widths, with six layers, both kinds, and two of vision.

    Layers of one kind have the same names in any number.
    """
    config = getattr(ModelConfig, f"gemma4_{size}")()
    config.num_layers = 6
    if config.tower_config is None:
        return config
    vision = dataclasses.replace(config.tower_config, num_hidden_layers=2)
    return dataclasses.replace(config, vision_config=vision, text_only=False)


@pytest.fixture(scope="module")
def abstract():
    return {size: abstract_model(cut(size)) for size in SIZES}


def dotted(path):
    return ".".join(map(str, path))


def starred(name):
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def sent(model, backend):
    """Names and shapes of what Tunix takes for its source."""
    state = nnx.state(model, nnx.Param)
    if backend == "vllm_jax":
        state = jax.eval_shape(to_vllm(model), state)
    return {dotted(path): variable for path, variable in nnx.to_flat_state(state)}


def engine_name(table, name):
    """The engine's name of `name`, its numbers put in by hand."""
    numbers = re.findall(r"\.(\d+)(?=\.)", name)
    target = table[starred(name)][0]
    for number in numbers:
        target = target.replace("*", number, 1)
    return target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_has_one_name_of_its_own(abstract, size, backend):
    model = abstract[size]
    table = model.to_hf_mappings(backend)
    source = sent(model, backend)
    named = {name: engine_name(table, name) for name in source}
    assert len(set(named.values())) == len(source)
    # Tunix reads its tables from the engine's side, with patterns of its own making.
    found = utils.build_flat_dict(
        [(tuple(target.split(".")), target) for target in named.values()], table
    )
    assert {name: entry[0] for name, entry in found.items()} == named


def test_the_tables_hold_what_there_is_and_nothing_else(abstract):
    there = {
        starred(dotted(path))
        for model in abstract.values()
        for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    assert there == set(backend_names.NAMES)


def test_tunix_finds_the_tables_by_the_class_alone():
    class Changed(Gemma4ForConditionalGeneration, BackendMappingMixin):
        """As Qwix makes them: a class whose module is somewhere else."""

    Changed.__module__ = "abc"
    assert Changed.BACKEND_PACKAGE_PATH == "tunix_gemma4.model.backend_names"
    for backend in BACKENDS:
        registry = BackendMappingMixin.__dict__["_backend_registry"].__func__(Changed)
        assert registry[backend] is Changed.mapping_for(backend)
    with pytest.raises(ValueError, match="backend: expected one of vllm_jax, sglang_jax"):
        Changed.to_hf_mappings("vllm_torch")


def vllm_shapes(config):
    """Shapes of an engine's attention, as tpu-inference declares them: [D, N, H] and [N, H, D]."""
    shapes = {}
    for spec in config.layers:
        at = f"model.layers.{spec.index}.self_attn"
        heads = (config.num_attention_heads, spec.head_dim)
        shapes[f"{at}.q_proj.weight"] = (config.hidden_size, *heads)
        shapes[f"{at}.o_proj.weight"] = (*heads, config.hidden_size)
        if spec.shares_kv:
            continue
        keys = (config.hidden_size, spec.num_kv_heads, spec.head_dim)
        shapes[f"{at}.k_proj.weight"] = keys
        if not spec.k_eq_v:
            shapes[f"{at}.v_proj.weight"] = keys
    return shapes


def engine_state(model, backend):
    """An engine's zeros under its own names, attention and experts in its own shapes."""
    table = model.to_hf_mappings(backend)
    shapes = {engine_name(table, name): leaf.shape for name, leaf in sent(model, backend).items()}
    if backend == "vllm_jax":
        shapes |= vllm_shapes(model.config)
        position = "vision_tower.patch_embedder.position_embedding_table"
        if position in shapes:
            axes, places, size = shapes[position]
            shapes[position] = (places, axes, size)
        for name, shape in shapes.items():
            if name.endswith("kernel_gating_upproj_EDF"):
                experts, _, width, size = shape
                shapes[name] = (experts, size, 2 * max(width, 128))
    return nnx.from_flat_state(
        [
            (tuple(name.split(".")), nnx.Param(jnp.zeros(shape, jnp.float32)))
            for name, shape in shapes.items()
        ]
    )


def transferred(model, state, backend="vllm_jax"):
    """What an engine has after Tunix sent it `state`, by the engine's names."""
    mapping = MappingConfig.build(model=model, backend=backend)
    if mapping.preprocess_src_state is not None:
        state = mapping.preprocess_src_state(state)
    engine = utils.transfer_state_with_mappings(
        src_state=state,
        dst_state=engine_state(model, backend),
        key_mappings=dict(mapping.to_hf_mappings),
        key_mapping_hook_fns=mapping.to_hf_hook_fns,
        transpose_keys=mapping.to_hf_transpose_keys,
        rollout_engine=backend,
        tp_size=1,
    )
    return {dotted(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(engine)}


@pytest.mark.parametrize("preset", ["e2b", "26b_a4b"])
def test_vllm_gets_every_weight_in_its_shapes(preset):
    model = random_model(preset, text_only=False)
    got = transferred(model, nnx.state(model, nnx.Param))
    layer = model.language_model.layers[0]
    attention = layer.self_attn
    heads = vllm_shapes(model.config)["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(
        got["model.layers.0.self_attn.q_proj.weight"],
        np.asarray(attention.q_proj.kernel[...]).reshape(heads),
    )
    np.testing.assert_array_equal(
        got["vision_tower.patch_embedder.position_embedding_table"],
        np.asarray(model.vision_tower.patch_embedder.position_embedding_table[...]).swapaxes(0, 1),
    )
    assert got["model.layers.0.layer_scalar"] == np.float32(layer.layer_scalar)
    if preset == "26b_a4b":
        fused = got["model.layers.0.experts.kernel_gating_upproj_EDF"]
        ours = np.asarray(layer.experts.gate_up_proj[...])
        width = ours.shape[-1] // 2
        half = fused.shape[-1] // 2
        np.testing.assert_array_equal(fused[..., :width], ours[..., :width])
        np.testing.assert_array_equal(fused[..., half : half + width], ours[..., width:])
        assert not fused[..., width:half].any()
    # Zeros are what nothing was sent to.
    assert not [name for name, values in got.items() if not values.any()]


def test_sglang_gets_every_weight_of_a_dense_model():
    model = random_model("31b")
    got = transferred(model, nnx.state(model, nnx.Param), "sglang_jax")
    assert not [name for name, values in got.items() if not values.any()]
    kernel = model.language_model.layers[0].mlp.up_proj.kernel[...]
    np.testing.assert_array_equal(got["model.layers.0.mlp.up_proj.weight"], kernel)


def test_vllm_gets_the_policy_with_its_adapters_merged():
    model = random_model("e2b")
    policy = apply_lora(model, LoraConfig(rank=2, alpha=4, targets="q_proj|down_proj"))
    for path, variable in nnx.to_flat_state(nnx.state(policy, nnx.LoRAParam)):
        variable[...] = jnp.ones_like(variable[...]) * (1 + len(dotted(path)) % 3)
        nnx.update(policy, nnx.from_flat_state([(path, variable)]))
    expected = transferred(model, nnx.state(merge_lora(policy), nnx.Param))
    whole = transferred(policy, nnx.state(policy))
    assert whole.keys() == expected.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(values, expected[name])
    # Tunix sends adapters alone after each step.
    adapters = transferred(policy, nnx.state(policy, nnx.LoRAParam))
    arrived = {name for name, values in adapters.items() if values.any()}
    kernels = {name for name in arrived if not name.endswith("layer_scalar")}
    assert {name.split(".")[-2] for name in kernels} == {"q_proj", "down_proj"}
    for name in kernels:
        np.testing.assert_array_equal(adapters[name], expected[name])


def test_sglangs_adapters_arrive_in_its_shapes():
    model = apply_lora(random_model("31b"), LoraConfig(rank=2, alpha=4))
    mapping = MappingConfig.build(model=model, backend="sglang_jax")
    keys = mapping.lora_to_hf_transpose_keys
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        name = dotted(path)
        assert starred(name) in mapping.lora_to_hf_mappings
        value = utils._apply_transpose(variable[...], name, keys, "sglang_jax")
        assert value.shape == (1, *variable.shape[::-1])


@pytest.mark.parametrize(
    ("preset", "message"), [("26b_a4b", "experts apart"), ("e2b", "no per-layer inputs")]
)
def test_what_sglang_cannot_hold_is_refused(preset, message):
    with pytest.raises(ValueError, match=message):
        MappingConfig.build(model=random_model(preset), backend="sglang_jax")


def test_mappings_that_a_user_gives_are_taken_as_they_are():
    given = MappingConfig(to_hf_mappings={"a": ("b", ())})
    assert MappingConfig.build(given, random_model("31b"), "vllm_jax") is given
