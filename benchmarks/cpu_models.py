# SPDX-License-Identifier: Apache-2.0
"""One Gemma 4 shape with the same weights in this package, in Tunix and in transformers.

Each class answers to the same calls, and each call returns when its result is there: `forward`,
`logps`, `step` (LoRA, AdamW) and `decode` (greedy). Tunix's own model knows no images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import torch
import transformers
from flax import nnx
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.numpy import save_file
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.gemma4 import model as tunix_gemma4_model
from tunix.models.gemma4.params_safetensors import create_model_from_safe_tensors
from tunix.rl.common import selective_log_softmax
from tunix.sft import peft_trainer
from tunix.sft import utils as sft_utils

import tunix_gemma4 as g4
from tunix_gemma4.host.optimizer import make_optimizer
from tunix_gemma4.host.trainer import Gemma4Trainer
from tunix_gemma4.model.gemma4 import num_parameters
from tunix_gemma4.tiny import tiny_hf_config
from tunix_gemma4.tiny_weights import random_tensor, tensor_shapes

RANK, ALPHA, RATE = 8, 16.0, 1e-4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BLOCK = ["sliding_attention"] * 4 + ["full_attention"]
# E2B's structure with a third of its width: per-layer inputs, a layer in five full, two thirds of
# the layers with the keys of others and MLPs of twice the width, one key/value head.
TEXT = {
    "vocab_size": 32_768,
    "vocab_size_per_layer_input": 32_768,
    "hidden_size": 512,
    "intermediate_size": 2048,
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
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "layer_types": _BLOCK * 2,
    "num_hidden_layers": 10,
    "num_kv_shared_layers": 5,
}


def write_checkpoint(directory: Path, *, tiny: bool = False) -> Path:
    """Random weights of the shape in Hugging Face's format, norms and scalars included."""
    config = tiny_hf_config("e2b")
    config["text_config"] |= TEXT | (SMALL if tiny else {})
    config["vision_config"] = None
    tensors = {
        name: random_tensor(name, shape, seed=0, plain=False)
        for name, shape in tensor_shapes(config).items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _call(function: Any, model: nnx.Module) -> Any:
    """`function(model, *arrays)` compiled, with the weights as arguments."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, *arrays: function(nnx.merge(graphdef, state), *arrays))
    return lambda *arrays: jax.block_until_ready(compiled(state, *arrays))


class Ours:
    """This package, as its recipes run it.

    Args:
        directory: the checkpoint.
        remat: of the LoRA step.
        scan_layers: stack the layers of forward, log-probabilities and step.
    """

    name = "this package"

    def __init__(self, directory: Path, *, remat: str = "none", scan_layers: bool = False):
        self.base = g4.load_checkpoint(directory)
        self.parameters = num_parameters(self.base)
        self.directory, self.remat, self.scan_layers = directory, remat, scan_layers
        model = self._stacked(nnx.clone(self.base))
        self.forward = _call(lambda model, tokens: model(tokens)[0], model)
        self.logps = _call(self._logps, model)
        self._trainer: Any = None

    def _stacked(self, model: nnx.Module) -> nnx.Module:
        return g4.stack_layers(model) if self.scan_layers else model

    @staticmethod
    def _logps(model: nnx.Module, tokens: jax.Array) -> jax.Array:
        hidden, _ = model(tokens[:, :-1], skip_lm_head=True)
        return g4.losses.per_token_logps(model, hidden, tokens[:, 1:])[0]

    def prepare_step(self) -> None:
        model = g4.load_checkpoint(self.directory)
        config = g4.LoraConfig(rank=RANK, alpha=ALPHA, targets=f".*({'|'.join(PROJECTIONS)})")
        model.config.remat_config = self.remat
        model = self._stacked(g4.apply_lora(model, config))
        optimizer = make_optimizer(optax.constant_schedule(RATE), max_grad_norm=None)
        settings = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=1000)
        self._trainer = Gemma4Trainer(model, optimizer, settings)
        self._step, _ = self._trainer.jit_train_and_eval_step()

    def step(self, tokens: np.ndarray) -> float:
        ones = np.ones_like(tokens)
        loss, *_ = self._step(g4.Batch(tokens=tokens, loss_mask=ones, padding_mask=ones))
        return float(jax.block_until_ready(loss))

    def decode(self, prompts: np.ndarray, count: int) -> np.ndarray:
        ones = np.ones_like(prompts)
        batch = g4.Batch(tokens=prompts, loss_mask=0 * ones, padding_mask=ones)
        return np.asarray(g4.generate(self.base, batch, max_new_tokens=count, stop_ids=[]).tokens)


class _Numbers:
    """A tokenizer for Tunix's sampler: text is token ids with spaces between."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 2

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


class Tunix:
    """Tunix's own Gemma 4 model, with its trainer, default loss and sampler."""

    name = "Tunix"

    def __init__(self, directory: Path):
        self.model = _tunix_model(directory)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model)))
        self.unused = _unused(self.model)
        self.forward = _call(self._logits, self.model)
        self.logps = _call(self._logps, self.model)

    @staticmethod
    def _inputs(tokens: jax.Array) -> dict[str, jax.Array]:
        mask = jnp.ones(tokens.shape, bool)
        return {
            "positions": sft_utils.build_positions_from_mask(mask),
            "attention_mask": sft_utils.make_causal_attn_mask(mask),
        }

    @classmethod
    def _logits(cls, model: nnx.Module, tokens: jax.Array) -> jax.Array:
        return model(tokens, **cls._inputs(tokens))[0]

    @classmethod
    def _logps(cls, model: nnx.Module, tokens: jax.Array) -> jax.Array:
        return selective_log_softmax(cls._logits(model, tokens)[:, :-1], tokens[:, 1:])

    def prepare_step(self) -> None:
        names = "q_einsum|kv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj"
        provider = qwix.LoraProvider(module_path=f".*({names})", rank=RANK, alpha=ALPHA)
        model = qwix.apply_lora_to_model(self.model, provider, **self.model.get_model_input())
        settings = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=1000)
        trainer = peft_trainer.PeftTrainer(model, optax.adamw(RATE), settings)
        trainer.with_gen_model_input_fn(
            lambda batch: batch | self._inputs(batch["input_tokens"])
        )
        self._step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def step(self, tokens: np.ndarray) -> float:
        batch = {"input_tokens": tokens, "input_mask": np.ones_like(tokens)}
        loss, *_ = self._step(batch)
        return float(jax.block_until_ready(loss))

    def decode(self, prompts: np.ndarray, count: int) -> np.ndarray:
        if not hasattr(self, "_sampler"):
            size = prompts.shape[1] + count
            self._sampler = Sampler(self.model, _Numbers(), CacheConfig(size, 1, 1, 1))
        said = self._sampler(
            # The sampler puts the beginning-of-sequence token before each prompt itself.
            [" ".join(map(str, row[1:])) for row in prompts.tolist()],
            max_generation_steps=count,
            max_prompt_length=prompts.shape[1],
            eos_tokens=[-1],
        )
        return np.array([np.asarray(row) for row in said.tokens])


def _tunix_model(directory: Path) -> nnx.Module:
    """Tunix's model with the weights of `directory`."""
    text = json.loads((directory / "config.json").read_text("utf-8"))["text_config"]
    kinds = {
        "sliding_attention": tunix_gemma4_model.AttentionType.LOCAL_SLIDING,
        "full_attention": tunix_gemma4_model.AttentionType.GLOBAL,
    }
    config = tunix_gemma4_model.ModelConfig(
        num_layers=text["num_hidden_layers"],
        num_embed=text["vocab_size"],
        embed_dim=text["hidden_size"],
        hidden_dim=text["intermediate_size"],
        num_heads=text["num_attention_heads"],
        head_dim=text["head_dim"],
        num_kv_heads=text["num_key_value_heads"],
        final_logit_softcap=text["final_logit_softcapping"],
        sliding_window_size=text["sliding_window"],
        per_layer_input_dim=text["hidden_size_per_layer_input"],
        global_key_size=text["global_head_dim"],
        frac_shared_layers=text["num_kv_shared_layers"] / text["num_hidden_layers"],
        override_kv_shared_ffw_hidden=2 * text["intermediate_size"],
        attention_pattern=tuple(kinds[kind] for kind in text["layer_types"][:5]),
    )
    model = create_model_from_safe_tensors(str(directory), config, mode="original")
    # What layers with the keys of others never use is in no checkpoint.
    state = nnx.state(model)
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)  # noqa: E731
    abstract = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    nnx.update(
        model, jax.tree.map(lambda leaf: zeros(leaf) if abstract(leaf) else jnp.asarray(leaf), state)
    )
    return model


def _unused(model: nnx.Module) -> int:
    """Numbers in the key and value projections of layers that have the keys of others."""
    count = 0
    for index, source in enumerate(model.kv_cache_sharing_patterns):
        attention = model.layers[index].attn
        if source != index:
            count += attention.kv_einsum.w.size + attention._key_norm.scale.size
    return count


class Transformers:
    """transformers on torch, with PEFT; attention by scaled_dot_product_attention."""

    name = "transformers"

    def __init__(self, directory: Path):
        self.model = transformers.Gemma4ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.parameters = sum(tensor.numel() for tensor in self.model.parameters())
        scalars = (b for name, b in self.model.named_buffers() if name.endswith("layer_scalar"))
        self.parameters += sum(tensor.numel() for tensor in scalars)
        self.model.generation_config.eos_token_id = None
        self.directory = directory

    @torch.no_grad()
    def forward(self, tokens: np.ndarray) -> np.ndarray:
        return self.model(torch.from_numpy(tokens)).logits.numpy()

    @torch.no_grad()
    def logps(self, tokens: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(tokens)
        logits = self.model(tokens).logits[:, :-1]
        chosen = logits.gather(-1, tokens[:, 1:, None])[..., 0]
        return (chosen - logits.logsumexp(-1)).numpy()

    def prepare_step(self) -> None:
        names = "|".join(PROJECTIONS)
        config = PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=f".*({names})")
        model = transformers.Gemma4ForConditionalGeneration.from_pretrained(
            self.directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        self.trained = get_peft_model(model, config).train()
        weights = [tensor for tensor in self.trained.parameters() if tensor.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)

    def step(self, tokens: np.ndarray) -> float:
        tokens = torch.from_numpy(tokens)
        self.optimizer.zero_grad()
        # Gemma 4 in training asks which tokens are of images.
        kinds = torch.zeros_like(tokens)
        loss = self.trained(tokens, labels=tokens, mm_token_type_ids=kinds).loss
        loss.backward()
        self.optimizer.step()
        return float(loss)

    @torch.no_grad()
    def decode(self, prompts: np.ndarray, count: int) -> np.ndarray:
        tokens = torch.from_numpy(prompts)
        said = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return said[:, prompts.shape[1] :].numpy()
