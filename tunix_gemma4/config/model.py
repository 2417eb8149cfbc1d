# SPDX-License-Identifier: Apache-2.0
"""What a Gemma 4 model is made of, settled layer by layer.

`ModelConfig` keeps the field names of a Hugging Face `config.json` and resolves, in
`ModelConfig.layers`, everything that varies from layer to layer. No other file asks whether a
layer is global or shared.

Source: transformers 5.12 `Gemma4Config`, `Gemma4TextConfig`, `Gemma4VisionConfig`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging

from . import parts
from .parts import DEFAULT_ROPE, LayerSpec, RematConfig, VisionConfig, check_fields, require_one_of
from .source import DEFAULTS, dtype_of, read_source, refuse_quantized, section, settle_layers
from .tunix_names import TunixNames, check_sharding, is_sharding, takes_tunix_names

# In float16 weights may be stored, but nothing is computed; see `refuse_float16`.
_DTYPES = tuple(map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))
_VISION_FIELDS = tuple(field.name for field in dataclasses.fields(VisionConfig))
_MEDIA_IDS = tuple(f"{name}_token_id" for name in ("image", "video", "audio", "boi", "eoi"))


@takes_tunix_names
@dataclasses.dataclass
class ModelConfig(TunixNames):
    """A Gemma 4 model. Fields down to `eos_token_id` are HF's `text_config`, defaults included.

    Tunix's names of the fields work too, in the constructor and in `dataclasses.replace` as well;
    no other name can be assigned.

    Attributes beyond HF's:
        tower_config: HF's `vision_config`, whether or not the tower is built.
        text_only: build no vision parameters.
        dtype: activations. param_dtype: parameters at initialisation.
        remat_config: see `RematConfig`; also Tunix's integers and names.
        attention_implementation: "xla", "splash" or "triton" (kernels for TPU and GPU where they
            can express the case, else as "xla") or "auto"; see docs/explanation/attention.md.
        use_flash_attention: Tunix's name of the kernel for what is compiled for.
        flash_attention_block_size: tokens that splash handles at once at most; it takes 128, 256
            or 512.
        use_sliding_window_kv_cache: sliding layers cache one window (a ring) instead of
            `max_seq_len` tokens.
        shd_config: Tunix's default `ShardingConfig` or None; see docs/how-to/shard.md.
        source: the `config.json` this was read from; `to_hf` keeps what it does not know.
        source_directory: the directory it was read from, if any.
    """

    vocab_size: int = 262_144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    num_global_key_value_heads: int | None = None
    head_dim: int = 256
    global_head_dim: int | None = 512
    sliding_window: int = 512
    layer_types: list[str] | None = None
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = None
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = 256
    vocab_size_per_layer_input: int = 262_144
    enable_moe_block: bool = False
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None
    use_bidirectional_attention: str | None = None
    max_position_embeddings: int = 131_072
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | list[int] = 1

    model_type: str = "gemma4"
    image_token_id: int = 258_880
    video_token_id: int = 258_884
    audio_token_id: int = 258_881
    boi_token_id: int = 255_999
    eoi_token_id: int = 258_882
    tower_config: VisionConfig | None = None

    text_only: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat_config: Any = RematConfig.NONE
    attention_implementation: str = "auto"
    use_flash_attention: bool = False
    flash_attention_block_size: int = 1024
    use_sliding_window_kv_cache: bool = True
    shd_config: Any = dataclasses.field(default=None, compare=False, repr=False)
    source: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)
    source_directory: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        self.dtype = _float_dtype("dtype", self.dtype)
        self.param_dtype = _float_dtype("param_dtype", self.param_dtype)
        check_fields(type(self), vars(self))
        if self.layer_types is None:
            self.layer_types = _five_to_one(self.num_hidden_layers)
        self.layer_types = list(self.layer_types)
        if self.rope_parameters is None:
            self.rope_parameters = DEFAULT_ROPE
        self.rope_parameters = copy.deepcopy(self.rope_parameters)
        self.validate()

    def validate(self) -> None:
        """Raises ValueError for what is contradictory or unsupported, naming field and value."""
        check_fields(type(self), vars(self))
        count, types = self.num_hidden_layers, self.layer_types or []
        if len(types) != count:
            raise ValueError(
                f"layer_types: expected {count} entries (num_hidden_layers), found {len(types)}"
            )
        for index, layer_type in enumerate(types):
            require_one_of(f"layer_types[{index}]", layer_type, parts.KINDS)
        both_ways = self.use_bidirectional_attention
        require_one_of("use_bidirectional_attention", both_ways, (None, "vision"))
        _validate_sharing(self)
        _validate_rope(self)
        _validate_sizes(self)
        self.remat  # noqa: B018  raises for an unknown spelling
        _validate_attention(self)

    def __hash__(self) -> int:
        # Configs are static attributes of modules, so JAX hashes them. They stay mutable because
        # Tunix and its tests assign fields: only what never changes under a built model counts.
        return hash((self.model_type, self.vocab_size, self.hidden_size))

    # ---- Reading and writing Hugging Face's form.

    @classmethod
    def from_hf(
        cls,
        directory_or_config_json: str | Path | Mapping[str, Any],
        text_only: bool = True,
        *,
        audio: bool = False,
        **fields: Any,
    ) -> ModelConfig:
        """Reads a checkpoint directory, a `config.json`, or its parsed content.

        Args:
            directory_or_config_json: directory, path or mapping.
            text_only: leave the vision tower out.
            audio: asking for the audio tower is an error; it exists to say so.
            **fields: override fields of `ModelConfig`.

        Raises:
            ValueError: what is unsupported or contradictory, naming field and value.
        """
        if audio:
            raise ValueError(
                "audio=True: the audio tower is not supported; supported: text and images. "
                "Its tensors are kept when a loaded checkpoint is saved."
            )
        source, path = read_source(directory_or_config_json)
        directory = None if path is None else path.parent
        try:
            refuse_quantized(source, directory)
            known = _read_fields(cls, source)
            known["source_directory"] = None if directory is None else str(directory)
            return cls(**known | {"text_only": text_only, **fields})
        except ValueError as error:
            raise ValueError(str(error) if path is None else f"{path}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model; what `source` holds beyond it is kept."""
        result = copy.deepcopy(self.source)
        text = {name: getattr(self, name) for name in _TEXT_FIELDS}
        text["layer_types"] = list(self.layer_types or ())
        text["rope_parameters"] = copy.deepcopy(self.rope_parameters)
        text["model_type"] = f"{self.model_type}_text"
        text["hidden_activation"] = "gelu_pytorch_tanh"
        text["tie_word_embeddings"] = True
        result["text_config"] = (result.get("text_config") or {}) | text
        # Says what the fields above say, and older readers do not know it.
        result["text_config"].pop("per_layer_config", None)
        if self.tower_config is not None:
            vision = dataclasses.asdict(self.tower_config)
            default = {"rope_type": "default", "rope_theta": 100.0}
            vision["rope_parameters"] = vision["rope_parameters"] or default
            vision["model_type"] = "gemma4_vision"
            result["vision_config"] = (result.get("vision_config") or {}) | vision
        result |= {name: getattr(self, name) for name in _MEDIA_IDS}
        result |= {"model_type": self.model_type, "tie_word_embeddings": True}
        result["dtype"] = self.param_dtype.name
        result.pop("torch_dtype", None)
        result.setdefault("architectures", [_ARCHITECTURES[self.model_type]])
        return result

    # ---- What the layers are.

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every decoder layer, settled. Derived at each reading, never stored."""
        first_shared = self.num_hidden_layers - self.num_kv_shared_layers
        specs: list[LayerSpec] = []
        last_of_kind: dict[str, int] = {}
        for index, layer_type in enumerate(self.layer_types or ()):
            full = layer_type == "full_attention"
            shared = index >= first_shared
            if not shared:
                last_of_kind[layer_type] = index
            k_eq_v = self.attention_k_eq_v and full
            rope = (self.rope_parameters or DEFAULT_ROPE)[layer_type]
            kv_heads = self.num_global_key_value_heads if k_eq_v else None
            double = shared and self.use_double_wide_mlp
            specs.append(
                LayerSpec(
                    index=index,
                    kind=parts.KINDS[layer_type],
                    head_dim=(self.global_head_dim or self.head_dim) if full else self.head_dim,
                    num_kv_heads=kv_heads or self.num_key_value_heads,
                    window=None if full else self.sliding_window,
                    rope_theta=float(rope["rope_theta"]),
                    # Of type "default", in sliding layers, transformers reads the theta alone.
                    rope_fraction=float(rope.get("partial_rotary_factor", 1.0)) if full else 1.0,
                    rope_factor=float(rope.get("factor", 1.0)) if full else 1.0,
                    mlp_dim=self.intermediate_size * (2 if double else 1),
                    k_eq_v=k_eq_v and not shared,
                    kv_from=last_of_kind[layer_type] if shared else index,
                    moe=self.enable_moe_block,
                )
            )
        return tuple(specs)

    @property
    def has_vision(self) -> bool:
        """Whether a model of this config owns a vision tower."""
        return self.vision_config is not None

    @property
    def vision_config(self) -> VisionConfig | None:
        """The tower that a model of this config has; None while `text_only`."""
        return None if self.text_only else self.tower_config

    @vision_config.setter
    def vision_config(self, value: VisionConfig | None) -> None:
        self.tower_config = value

    @property
    def tower(self) -> VisionConfig:
        """`vision_config` where there must be one; raises ValueError where there is none."""
        if self.vision_config is None:
            raise ValueError("the model has no vision tower: text_only is True")
        return self.vision_config

    @property
    def experts(self) -> tuple[int, int, int]:
        """`num_experts`, `top_k_experts` and `moe_intermediate_size`; zeros without experts."""
        return self.num_experts or 0, self.top_k_experts or 0, self.moe_intermediate_size or 0

    @property
    def rows_of_embedding(self) -> int:
        """Ids below this have a row in every table that tokens are looked up in."""
        per_layer = self.vocab_size_per_layer_input if self.hidden_size_per_layer_input else None
        return min(self.vocab_size, per_layer or self.vocab_size)

    @property
    def remat(self) -> RematConfig:
        """`remat_config`, in whatever spelling it was given, as a member."""
        return RematConfig.parse(self.remat_config)

    @property
    def attention(self) -> str:
        """`attention_implementation`, or "flash": the kernel for what is compiled for."""
        if self.use_flash_attention and self.attention_implementation == "auto":
            return "flash"
        return self.attention_implementation

    @property
    def wants_kernel(self) -> bool:
        """Whether `attention` asks for a kernel, which takes segments but no caller's mask."""
        return self.attention not in ("auto", "xla")

    @property
    def image_blocks_attend_both_ways(self) -> bool:
        """Whether tokens of one image see each other in sliding layers (12B, 26B-A4B, 31B)."""
        return self.use_bidirectional_attention == "vision"


_FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))
_TEXT_FIELDS = _FIELDS[: _FIELDS.index("model_type")]
_ARCHITECTURES = {
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
}


def _preset(name: str, twin: str):
    """A factory, needing no argument, that reads `presets/<name>.json`."""

    def factory(
        cls: type[ModelConfig], text_only: Any = True, *, sharding_config: Any = None
    ) -> ModelConfig:
        if is_sharding(text_only):  # Tunix's factories take one, and nothing else.
            if sharding_config is not None:
                raise ValueError(f"{twin}: sharding_config is given twice")
            text_only, sharding_config = True, text_only
        if not isinstance(text_only, bool):
            expected = "text_only, True or False, or a ShardingConfig"
            raise ValueError(f"{twin}: expected {expected}, found {text_only!r}")
        if sharding_config is not None:
            check_sharding(sharding_config)
        text = resources.files("tunix_gemma4").joinpath(f"presets/{name}.json").read_text("utf-8")
        return cls.from_hf(json.loads(text), text_only=text_only, shd_config=sharding_config)

    factory.__name__ = twin
    factory.__doc__ = f"""The released {name} configuration, in bfloat16.

    Tunix's own factories give float32: set `dtype` and `param_dtype` of the result for that.

    Args:
        text_only: leave the tower out. Tunix's `ShardingConfig` is taken for `sharding_config`.
        sharding_config: Tunix's default, or None. Where parameters lie follows from the mesh.
    """
    return classmethod(factory)


# Tunix finds a factory by the model's name, so each size has one for either spelling.
for _name in ("e2b", "e4b", "12b", "26b_a4b", "31b"):
    for _twin in (f"gemma4_{_name}", f"gemma4_{_name}_it"):
        setattr(ModelConfig, _twin, _preset(_name, _twin))


def _five_to_one(count: int) -> list[str]:
    """HF's default pattern: five sliding layers, one full, and the last one full."""
    types = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
    types[-1] = "full_attention"
    return types


def _read_fields(cls: type[ModelConfig], source: dict[str, Any]) -> dict[str, Any]:
    """The fields that a parsed `config.json` gives, absent ones with their class's default."""
    model_type: Any = source.get("model_type")
    require_one_of("model_type", model_type, tuple(DEFAULTS))
    if "text_config" in source and source["text_config"] is None:
        raise ValueError("text_config: expected an object, found null")
    text, vision = section(source, "text_config") or {}, section(source, "vision_config")
    parts.refuse_unsupported(model_type, text, vision)
    given = {key: text[key] for key in _TEXT_FIELDS if key in text}
    given |= {name: source[name] for name in _MEDIA_IDS if source.get(name) is not None}
    check_fields(cls, given)
    types = given.get("layer_types")
    if types and types[-1] == "sliding_attention":
        # Transformers does the same, so the weights are those of a full layer.
        logging.warning("layer_types: the last layer is made full_attention.")
        given["layer_types"] = types = [*types[:-1], "full_attention"]
    known = {name: getattr(cls, name) for name in _TEXT_FIELDS} | DEFAULTS[model_type] | given
    settle_layers(known, text, types or _five_to_one(known["num_hidden_layers"]))
    dtype = _float_dtype(*dtype_of(source))
    if source.get("tie_word_embeddings") not in (None, True, False):
        found = source["tie_word_embeddings"]
        raise ValueError(f"tie_word_embeddings: expected true or false, found {found!r}")
    known |= {"model_type": model_type, "dtype": dtype, "param_dtype": dtype, "source": source}
    if model_type == "gemma4" and vision is not None:
        vision = {key: value for key, value in vision.items() if key in _VISION_FIELDS}
        check_fields(VisionConfig, vision, "vision_config.")
        rope = vision.get("rope_parameters") or {}
        # The name of transformers from 5.15 on, which reads the older one too.
        if rope.get("rope_type") == "axial":
            vision["rope_parameters"] = rope | {"rope_type": "default"}
        known["tower_config"] = VisionConfig(**vision)
    return known


def _float_dtype(name: str, value: Any) -> jnp.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype not in _DTYPES:
        raise ValueError(f"{name}: expected bfloat16 or float32, found {value!r}")
    return dtype


# ---- What contradicts itself or is not supported.


def _validate_attention(config: ModelConfig) -> None:
    name = "attention_implementation"
    require_one_of(name, config.attention_implementation, parts.ATTENTION_IMPLEMENTATIONS)
    if config.use_flash_attention and config.attention_implementation == "xla":
        raise ValueError(
            "use_flash_attention: found True with attention_implementation='xla', which "
            "contradict each other; leave one of them at its default"
        )
    if (size := config.flash_attention_block_size) < 128:
        raise ValueError(f"flash_attention_block_size: expected at least 128, found {size}")


def _validate_sharing(config: ModelConfig) -> None:
    shared, count = config.num_kv_shared_layers, config.num_hidden_layers
    if not 0 <= shared < count:
        expected = f"0 to {count - 1} (num_hidden_layers - 1)"
        raise ValueError(f"num_kv_shared_layers: expected {expected}, found {shared}")
    types = config.layer_types or []
    sources = types[: count - shared]
    for index in range(count - shared, count):
        if types[index] not in sources:
            raise ValueError(
                f"num_kv_shared_layers: with {shared} shared layers, layer {index} "
                f"({types[index]}) has no unshared layer of its kind to read from"
            )


def _validate_rope(config: ModelConfig) -> None:
    for layer_type in sorted(set(config.layer_types or ())):
        rope = (config.rope_parameters or {}).get(layer_type)
        name = f"rope_parameters[{layer_type!r}]"
        expected = DEFAULT_ROPE[layer_type]["rope_type"]
        of_kind = isinstance(rope, Mapping) and rope.get("rope_type") == expected
        if rope is None or not of_kind or "rope_theta" not in rope:
            raise ValueError(
                f"{name}: expected rope_type {expected!r} with a rope_theta, found {rope!r}"
            )
        for key in ("rope_theta", "factor", "partial_rotary_factor"):
            wanted = parts.complaint(key, "float", rope.get(key, 1.0))
            if key == "partial_rotary_factor" and wanted is None and rope.get(key, 1.0) > 1:
                wanted = "at most 1"
            if wanted is not None:
                raise ValueError(f"{name}.{key}: expected {wanted}, found {rope[key]!r}")


def _validate_sizes(config: ModelConfig) -> None:
    for spec in config.layers:
        where = f"layer {spec.index} ({spec.kind})"
        if config.num_attention_heads % spec.num_kv_heads:
            raise ValueError(
                f"num_attention_heads: {config.num_attention_heads} is not divisible by the "
                f"{spec.num_kv_heads} key/value heads of {where}"
            )
        if spec.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, found {spec.head_dim} in {where}")
    if config.enable_moe_block:
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            if not (found := getattr(config, name)):
                raise ValueError(f"{name}: enable_moe_block needs it, found {found!r}")
        most, found, _ = config.experts
        if found > most:
            raise ValueError(f"top_k_experts: expected at most num_experts ({most}), found {found}")
    if not config.text_only and config.model_type == "gemma4_unified":
        raise ValueError(
            "text_only=False: model_type 'gemma4_unified' (Gemma 4 12B) is supported for text "
            "only so far; images are supported for model_type 'gemma4' (E2B, E4B, 26B-A4B, 31B)"
        )
    if not config.text_only and config.tower_config is None:
        raise ValueError("text_only=False: this config has no vision_config; use text_only=True")
    if config.tower_config is not None:
        config.tower_config.validate()


def refuse_float16(config: ModelConfig) -> None:
    """Raises ValueError for a model that would compute in it: its range is too small for Gemma."""
    if config.dtype.name != "float16":
        return
    key, found = dtype_of(config.source)
    directory, name = config.source_directory, str(found).removeprefix("torch.")
    where = f"{directory}/config.json: {key}" if directory and name == "float16" else "dtype"
    raise ValueError(
        f"{where}: a model computes in bfloat16 or float32, found float16. Set dtype to one of "
        "these, there or for the run; weights may be stored in float16"
    )


def refuse_ids_beyond(where: str, ids: Mapping[str, int], config: ModelConfig) -> None:
    """Raises ValueError for tokens, found `where`, that have no row in the config's embedding."""
    rows = config.rows_of_embedding
    beyond = {token: index for token, index in ids.items() if index >= rows}
    if beyond:
        token, index = max(beyond.items(), key=lambda item: item[1])
        raise ValueError(
            f"{where}: {len(beyond)} tokens have no row in the embedding, the last of them "
            f"{token!r} with id {index}: there are {rows} rows (vocab_size). Resize it first "
            "(transformers: model.resize_token_embeddings(len(tokenizer)), then save_pretrained), "
            "or take the tokens out of the tokenizer"
        )
