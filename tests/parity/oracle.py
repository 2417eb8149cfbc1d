# SPDX-License-Identifier: Apache-2.0
"""Tiny random transformers models of the five shapes, and the tolerance they set.

Everything that a checkpoint stores is random here: norms, scalars, clip bounds (each its own and
tight enough to bite), standardisation, expert scales. What stays at its default in the oracle
would hide a mistake.

Two versions of transformers serve: 5.12.1 and, in an environment of its own (`make
parity-latest`), 5.24. Both are handed prepared masks (`prepared_masks`) for the image blocks of
26B-A4B and 31B: 5.12.1 lets the tokens of an image see each other in full layers too and beyond the
window; 5.24 in sliding layers alone, but there the window limits the past only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

from tunix_gemma4.checkpoint import names as weights
from tunix_gemma4.config import ModelConfig
from tunix_gemma4.model import gemma4

TEXT_SIZES = ("e2b", "e4b", "12b", "26b_a4b", "31b")
IMAGE_SIZES = ("e2b", "e4b", "26b_a4b", "31b")
RELATIVE = 1e-4  # Of the largest value, for a whole model.
PAD, BOS, BOI, IMAGE, EOI, VIDEO, AUDIO = 0, 2, 3, 4, 5, 6, 7
FIRST_WORD, VOCABULARY = 8, 97
WINDOW = 5
LATEST = int(transformers.__version__.split(".")[1]) > 12
PATCHES = 81  # Nine soft tokens of 3 x 3 patches.

SLIDING, FULL = "sliding_attention", "full_attention"
_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_TEXT = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "rope_parameters": _ROPE,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 12.0,
    "hidden_size_per_layer_input": 0,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": 1,
}
_LARGE = {
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "use_bidirectional_attention": "vision",
}
_SHAPES = {
    # The last unshared layer slides, so that the source of shared keys goes by kind, not by
    # position.
    "e2b": {
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "num_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
    },
    "e4b": {
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 12,
    },
    "12b": _LARGE,
    "26b_a4b": _LARGE
    | {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 20,
    },
    "31b": _LARGE | {"num_global_key_value_heads": 2},
}
_SMALL_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 100,
    "use_clipped_linears": True,
    "standardize": False,
}
# Three frequencies to an axis, an odd number as in the released large towers (nine).
_LARGE_TOWER = _SMALL_TOWER | {
    "hidden_size": 36,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 12,
    "use_clipped_linears": False,
    "standardize": True,
}


def our_config(size: str, *, images: bool = False, **fields) -> ModelConfig:
    """The tiny shape named `size`; the 12B shape has text only."""
    text = _TEXT | _SHAPES[size]
    text["num_hidden_layers"] = len(text["layer_types"])
    source = {
        "model_type": "gemma4_unified" if size == "12b" else "gemma4",
        "text_config": text,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "audio_token_id": AUDIO,
        "boi_token_id": BOI,
        "eoi_token_id": EOI,
        "dtype": "float32",
    }
    if images:
        tower = _SMALL_TOWER if size in ("e2b", "e4b") else _LARGE_TOWER
        source["vision_config"] = dict(tower)
    return ModelConfig.from_hf(source, text_only=not images, **fields)


def hf_model(config: ModelConfig, *, seed: int = 0) -> torch.nn.Module:
    """The transformers model of `config`, everything stored in it random."""
    raw = config.to_hf() | {"audio_config": None}
    raw.setdefault("vision_config", None)
    unified = config.model_type == "gemma4_unified"
    config_class = Gemma4UnifiedConfig if unified else Gemma4Config
    model_class = (
        Gemma4UnifiedForConditionalGeneration if unified else (Gemma4ForConditionalGeneration)
    )
    hf_config = config_class(**raw)
    hf_config._attn_implementation = "eager"
    # Default choice of the experts' matmul depends on the machine.
    hf_config._experts_implementation = "eager"
    model = model_class(hf_config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not name.endswith(("inv_freq", "embed_scale", "_min", "_max")):
                tensor.copy_(_random(name, tensor, generator))
        if config.has_vision and config.vision_config.use_clipped_linears:
            _choose_clip_bounds(model, config, generator)
    return model


def _random(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(tensor.shape, generator=generator)
    if "embed_tokens" in name:
        return normal * 0.6
    if name.endswith("position_embedding_table"):
        return normal * 0.5
    if name.endswith("std_bias"):
        return normal
    if name.endswith("router.proj.weight"):
        return normal * 2.0
    if "per_layer_input_gate" in name:
        # Its input is not normed. Far out on GELU's negative side all digits of 1 + tanh cancel,
        # and the norm behind it would blow up what the two libraries' tanh round differently.
        return normal * 0.3 / math.sqrt(tensor.shape[-1])
    if "q_norm" in name or "k_norm" in name:
        # Sharper attention only raises the noise floor.
        return 0.3 + 0.5 * torch.rand(tensor.shape, generator=generator)
    if tensor.ndim == 1:  # Norms, layer_scalar, router scales, std_scale.
        return 0.6 + 0.8 * torch.rand(tensor.shape, generator=generator)
    return normal / math.sqrt(tensor.shape[-1])


def _choose_clip_bounds(model, config: ModelConfig, generator: torch.Generator) -> None:
    """Bounds of each projection, 0.5 to 1.5 deviations of what passes there in one forward."""

    def bounds(x):
        low, high = x.std() * (0.5 + torch.rand(2, generator=generator))
        return -low, high

    def choose(module, arguments):
        (x,) = arguments
        for buffer, value in zip((module.input_min, module.input_max), bounds(x), strict=True):
            buffer.copy_(value)
        y = module.linear(x.clamp(module.input_min, module.input_max))
        for buffer, value in zip((module.output_min, module.output_max), bounds(y), strict=True):
            buffer.copy_(value)

    clipped = [module for name, module in model.named_modules() if hasattr(module, "input_min")]
    assert len(clipped) == 7 * config.vision_config.num_hidden_layers
    hooks = [module.register_forward_pre_hook(choose) for module in clipped]
    image = torch.from_numpy(random_image(6, 6, seed=99))[None]
    image_features(model, image[..., :-2], image[..., -2:].long())
    for hook in hooks:
        hook.remove()


def image_features(hf, pixels: torch.Tensor, places: torch.Tensor):
    """Soft tokens of the images in a row: before and after the projection to the text's width."""
    features = hf.model.get_image_features(pixels, places)
    projected = features.pooler_output
    # From 5.15 on one tensor to an image.
    return features.last_hidden_state, (
        torch.cat(projected) if isinstance(projected, tuple) else projected
    )


# ---- Weights across.


def our_model(config: ModelConfig, hf) -> gemma4.Gemma4ForConditionalGeneration:
    """Our model with the weights of `hf`; every tensor on either side is used exactly once."""
    model = nnx.eval_shape(lambda: gemma4.Gemma4ForConditionalGeneration(config, rngs=nnx.Rngs(0)))
    tensors = {name: tensor.float().numpy() for name, tensor in hf.state_dict().items()}
    tensors.pop("lm_head.weight")
    filled = []
    for name, (path, variable) in weights.named_parameters(model).items():
        array = weights.from_hf(path, tensors.pop(name))
        assert array.shape == variable.shape, name
        filled.append((path, variable.replace(jnp.asarray(array, variable.dtype))))
    nnx.update(model, nnx.from_flat_state(filled))
    for name, buffer in weights.named_buffers(model).items():
        assert tensors[name].shape == buffer.shape, name
        weights.set_buffer(buffer, tensors.pop(name))
    assert not tensors, sorted(tensors)
    return model


# ---- Inputs.


@dataclasses.dataclass
class Inputs:
    """One batch for both sides. `images` [B, I, M, 3 * p * p + 2], zeros and -1 where unused."""

    tokens: np.ndarray
    mask: np.ndarray
    images: np.ndarray | None = None

    @property
    def positions(self) -> np.ndarray:
        return np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)

    @property
    def real(self) -> np.ndarray:
        return self.mask.astype(bool)


def text_inputs(*, seed: int = 1) -> Inputs:
    """Three rows, four windows long; the second has left padding, the third right padding."""
    random = np.random.default_rng(seed)
    tokens = random.integers(FIRST_WORD, VOCABULARY, (3, 4 * WINDOW)).astype(np.int32)
    tokens[:, 0] = BOS
    mask = np.ones_like(tokens)
    mask[1, :6] = 0
    mask[2, -3:] = 0
    tokens[mask == 0] = PAD
    return Inputs(tokens, mask)


def random_image(height: int, width: int, *, seed: int, patch_dim: int = 48) -> np.ndarray:
    """Random patches of a `height` x `width` grid with their (x, y), padded to `PATCHES` rows."""
    image = np.zeros((PATCHES, patch_dim + 2), np.float32)
    image[:, -2:] = -1
    count = height * width
    image[:count, :-2] = np.random.default_rng(seed).random((count, patch_dim))
    y, x = np.mgrid[:height, :width]
    image[:count, -2:] = np.stack([x.ravel(), y.ravel()], axis=-1)
    return image


def image_inputs(*, seed: int = 2) -> Inputs:
    """Rows of 34 slots with images (in soft tokens) of different sizes, most beyond the window.

    Row 0: an image of 6 at slot 0 without a begin token, then one of 8.
    Row 1: seven slots of left padding, then images of 4, 9 and 2.
    Row 2: no images.
    """
    grids = [[(6, 9), (12, 6)], [(6, 6), (9, 9), (3, 6)], []]
    layouts = ["iiiiiitt(iiiiiiii)tttt", "t(iiii)tt(iiiiiiiii)(ii)tttt", "t" * 34]
    return _rows(grids, layouts, seed)


def short_image_inputs(*, seed: int = 2) -> Inputs:
    """The same with images of 4 and 2, which fit in the window."""
    grids = [[(6, 6), (3, 6)], [(6, 6), (6, 6), (3, 6)], []]
    layouts = ["iiiitt(ii)tttt", "t(iiii)tt(iiii)(ii)tttt", "t" * 34]
    return _rows(grids, layouts, seed)


def _rows(grids: list, layouts: list[str], seed: int) -> Inputs:
    random = np.random.default_rng(seed)
    ids = {"i": IMAGE, "(": BOI, ")": EOI}
    tokens = np.zeros((3, 34), np.int32)
    images = np.stack([np.stack([random_image(0, 0, seed=0)] * 4)] * 3)
    for row, layout in enumerate(layouts):
        words = random.integers(FIRST_WORD, VOCABULARY, len(layout))
        line = [ids.get(mark, word) for mark, word in zip(layout, words, strict=True)]
        if row == 0:
            tokens[row, : len(line)] = line
        else:
            tokens[row, -len(line) :] = line
        for slot, (height, width) in enumerate(grids[row]):
            images[row, slot] = random_image(height, width, seed=100 * seed + 10 * row + slot)
    return Inputs(tokens, (tokens != PAD).astype(np.int32), images)


def prepared_masks(config: ModelConfig, inputs: Inputs, dtype=torch.float32) -> dict:
    """Additive masks with this project's meaning, which is that of the authors' own code.

    full = causal; sliding = (causal or same image) and fewer than `window` apart.
    """
    length = inputs.tokens.shape[1]
    apart = np.arange(length)[:, None] - np.arange(length)[None, :]
    soft = inputs.tokens == IMAGE
    block = np.zeros_like(inputs.tokens)
    for row in range(len(block)):
        number = 0
        for slot in range(length):
            number += soft[row, slot] and not (slot and soft[row, slot - 1])
            block[row, slot] = number if soft[row, slot] else 0
    same = (block[:, :, None] == block[:, None, :]) & (block[:, :, None] > 0)
    if config.use_bidirectional_attention != "vision":
        same[:] = False
    keys = inputs.real[:, None, :]
    visible = {
        FULL: (apart >= 0)[None] & keys,
        SLIDING: ((apart >= 0)[None] | same) & (np.abs(apart) < config.sliding_window)[None] & keys,
    }
    lowest = torch.finfo(dtype).min
    return {
        kind: torch.where(torch.from_numpy(mask)[:, None], 0.0, lowest).to(dtype)
        for kind, mask in visible.items()
    }


# ---- Running.


def hf_arguments(config: ModelConfig, inputs: Inputs, dtype=torch.float32) -> dict:
    """Keyword arguments of the transformers model for `inputs`."""
    arguments = {
        "input_ids": torch.from_numpy(inputs.tokens).long(),
        "attention_mask": torch.from_numpy(inputs.mask),
        "position_ids": torch.from_numpy(inputs.positions).long(),
        "use_cache": False,
    }
    if inputs.images is not None:
        used = (inputs.images[..., -1] >= 0).any(axis=-1)
        images = torch.from_numpy(inputs.images[used])
        arguments["pixel_values"] = images[..., :-2]
        arguments["image_position_ids"] = images[..., -2:].long()
        if config.use_bidirectional_attention == "vision":
            arguments["attention_mask"] = prepared_masks(config, inputs, dtype)
    return arguments


def hf_logits(model, config: ModelConfig, inputs: Inputs) -> np.ndarray:
    """Logits at the real tokens, [number of real tokens, V]."""
    with torch.no_grad():
        logits = model(**hf_arguments(config, inputs, model.dtype)).logits
    return logits.float().numpy()[inputs.real]


def our_logits(model, inputs: Inputs) -> np.ndarray:
    """Logits at the real tokens, [number of real tokens, V]."""
    return np.asarray(our_forward(model, inputs), np.float32)[inputs.real]


def our_forward(model, inputs: Inputs):
    """Logits [B, T, V], under jit."""
    tokens = jnp.asarray(inputs.tokens)
    mask = model.get_attention_mask(tokens, inputs_mask=jnp.asarray(inputs.mask))
    images = None if inputs.images is None else jnp.asarray(inputs.images)
    positions = jnp.asarray(inputs.positions)

    @nnx.jit
    def run(model, tokens, positions, mask, images):
        return model(tokens, positions, attention_mask=mask, images=images)[0]

    return run(model, tokens, positions, mask, images)


# ---- Judging.


@contextlib.contextmanager
def perturbed(model, *, seed: int):
    """`model` with every weight moved by a relative 1e-7, about one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=generator))
    try:
        yield model
    finally:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)


def noise_floor(run, model, reference: np.ndarray) -> float:
    """Largest move of `run(model)` under two perturbations of the weights."""
    floor = 0.0
    for seed in (1, 2):
        with perturbed(model, seed=seed):
            floor = max(floor, float(np.abs(run(model) - reference).max()))
    return floor


def log(line: str) -> None:
    """Says what was measured; shown by pytest --log-cli-level=INFO."""
    logging.getLogger(__name__).info(line)


def assert_agrees(what: str, ours: np.ndarray, theirs: np.ndarray, *, noise: float) -> None:
    """Within 1e-4 of the largest value, or three times the noise floor where that is larger."""
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    assert np.isfinite(ours).all(), f"{what}: not finite"
    largest = float(np.abs(theirs).max())
    difference = float(np.abs(ours - theirs).max())
    line = (
        f"{what}: max |difference| {difference:.2e}, relative {difference / largest:.2e}, "
        f"noise floor {noise:.2e}, largest {largest:.3g}"
    )
    log(line)
    assert difference <= max(RELATIVE * largest, 3 * noise), line
