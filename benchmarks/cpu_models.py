# SPDX-License-Identifier: Apache-2.0
"""One Gemma 4 shape on disk, inputs for it, and this package running it; `cpu_peers` has others.

Every class of the two files answers to the same calls, and each call returns when its result is
there: `forward`, `logps`, `step` (LoRA, AdamW; after `prepare_step`) and `decode` (greedy).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tunix.sft import peft_trainer

import tunix_gemma4 as g4
from tunix_gemma4.model.gemma4 import num_parameters
from tunix_gemma4.plugin.optimizer import make_optimizer
from tunix_gemma4.plugin.sft.trainer import Gemma4Trainer
from tunix_gemma4.testing.tiny import random_tensor, tensor_shapes, tiny_hf_config
from tunix_gemma4.testing.tokenizer import VOCAB_SIZE

RANK, ALPHA, RATE = 8, 16.0, 1e-4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = rf"language_model\.layers\.\d+\.\w+\.({'|'.join(PROJECTIONS)})"
_BLOCK = ["sliding_attention"] * 4 + ["full_attention"]
# E2B's structure with a third of its width: per-layer inputs, a layer in five full, two thirds of
# the layers with the keys of others and MLPs of twice the width, one key/value head.
TEXT = {
    "vocab_size": 32_768,
    "vocab_size_per_layer_input": 32_768,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 512,
    "layer_types": _BLOCK * 3,
    "num_hidden_layers": 15,
    "num_kv_shared_layers": 10,
    "hidden_size_per_layer_input": 64,
    "max_position_embeddings": 16_384,
}
SMALL = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "layer_types": _BLOCK[-2:] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
# Likewise E2B's tower with a third of its width and 6 of its 16 layers.
VISION = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "patch_size": 16,
}
# Soft tokens of an image: columns and rows. With its two markers it takes 72 tokens, tiny 8.
GRID, SMALL_GRID = (10, 7), (3, 2)


class Inputs(NamedTuple):
    """A batch without padding.

    Attributes:
        tokens: int32 [B, T].
        images: float32 [B, I, M, C], or None.
    """

    tokens: np.ndarray
    images: np.ndarray | None = None


def write_checkpoint(directory: Path, *, tiny: bool = False, images: bool = False) -> Path:
    """Random weights of the shape in Hugging Face's format, with a vision tower or without."""
    config = tiny_hf_config("e2b")
    config["text_config"] |= TEXT | (SMALL if tiny else {})
    config["vision_config"] = config["vision_config"] | ({} if tiny else VISION) if images else None
    tensors = {
        name: random_tensor(name, shape, seed=0, plain=True)
        for name, shape in tensor_shapes(config).items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def read_config(directory: Path) -> g4.ModelConfig:
    """The config of a checkpoint, with its tower if it has one."""
    config = g4.ModelConfig.from_hf(directory)
    config.text_only = config.tower_config is None
    return config


def draw_inputs(config: g4.ModelConfig, rows: int, length: int, images: int = 0) -> Inputs:
    """Random words, none of them special, behind `images` images in every row."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCAB_SIZE, config.vocab_size, (rows, length), dtype=np.int32)
    tokens[:, 0] = config.bos_token_id
    if not images:
        return Inputs(tokens)
    vision = config.tower_config
    columns, lines = SMALL_GRID if vision.patch_size < 16 else GRID
    soft = [config.image_token_id] * (columns * lines)
    block = [config.boi_token_id, *soft, config.eoi_token_id] * images
    if len(block) >= length:
        raise ValueError(f"{images} images take {len(block)} tokens of a row of {length}")
    tokens[:, 1 : 1 + len(block)] = block
    kernel = vision.pooling_kernel_size
    y, x = np.mgrid[: lines * kernel, : columns * kernel]
    patches = rng.random((rows, images, x.size, vision.patch_dim + 2), np.float32)
    patches[..., -2], patches[..., -1] = x.ravel(), y.ravel()
    return Inputs(tokens, patches)


def compiled(function: Callable[..., Any], model: nnx.Module) -> Callable[[Inputs], jax.Array]:
    """`function(model, *inputs)` with the weights as arguments."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, *arrays: function(nnx.merge(graphdef, state), *arrays))
    return lambda inputs: jax.block_until_ready(call(state, *inputs))


def lora_step(
    model: nnx.Module, lora: g4.LoraConfig, *, scan_layers: bool
) -> Callable[[Inputs], float]:
    """The recipes' training step, on new adapters of `model`: inputs to the loss before it."""
    model = g4.apply_lora(model, lora)
    optimizer = make_optimizer(optax.constant_schedule(RATE), max_grad_norm=None)
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=1000)
    trainer = Gemma4Trainer(g4.stack_layers(model) if scan_layers else model, optimizer, settings)
    compiled_step, _ = trainer.jit_train_and_eval_step()

    def step(inputs: Inputs) -> float:
        ones = np.ones_like(inputs.tokens)
        batch = g4.Batch(
            tokens=inputs.tokens, loss_mask=ones, padding_mask=ones, images=inputs.images
        )
        loss, *_ = compiled_step(batch)
        return float(jax.block_until_ready(loss))

    return step


class Ours:
    """This package, as its recipes run it.

    Args:
        directory: the checkpoint.
        remat: of the LoRA step.
        scan_layers: stack the layers of forward, log-probabilities and step.

    Attributes:
        parameters: how many there are.
        factors: how many of them multiply each token.
    """

    name = "this package"

    def __init__(self, directory: Path, *, remat: str = "none", scan_layers: bool = False):
        self._directory, self._remat, self._scan_layers = directory, remat, scan_layers
        self._base = self._load()
        self.parameters = num_parameters(self._base)
        linears = [m for _, m in nnx.iter_modules(self._base) if isinstance(m, nnx.Linear)]
        table = self._base.language_model.embed_tokens.embedding  # The head's too.
        self.factors = sum(linear.kernel.size for linear in linears) + table.size
        model = nnx.clone(self._base)
        model = g4.stack_layers(model) if scan_layers else model
        self.forward = compiled(self._logits, model)
        self.logps = compiled(self._logps, model)

    def _load(self) -> nnx.Module:
        text_only = read_config(self._directory).text_only
        return g4.load_checkpoint(self._directory, text_only=text_only)

    @staticmethod
    def _logits(model: nnx.Module, tokens: jax.Array, images: jax.Array | None) -> jax.Array:
        return model(tokens, images=images)[0]

    @staticmethod
    def _logps(model: nnx.Module, tokens: jax.Array, images: jax.Array | None) -> jax.Array:
        hidden, _ = model(tokens[:, :-1], images=images, skip_lm_head=True)
        return g4.losses.per_token_logps(model, hidden, tokens[:, 1:])[0]

    def prepare_step(self) -> None:
        """Makes adapters and an optimizer; `step` compiles when first called."""
        model = self._load()
        model.config.remat_config = self._remat
        lora = g4.LoraConfig(rank=RANK, alpha=ALPHA, targets=TARGETS)
        self._step = lora_step(model, lora, scan_layers=self._scan_layers)

    def step(self, inputs: Inputs) -> float:
        """One optimizer step on every token that is predicted; the loss before it."""
        return self._step(inputs)

    def decode(self, inputs: Inputs, count: int) -> np.ndarray:
        """`count` tokens more of every row, int [B, count]."""
        ones = np.ones_like(inputs.tokens)
        batch = g4.Batch(
            tokens=inputs.tokens, loss_mask=0 * ones, padding_mask=ones, images=inputs.images
        )
        return np.asarray(g4.generate(self._base, batch, max_new_tokens=count, stop_ids=[]).tokens)
