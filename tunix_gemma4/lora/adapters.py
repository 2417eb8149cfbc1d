# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters, over plain or quantised kernels: add them, merge them.

model = apply_lora(model, LoraConfig(rank=16, alpha=32, targets="all", quantize="nf4"))
save_adapter(model, "adapter")
model = merge_lora(model)

The variables are named, shaped and typed as Qwix's (`kernel_lora_a` [in, rank], `kernel_lora_b`
[rank, out], `nnx.LoRAParam`), and Qwix quantises the kernels. Its interception of matrix products
is not used, because it finds a weight by shape: with a quantised kernel it silently drops an
adapter whose rank equals the kernel's input or output size. It also turns the activations of a
bfloat16 model into float32 when its adapters are float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from absl import logging
from flax import nnx

from ..checkpoint.names import SCORE
from ..config.domains import require_fields
from ..model.gemma4 import require_single_layers
from ..model.lora import LoraLinear, plain_linear, unboxed
from ..sharding import eval_shape, is_variable, mesh_of, param_shardings, spread
from .targets import check_targets, grouped, linears, resolve, with_head

Kind = TypeVar("Kind", bound=nnx.Variable)
Model = TypeVar("Model", bound=nnx.Module)

QTYPES = ("nf4", "int8")
TILE_SIZES = (64, 32, 16)
# The bound of PEFT's default initial A, 1 / sqrt(in), so that learning rates carry over.
_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_init_a = jax.jit(_uniform, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What `apply_lora` adds.

    Attributes:
        rank: columns of A and rows of B.
        alpha: the update is scaled by alpha / rank, as in PEFT.
        targets: "language", "vision", "all", a regular expression over module names, or a list of
            such names or their ends, as PEFT's `target_modules`.
        quantize: "nf4" or "int8" stores the kernels of the targeted projections, and only theirs,
            in 4 or 8 bits; None (null) leaves them as they are.
        tile_size: input features that share one float32 quantisation scale; None (null)
            takes the largest of 64, 32 and 16 that divides the kernel's input size.
        use_rslora: scale by alpha / sqrt(rank) instead.
    """

    rank: int = 16
    alpha: float = 32
    targets: Any = "language"  # str | Sequence[str]
    quantize: str | None = None
    tile_size: int | None = None
    use_rslora: bool = False

    def __post_init__(self):
        require_fields(self)
        if self.quantize not in (None, *QTYPES):
            known = f"None (null) or one of {', '.join(QTYPES)}"
            raise ValueError(f"quantize: expected {known}, found {self.quantize!r}")
        if self.tile_size is not None and self.quantize is None:
            found = f"tile_size: found {self.tile_size} without quantize, which it is of"
            raise ValueError(f"{found}; expected None (null)")
        check_targets(self.targets)
        if isinstance(self.targets, list):  # It must be hashable.
            object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def tile_size(name: str, in_features: int, config: LoraConfig) -> int:
    """Input features per quantisation scale of the kernel called `name`."""
    sizes = TILE_SIZES if config.tile_size is None else (config.tile_size,)
    for size in sizes:
        if in_features % size == 0:
            return size
    raise ValueError(
        f"{name}: its input size {in_features} is not a multiple of a tile size "
        f"({', '.join(map(str, sizes))}), so it cannot be quantised to {config.quantize}. "
        "Set LoraConfig.tile_size to one of its divisors, target other projections, or use "
        "quantize=None."
    )


@functools.partial(jax.jit, static_argnames=("qtype", "tile"))
def _quantize(kernel: jax.Array, *, qtype: str, tile: int) -> qwix.QArray:
    """Scales per output feature and per `tile` input features, float32 whatever the kernel is."""
    kernel = kernel.astype(jnp.float32)
    return qwix.quantize(kernel, qtype, channelwise_axes=(1,), tiled_axes={0: tile})


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def _merge(
    kernel: jax.Array | qwix.QArray, a: jax.Array, b: jax.Array, *, scale: float, dtype: Any
) -> jax.Array:
    """`W + scale A B`, computed in float32."""
    if isinstance(kernel, qwix.QArray):
        kernel = qwix.dequantize(kernel)
    update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * update).astype(dtype)


def adapt(linear: nnx.Linear, *, name: str, config: LoraConfig, key: jax.Array) -> LoraLinear:
    """What takes the place of `linear`, on its kernel's own devices; see `apply_lora`."""
    kernel = linear.kernel
    metadata = kernel.get_metadata()
    rows, columns = metadata.get("out_sharding") or (None, None)
    in_features, out_features = kernel.shape
    mesh = mesh_of(kernel.get_raw_value())

    def boxed(kind: type[Kind], value: jax.Array, axes: tuple) -> Kind:
        own = metadata | {"out_sharding": axes, "eager_sharding": False}
        return _placed(kind(value, **own), mesh)

    a = _init_a(key, (in_features, config.rank), jnp.float32)
    b = jnp.asarray(np.zeros((config.rank, out_features), np.float32))  # No program to compile.
    a = boxed(nnx.LoRAParam, a, (spread(rows), None))
    b = boxed(nnx.LoRAParam, b, (None, spread(columns)))
    result = LoraLinear(linear, a, b, config)
    if config.quantize is not None:
        tile = tile_size(name, in_features, config)
        leaves = _quantize(kernel[...], qtype=config.quantize, tile=tile)
        result.kernel = jax.tree.map(lambda x: boxed(nnx.Param, x, (rows, columns)), leaves)
    return result


def merged(linear: LoraLinear) -> nnx.Linear:
    """An `nnx.Linear` that computes the same."""
    # The variable of the kernel's own shape, quantised or not.
    main: Any = getattr(linear.kernel, "qvalue", linear.kernel)
    kernel = unboxed(linear.kernel) if isinstance(linear.kernel, qwix.QArray) else main[...]
    a, b = linear.kernel_lora_a[...], linear.kernel_lora_b[...]
    value = _merge(kernel, a, b, scale=linear.scale, dtype=linear.kernel_dtype)
    mesh = mesh_of(main.get_raw_value())
    return plain_linear(linear, _placed(nnx.Param(value, **main.get_metadata()), mesh))


def replace_modules(model: nnx.Module, modules: Mapping[str, nnx.Module]) -> None:
    """Puts `modules`, by dotted name, in the places of those that `model` has there."""
    for name, module in modules.items():
        parent: Any = model
        words = name.split(".")
        for word in words[:-1]:
            parent = parent[int(word)] if word.isdigit() else getattr(parent, word)
        setattr(parent, words[-1], module)


def _placed(variable: Kind, mesh: jax.sharding.Mesh | None) -> Kind:
    """`variable` on `mesh`, by its own metadata."""
    if mesh is None:
        return variable
    sharding = param_shardings(variable, mesh).get_raw_value()
    placed: Any = variable.replace(jax.device_put(variable.get_raw_value(), sharding))
    return placed


def adapted(model: nnx.Module) -> dict[str, LoraLinear]:
    """The projections that carry an adapter, by dotted name.

    Raises:
        ValueError: for adapters that Qwix made itself, whose scale only Qwix knows.
    """
    found = {name: m for name, m in linears(model).items() if isinstance(m, LoraLinear)}
    count = len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    if count != 2 * len(found):
        raise ValueError(
            f"the model has {count} LoRA matrices, {2 * len(found)} of them made by apply_lora; "
            "only those can be saved or merged. Use apply_lora in place of "
            "qwix.apply_lora_to_model."
        )
    return found


def add_adapters(model: Model, names: list[str], config: LoraConfig, rngs: nnx.Rngs) -> Model:
    """A copy of `model` with adapters on `names`; what is not quantised shares its arrays."""
    variables = jax.tree.leaves(nnx.state(model), is_leaf=is_variable)
    if any(isinstance(variable, nnx.LoRAParam) for variable in variables):
        raise ValueError("the model has adapters already: merge_lora or load the base again")

    def add(model: Model, key: jax.Array) -> Model:
        model = nnx.clone(model)
        projections = linears(model)
        for name in names:
            if config.quantize is not None and name != SCORE:
                tile_size(name, projections[name].in_features, config)
        # There is no memory to save in a head of one column.
        settings = {SCORE: dataclasses.replace(config, quantize=None, tile_size=None)}
        replacements = {
            name: adapt(projections[name], name=name, config=settings.get(name, config), key=own)
            for name, own in zip(names, jax.random.split(key, len(names)), strict=True)
        }
        replace_modules(model, replacements)
        return model

    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables)):
        return eval_shape(add, model, rngs.params())
    return add(model, rngs.params())


def count_parameters(model: nnx.Module) -> tuple[int, int]:
    """Trainable (the adapters') and all parameters; a quantised kernel counts its elements."""
    trainable = total = 0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        size = math.prod(variable.get_raw_value().shape)
        trainable += size * isinstance(variable, nnx.LoRAParam)
        total += size * (path[-2:] != ("kernel", "scale"))  # Of a `qwix.QArray`.
    return trainable, total


def describe(model: nnx.Module) -> str:
    """Which projections carry adapters, and trainable and total parameters, in a few lines."""
    modules = adapted(model)
    if not modules:
        return "No adapters; apply_lora adds them."
    config = next(iter(modules.values())).lora
    trainable, total = count_parameters(model)
    towers: dict[str, list[str]] = {}
    for name, count in grouped(modules).items():
        words = name.removesuffix(".linear").split(".")
        towers.setdefault(words[0], []).append(f"{words[-1]} {count}")
    where = "; ".join(f"{tower}: {', '.join(words)}" for tower, words in towers.items())
    quantized = f", their kernels in {config.quantize}" if config.quantize else ""
    return (
        f"LoRA of rank {config.rank}, scale {config.scale:g}, on {len(modules)} projections"
        f"{quantized} ({where}).\n"
        f"Trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.3g} %)"
    )


def apply_lora(
    model: Model, config: LoraConfig | None = None, *, rngs: nnx.Rngs | None = None
) -> Model:
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


def merge_lora(model: Model) -> Model:
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


def reference_model(model: Model) -> Model:
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
