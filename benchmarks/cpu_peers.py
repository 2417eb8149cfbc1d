# SPDX-License-Identifier: Apache-2.0
"""Tunix's own Gemma 4 and transformers with PEFT, answering to the calls of `cpu_models.Ours`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import qwix
import torch
import transformers
from cpu_models import ALPHA, PROJECTIONS, RANK, RATE, Inputs, compiled, read_config
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.gemma4 import model as gemma4
from tunix.models.gemma4.params_safetensors import create_model_from_safe_tensors
from tunix.rl.common import selective_log_softmax
from tunix.sft import peft_trainer, utils as sft_utils

from tunix_gemma4.config import ModelConfig


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
    """Tunix's own Gemma 4 model, its trainer with its default loss, its sampler. Text only."""

    name = "Tunix"

    def __init__(self, directory: Path):
        self._model = _tunix_model(directory)
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self._model)))
        self.parameters = count - _unused(self._model)
        self.forward = compiled(self._logits, self._model)
        self.logps = compiled(self._logps, self._model)
        self._sampler: Sampler | None = None

    @staticmethod
    def _masks(tokens: jax.Array) -> dict[str, jax.Array]:
        """The inputs that Tunix's examples make for rows without padding."""
        mask = jnp.ones(tokens.shape, bool)
        return {
            "positions": sft_utils.build_positions_from_mask(mask),
            "attention_mask": sft_utils.make_causal_attn_mask(mask),
        }

    @classmethod
    def _logits(cls, model: nnx.Module, tokens: jax.Array, images: None) -> jax.Array:
        del images
        return model(tokens, **cls._masks(tokens))[0]

    @classmethod
    def _logps(cls, model: nnx.Module, tokens: jax.Array, images: None) -> jax.Array:
        logits = cls._logits(model, tokens, images)
        return selective_log_softmax(logits[:, :-1], tokens[:, 1:])

    def prepare_step(self) -> None:
        names = "q_einsum|kv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj"
        provider = qwix.LoraProvider(module_path=f".*({names})", rank=RANK, alpha=ALPHA)
        model = qwix.apply_lora_to_model(self._model, provider, **self._model.get_model_input())
        settings = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=1000)
        trainer = peft_trainer.PeftTrainer(model, optax.adamw(RATE, weight_decay=0.0), settings)
        trainer.with_gen_model_input_fn(lambda batch: batch | self._masks(batch["input_tokens"]))
        self._step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def step(self, inputs: Inputs) -> float:
        ones = np.ones_like(inputs.tokens)
        loss, *_ = self._step({"input_tokens": inputs.tokens, "input_mask": ones})
        return float(jax.block_until_ready(loss))

    def decode(self, inputs: Inputs, count: int) -> np.ndarray:
        length = inputs.tokens.shape[1]
        if self._sampler is None:
            cache = CacheConfig(length + count, 1, 1, 1)
            self._sampler = Sampler(self._model, _Numbers(), cache)
        said = self._sampler(
            # The sampler puts the beginning-of-sequence token before each prompt itself.
            [" ".join(map(str, row[1:])) for row in inputs.tokens.tolist()],
            max_generation_steps=count,
            max_prompt_length=length,
            eos_tokens=[-1],
        )
        return np.array([np.asarray(row) for row in said.tokens])


def _tunix_model(directory: Path) -> nnx.Module:
    """Tunix's model with the weights of `directory`."""
    ours: ModelConfig = read_config(directory)
    kinds = {
        "sliding_attention": gemma4.AttentionType.LOCAL_SLIDING,
        "full_attention": gemma4.AttentionType.GLOBAL,
    }
    config = gemma4.ModelConfig(
        num_layers=ours.num_hidden_layers,
        num_embed=ours.vocab_size,
        embed_dim=ours.hidden_size,
        hidden_dim=ours.intermediate_size,
        num_heads=ours.num_attention_heads,
        head_dim=ours.head_dim,
        num_kv_heads=ours.num_key_value_heads,
        final_logit_softcap=ours.final_logit_softcapping,
        sliding_window_size=ours.sliding_window,
        per_layer_input_dim=ours.hidden_size_per_layer_input,
        global_key_size=ours.global_head_dim,
        frac_shared_layers=ours.num_kv_shared_layers / ours.num_hidden_layers,
        override_kv_shared_ffw_hidden=2 * ours.intermediate_size,
        attention_pattern=tuple(kinds[kind] for kind in ours.layer_types),
    )
    # Its default loader refuses a checkpoint that lacks what shared layers never use; this one
    # leaves that empty.
    model = create_model_from_safe_tensors(str(directory), config, mode="original")

    def filled(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(leaf)

    nnx.update(model, jax.tree.map(filled, nnx.state(model)))
    return model


def _unused(model: nnx.Module) -> int:
    """Numbers in the key and value projections of layers that read the keys of others."""
    attentions = [
        model.layers[index].attn
        for index, source in enumerate(model.kv_cache_sharing_patterns)
        if source != index
    ]
    return sum(a.kv_einsum.w.size + a._key_norm.scale.size for a in attentions)


class Transformers:
    """transformers on torch, with PEFT; attention by `scaled_dot_product_attention`."""

    name = "transformers"

    def __init__(self, directory: Path):
        self._directory, self._config = directory, read_config(directory)
        self._model = self._load().eval()
        parameters = sum(tensor.numel() for tensor in self._model.parameters())
        scalars = {
            name: tensor for name, tensor in self._model.state_dict().items()
            if name.endswith(("layer_scalar", "_min", "_max"))
        }  # fmt: skip
        self.parameters = parameters + sum(tensor.numel() for tensor in scalars.values())
        # As every side here, it stops at the count alone.
        self._model.generation_config.eos_token_id = None

    def _load(self) -> torch.nn.Module:
        return transformers.Gemma4ForConditionalGeneration.from_pretrained(
            self._directory, dtype=torch.float32, attn_implementation="sdpa"
        )

    def _arguments(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(inputs.tokens).long()
        kinds = (tokens == self._config.image_token_id).int()
        found = {"input_ids": tokens, "mm_token_type_ids": kinds}
        if inputs.images is not None:
            patches = torch.from_numpy(inputs.images).flatten(0, 1)
            found["pixel_values"] = patches[..., :-2]
            found["image_position_ids"] = patches[..., -2:].long()
        return found

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> np.ndarray:
        return self._model(**self._arguments(inputs)).logits.numpy()

    @torch.no_grad()
    def logps(self, inputs: Inputs) -> np.ndarray:
        arguments = self._arguments(inputs)
        logits = self._model(**arguments).logits[:, :-1]
        chosen = logits.gather(-1, arguments["input_ids"][:, 1:, None])[..., 0]
        return (chosen - logits.logsumexp(-1)).numpy()

    def prepare_step(self) -> None:
        names = "|".join(PROJECTIONS)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=rf".*language_model\.layers\..*({names})"
        )
        self._trained = peft.get_peft_model(self._load(), config).train()
        weights = [tensor for tensor in self._trained.parameters() if tensor.requires_grad]
        self._optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)

    def step(self, inputs: Inputs) -> float:
        arguments = self._arguments(inputs)
        self._optimizer.zero_grad()
        loss = self._trained(**arguments, labels=arguments["input_ids"]).loss
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def decode(self, inputs: Inputs, count: int) -> np.ndarray:
        arguments = self._arguments(inputs)
        said = self._model.generate(
            **arguments,
            attention_mask=torch.ones_like(arguments["input_ids"]),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return said[:, inputs.tokens.shape[1] :].numpy()
