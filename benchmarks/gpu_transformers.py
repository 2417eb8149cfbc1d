# SPDX-License-Identifier: Apache-2.0
"""transformers with PEFT for `gpu_speed`: random weights, bfloat16, on the GPU."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np


def missing(tiny: bool, quantize: str | None) -> str | None:
    """What this side lacks, or None."""
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    if not tiny and not torch.cuda.is_available():
        return "torch sees no GPU"
    if quantize and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes, for its base of 4 bits, is not installed"
    return None


def work(
    row: dict[str, Any], config: Any, options: argparse.Namespace, *, rank: int, alpha: float
) -> Callable[..., Any]:
    """`work(tokens, count)` that decodes, or `work(tokens)` that trains, and waits for the end."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _model(config, device, quantize=row["work"] == "step" and row["size"] == "31b")
    if row["work"] == "decode":
        return _decode(model.eval(), device)
    return _step(model, device, rank=rank, alpha=alpha)


def _model(config: Any, device: str, *, quantize: bool) -> Any:
    import torch
    import transformers

    raw = config.to_hf() | {"vision_config": None, "audio_config": None}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.Gemma4ForConditionalGeneration(transformers.Gemma4Config(**raw))
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return _quantized(model) if quantize else model


def _quantized(model: Any) -> Any:
    """Projections of the decoder as nf4, in place."""
    import bitsandbytes as bnb
    import torch
    from cpu_models import PROJECTIONS

    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in PROJECTIONS and isinstance(module, torch.nn.Linear):
            new = bnb.nn.Linear4bit(
                *(module.in_features, module.out_features),
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
            setattr(model.get_submodule(parent), leaf, new.to("cuda"))
    return model


def _decode(model: Any, device: str) -> Callable[..., Any]:
    import torch

    @torch.no_grad()
    def decode(tokens: np.ndarray, count: int) -> np.ndarray:
        ids = torch.from_numpy(tokens).long().to(device)
        said = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return said.cpu().numpy()

    return decode


def _step(model: Any, device: str, *, rank: int, alpha: float) -> Callable[..., Any]:
    import peft
    import torch
    from cpu_models import PROJECTIONS

    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    names = "|".join(PROJECTIONS)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=rf".*language_model\.layers\..*({names})"
    )
    model = peft.get_peft_model(model, config).train()
    weights = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0)

    def step(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens).long().to(device)
        optimizer.zero_grad()
        loss = model(ids, labels=ids, mm_token_type_ids=torch.zeros_like(ids)).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step
