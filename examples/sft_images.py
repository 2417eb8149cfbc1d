# SPDX-License-Identifier: Apache-2.0
"""Teaches a Gemma 4 checkpoint from conversations with images, as an adapter.

    python examples/sft_images.py --model=/path/to/gemma-4-E2B-it --data=train.jsonl \\
        --output=outputs/example

Each line of the data is {"messages": [...]}, a user turn with parts {"type": "image", "image":
"file.png"} and {"type": "text", "text": ...}, then an assistant turn. Run it again with the same
--output after a crash: it goes on from the last checkpoint.

The recipe behind `tunix-gemma4 sft` does the same from a YAML file, and more.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

import tunix_gemma4 as g4
from tunix_gemma4.recipes import RunConfig, make_training_config

_MODEL = flags.DEFINE_string("model", None, "Checkpoint directory.", required=True)
_DATA = flags.DEFINE_string("data", None, "Conversations, .jsonl or .parquet.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the results.", required=True)
_STEPS = flags.DEFINE_integer("steps", 200, "Optimizer steps.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 2, "Rows of one forward pass.")
_MICRO_BATCHES = flags.DEFINE_integer("micro_batches", 4, "Forward passes of one step.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 2048, "Most tokens of a row.")
_MAX_SOFT_TOKENS = flags.DEFINE_integer(
    "max_soft_tokens", None, "Most tokens of an image; None: the checkpoint's own."
)
_RANK = flags.DEFINE_integer("rank", 16, "Of the adapter.")
_TARGETS = flags.DEFINE_string("targets", "language", "language, vision, all, or a regex.")
_QUANTIZE = flags.DEFINE_enum("quantize", None, ["nf4", "int8"], "Of the adapted kernels.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-4, "The highest.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")

    # Conversations become batches; the first row shows what is learnt and what is context.
    processor = g4.Processor.from_pretrained(_MODEL.value, _MAX_SOFT_TOKENS.value)
    batches = g4.make_dataset(
        _DATA.value,
        processor,
        batch_size=_BATCH_SIZE.value,
        gradient_accumulation_steps=_MICRO_BATCHES.value,
        max_length=_MAX_LENGTH.value,
    )
    print(processor.explain(next(iter(batches)), row=0))

    # The released weights, frozen, and an adapter in float32 beside them.
    config = g4.ModelConfig.from_hf(_MODEL.value, text_only=False, remat_config="decoder")
    model = g4.load_checkpoint(_MODEL.value, text_only=False, config=config)
    lora = g4.LoraConfig(
        rank=_RANK.value, alpha=2 * _RANK.value, targets=_TARGETS.value, quantize=_QUANTIZE.value
    )
    model = g4.apply_lora(model, lora)
    print(g4.lora.describe(model))

    # Tunix trains; checkpoints and TensorBoard files go below the output directory.
    schedule = g4.make_schedule(
        "cosine",
        learning_rate=_LEARNING_RATE.value,
        warmup_steps=_STEPS.value // 20,
        total_steps=_STEPS.value,
    )
    settings = RunConfig(
        output_dir=_OUTPUT.value,
        max_steps=_STEPS.value,
        gradient_accumulation_steps=_MICRO_BATCHES.value,
    )
    training_config = make_training_config(settings)
    g4.Gemma4Trainer(model, g4.make_optimizer(schedule), training_config).train(batches)

    # What PEFT and vLLM load.
    adapter = Path(_OUTPUT.value) / "adapter"
    g4.save_adapter(model, adapter)
    print(f"adapter: {adapter}")


if __name__ == "__main__":
    app.run(main)
