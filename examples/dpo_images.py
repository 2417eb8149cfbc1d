# SPDX-License-Identifier: Apache-2.0
"""Teaches a Gemma 4 checkpoint which of two answers about an image is the better one.

    python examples/dpo_images.py --model=/path/to/gemma-4-E2B-it --data=preferences.jsonl \\
        --output=outputs/dpo

Each line of the data is {"prompt": [...], "chosen": [...], "rejected": [...]} as in TRL: the
prompt is a list of messages whose image parts name files, {"type": "image", "image": "file.png"},
and each answer a list of one assistant message. Without --data, scans of handwritten digits are
written below --output, and the right digit is preferred to a wrong one.

DPO holds the answers against those of the model as it was; --algorithm=orpo needs no such
reference and learns the chosen answers as well.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig

import tunix_gemma4 as g4
from tunix_gemma4.data import PreferenceBatches
from tunix_gemma4.recipes import TrainSettings, make_training_config
from tunix_gemma4.testing import digits

_MODEL = flags.DEFINE_string("model", None, "Checkpoint directory.", required=True)
_DATA = flags.DEFINE_string("data", None, "Preferences, .jsonl or .parquet; None: digits.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the results.", required=True)
_ALGORITHM = flags.DEFINE_enum("algorithm", "dpo", ["dpo", "orpo"], "Which loss.")
_BETA = flags.DEFINE_float("beta", 0.1, "How much leaving the reference costs; ORPO's lambda.")
_STEPS = flags.DEFINE_integer("steps", 200, "Optimizer steps.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Preferences of one step.")
_MAX_PROMPT_LENGTH = flags.DEFINE_integer("max_prompt_length", 512, "Most tokens of a prompt.")
_MAX_RESPONSE_LENGTH = flags.DEFINE_integer("max_response_length", 256, "And of an answer.")
_MAX_SOFT_TOKENS = flags.DEFINE_integer(
    "max_soft_tokens", None, "Most tokens of an image; None: the checkpoint's own."
)
_RANK = flags.DEFINE_integer("rank", 16, "Of the adapter.")
_TARGETS = flags.DEFINE_string("targets", "language", "language, vision, all, or a regex.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 5e-5, "The highest.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")

    # Log-probabilities without an array of batch x tokens x vocabulary.
    g4.register()

    output = Path(_OUTPUT.value)
    data = Path(_DATA.value) if _DATA.value else output / "digits.jsonl"
    if not _DATA.value and not data.exists():
        scans, written = digits.write_scans(output)
        digits.write_preferences(data, digits.DIGIT, scans, written)
    processor = g4.Processor.from_pretrained(_MODEL.value, _MAX_SOFT_TOKENS.value)
    batches = PreferenceBatches(
        data,
        processor,
        batch_size=_BATCH_SIZE.value,
        max_prompt_length=_MAX_PROMPT_LENGTH.value,
        max_response_length=_MAX_RESPONSE_LENGTH.value,
        epochs=None,
        log=print,
    )

    # The reference is the model that the adapter is added to; both hold the same arrays.
    config = g4.ModelConfig.from_hf(_MODEL.value, text_only=False, remat_config="decoder")
    reference = g4.load_checkpoint(_MODEL.value, text_only=False, config=config)
    lora = g4.LoraConfig(rank=_RANK.value, alpha=2 * _RANK.value, targets=_TARGETS.value)
    policy = g4.apply_lora(reference, lora)
    print(g4.lora.describe(policy))

    warmup, rate = _STEPS.value // 20, _LEARNING_RATE.value
    schedule = g4.make_schedule(
        "cosine", learning_rate=rate, warmup_steps=warmup, total_steps=_STEPS.value
    )
    training_config = make_training_config(
        TrainSettings(output_dir=str(output), max_steps=_STEPS.value),
        DPOTrainingConfig,
        algorithm=_ALGORITHM.value,
        beta=_BETA.value,
        lambda_orpo=_BETA.value,
    )
    if _ALGORITHM.value == "orpo":
        reference = None
    DPOTrainer(policy, reference, g4.make_optimizer(schedule), training_config).train(batches)

    g4.save_adapter(policy, output / "adapter")
    print(f"adapter: {output / 'adapter'}")


if __name__ == "__main__":
    app.run(main)
