# SPDX-License-Identifier: Apache-2.0
"""Weights on their way to an engine: vLLM's shapes, merged adapters, buffers. Experimental.

Names and shapes are those of the engines' sources (`model.backend_names` has the tables); no engine
has been run with them, and a warning says so. Tunix's own translation knows its own layouts alone.
What it cannot do for an engine is refused here, because it would only log an error and leave that
engine's weights as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx

from ..checkpoint import names as weights
from ..lora import merge_lora
from ..lora.adapters import adapted
from ..model.gemma4 import Gemma4ForConditionalGeneration
from .hooks import around

_Path = tuple[Any, ...]
EXPERIMENTAL = "Weights for %s: experimental, no engine has been run with these names and shapes."
_HEADS = {"q_proj": "q_norm", "k_proj": "k_norm", "v_proj": "k_norm", "o_proj": "q_norm"}


@around
def wrap_from_model(original, model: Any, backend: str = "vllm_jax", **overrides: Any) -> Any:
    """Weights reach vLLM in its shapes, with adapters merged; SGLang's limits are said."""
    if isinstance(model, Gemma4ForConditionalGeneration):
        _refuse(model, backend)
        logging.log_first_n(logging.WARNING, EXPERIMENTAL, 1, backend)
        if backend == "vllm_jax":
            overrides = {"preprocess_src_state": to_vllm(model), **overrides}
    return original(model, backend, **overrides)


def _refuse(model: Gemma4ForConditionalGeneration, backend: str) -> None:
    is_sglang = backend == "sglang_jax"
    if is_sglang and model.config.enable_moe_block:
        raise ValueError(
            "sglang_jax: it keeps gate and up projections of experts apart, and Tunix cannot cut "
            'a variable in two on its way there; use rollout_engine="vllm" or "vanilla"'
        )
    if is_sglang and model.config.hidden_size_per_layer_input:
        raise ValueError(
            "sglang_jax: its Gemma 4 has no per-layer inputs, so it cannot be E2B or E4B; use "
            'rollout_engine="vllm" or "vanilla"'
        )


def to_vllm(model: Gemma4ForConditionalGeneration) -> Callable[[nnx.State], nnx.State]:
    """The function that Tunix applies to weights of `model` before it sends them to vLLM.

    Adapters are merged into kernels: what arrives is the policy, whether the engine knows LoRA or
    not. Buffers go along, since an engine may start from random weights.
    """

    def preprocess(state: nnx.State) -> nnx.State:
        given = dict(nnx.to_flat_state(state))
        if any(isinstance(variable, nnx.LoRAParam) for variable in given.values()):
            given = _merged(model, state, given)
        sizes = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
        sent = [_shaped(path, variable, sizes) for path, variable in given.items()]
        return nnx.from_flat_state(sent + _buffers(model))

    return preprocess


def _merged(
    model: nnx.Module, state: nnx.State, given: Mapping[_Path, nnx.Variable]
) -> dict[_Path, nnx.Variable]:
    """The kernels with their adapters in them; of the other variables those that are given."""
    current = nnx.clone(model)
    nnx.update(current, state)
    names = {(*name.split("."), "kernel") for name in adapted(current)}
    merged = dict(nnx.to_flat_state(nnx.state(merge_lora(current), nnx.Param)))
    return {
        path: variable
        for path, variable in merged.items()
        if path in given or tuple(map(str, path)) in names
    }


def _shaped(
    path: _Path, variable: nnx.Variable, sizes: Mapping[_Path, nnx.Variable]
) -> tuple[_Path, nnx.Variable]:
    """`variable` with an axis of heads, or under the name by which Tunix cuts experts for vLLM."""
    value = variable.get_raw_value()
    words = [word for word in path if word in _HEADS]
    if words:
        owner = path[: path.index("self_attn") + 1]
        head_dim = sizes[(*owner, _HEADS[words[0]], "weight")].shape[0]
        rows, columns = value.shape
        heads = (-1, head_dim, columns) if words[0] == "o_proj" else (rows, -1, head_dim)
        return path, nnx.Param(value.reshape(heads))
    if path[-1] == "gate_up_proj":
        experts, size, double = value.shape
        parts = value.reshape(experts, size, 2, double // 2)
        return ("layers", path[2], "moe", "gating_einsum"), nnx.Param(parts.transpose(0, 2, 3, 1))
    return path, variable


def _buffers(model: nnx.Module) -> list[tuple[_Path, nnx.Variable]]:
    """The values that vLLM keeps as parameters. Bounds of clipped projections it has none of."""
    found = []
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, weights.HasBuffers):
            continue
        for name, shape in module.buffer_shapes().items():
            if name in ("layer_scalar", "std_bias", "std_scale"):
                values = jnp.asarray(getattr(module, name), jnp.float32).reshape(shape)
                found.append(((*path, name), nnx.Param(jax.device_put(values))))
    return found
