# SPDX-License-Identifier: Apache-2.0
"""A plan beside a real run of the same recipe on this machine's CPU.

    python benchmarks/plan_check.py

Supervised LoRA of a model of some 190 MB on rows of 1,024 tokens. Planned is `tunix_gemma4.plan`'s
total. Real is what lies in arrays between two steps, and how far the process grows above that
during the second, as the kernel counts its pages (Linux).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

import jax
import numpy as np
from flax import nnx

from tunix_gemma4.data.processor import Batch
from tunix_gemma4.model.gemma4 import Gemma4ForConditionalGeneration
from tunix_gemma4.planning.plan import plan
from tunix_gemma4.recipes import common, sft
from tunix_gemma4.settings.sft import load_run_config
from tunix_gemma4.testing.tiny import tiny_hf_config

MB = 1e6
SETTINGS = """
text_only: true
lora: {rank: 8, alpha: 16, targets: language}
scan_layers: true
batch_size: 2
data: {path: unread, max_length: 1024}
max_steps: 2
report_to: none
"""


def write_model(directory: Path) -> None:
    """The config of an E2B in small: hidden size 512, six layers, 32,768 words."""
    source = tiny_hf_config("e2b")
    source["text_config"] |= {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "head_dim": 64,
        "global_head_dim": 128,
        "vocab_size": 32_768,
        "vocab_size_per_layer_input": 32_768,
        "hidden_size_per_layer_input": 64,
        "sliding_window": 256,
    }
    (directory / "config.json").write_text(json.dumps(source))


def process_bytes(name: str) -> int:
    """`VmRSS` or `VmHWM`: pages of this process now, or at most since the mark was reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1])


def real_bytes(trainer, batch: Batch) -> int:
    """Bytes in arrays before a step, and what the step adds at its peak."""
    gc.collect()
    # What compiling left behind goes back to the kernel, so that the step cannot hide in it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    held = sum(array.nbytes for array in jax.live_arrays())
    Path("/proc/self/clear_refs").write_text("5")  # Resets the high-water mark.
    before = process_bytes("VmRSS")
    jax.block_until_ready(trainer(batch))
    return held + process_bytes("VmHWM") - before


def main() -> float:
    """Prints both and returns their ratio."""
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        write_model(directory)
        (directory / "recipe.yaml").write_text(SETTINGS)
        given = [f"model={directory}", f"output_dir={directory}/out"]
        config = load_run_config(directory / "recipe.yaml", given)
        planned = plan(config, "cpu:1", images=0).total
        model_config = common.model_config(config, directory)
        model = Gemma4ForConditionalGeneration(model_config, rngs=nnx.Rngs(0))
        trainer = sft.make_trainer(config, sft.prepare_model(config, model), 2, None)
        del model
        tokens = np.random.default_rng(0).integers(10, 30_000, (2, 1024), np.int32)
        ones = np.ones_like(tokens)
        batch = Batch(tokens, ones, ones, None, np.full(2, 2046, np.float32))
        step, _ = trainer.jit_train_and_eval_step()
        jax.block_until_ready(step(batch))
        real = real_bytes(step, batch)
        trainer.close()
    ratio = real / planned
    print(f"planned {planned / MB:.1f} MB, real {real / MB:.1f} MB: {ratio:.3f} of the plan")
    return ratio


if __name__ == "__main__":
    main()
