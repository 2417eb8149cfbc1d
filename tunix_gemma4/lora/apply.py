# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: add them, merge them, and (in `peft`) exchange them with PEFT.

model = apply_lora(model, LoraConfig(rank=16, alpha=32, targets="all", quantize="nf4"))
save_adapter(model, "adapter")
model = merge_lora(model)
"""

from __future__ import annotations

import qwix
from absl import logging
from flax import nnx

from ..model.lora import LoraLinear, plain_linear
from ..model.scan import require_single_layers
from .adapters import LoraConfig, adapted, add_adapters, describe, merged, replace_modules
from .peft import load_adapter, save_adapter
from .targets import linears, resolve, with_head

__all__ = [
    "LoraConfig",
    "LoraLinear",
    "apply_lora",
    "load_adapter",
    "merge_lora",
    "reference_model",
    "save_adapter",
]


def apply_lora(
    model: nnx.Module, config: LoraConfig | None = None, *, rngs: nnx.Rngs | None = None
) -> nnx.Module:
    """Adds adapters and logs where, and how many parameters train; see `describe`.

    A starts random and B zero, so the model computes what it did (or what its quantised kernels
    do). Layers that reuse another layer's K/V have no `k_proj` and `v_proj`, and layers whose keys
    double as values no `v_proj`; they get none. The head of a `Gemma4ForTokenScores` always gets
    an adapter, whatever the targets: frozen at zero it would score everything alike.

    Args:
        model: left as it is; the result shares the arrays that are not quantised. Works on
            abstract models and inside `nnx.eval_shape` too, and on models placed on a mesh.
        config: `LoraConfig()` if None.
        rngs: source of A; `nnx.Rngs(0)` if None.

    Returns:
        A model of the same class, whose adapters are `nnx.LoRAParam` in float32.

    Raises:
        ValueError: for targets that match nothing or reach experts, kernels that cannot be
            quantised, and a model that has adapters.
    """
    config = config or LoraConfig()
    names = with_head(model, resolve(model, config.targets))
    model = add_adapters(model, names, config, rngs or nnx.Rngs(0))
    logging.info("%s", describe(model))
    return model


def merge_lora(model: nnx.Module) -> nnx.Module:
    """A plain model that computes what the adapted one does.

    Each adapted kernel becomes `kernel + scale A B`, computed in float32 and rounded once, to the
    dtype it had before `apply_lora`; quantised ones are dequantised. Structure and class are
    those of the base again. The given model is left as it is.

    Raises:
        ValueError: if the model has no adapters.
    """
    require_single_layers(model)
    model = nnx.clone(model)
    modules = adapted(model)
    if not modules:
        raise ValueError("the model has no adapters to merge; apply_lora or load_adapter adds them")
    replace_modules(model, {name: merged(module) for name, module in modules.items()})
    return model


def reference_model(model: nnx.Module) -> nnx.Module:
    """The base that new adapters of `model` start from, sharing all arrays; stacked as `model` is.

    Only where kernels are quantised does it keep adapters, and those must not have been trained.
    """
    model = nnx.clone(model)
    plain = {
        name: plain_linear(module, module.kernel)
        for name, module in linears(model).items()
        if isinstance(module, LoraLinear) and not isinstance(module.kernel, qwix.QArray)
    }
    replace_modules(model, plain)
    return model
