# SPDX-License-Identifier: Apache-2.0
"""Teaches a Gemma 4 checkpoint to read images from rewards, with the package's recipe.

    python examples/grpo_images.py --model=/path/to/gemma-4-E2B-it --data=train.jsonl \\
        --output=outputs/grpo_images

Each line of the data is {"messages": [...]}, a user turn with parts {"type": "image", "image":
"file.png"} and {"type": "text", "text": ...}, then an assistant turn, which is not shown to the
model: rewards compare with it. Without --model and --data a tiny checkpoint with random weights
looks at handwritten digits, which shows every part in a minute; `make demo-rl` teaches it them.

Run it again with the same --output after a crash: it goes on from the last checkpoint. The same
settings from recipes are `tunix-gemma4 grpo`; see docs/how-to/recipes.md.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from tunix_gemma4.lora import LoraConfig
from tunix_gemma4.recipes import GrpoRunConfig, PromptConfig, grpo
from tunix_gemma4.testing import build_tiny_checkpoint, digits

_MODEL = flags.DEFINE_string("model", None, "Checkpoint directory; None: a tiny one.")
_DATA = flags.DEFINE_string("data", None, "Conversations, .jsonl or .parquet; None: digits.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the results.", required=True)
_STEPS = flags.DEFINE_integer("steps", 3, "Optimizer steps.")
_PROMPTS = flags.DEFINE_integer("prompts", 4, "Of one step.")
_GENERATIONS = flags.DEFINE_integer("generations", 4, "Completions of a prompt.")
_MAX_PROMPT_LENGTH = flags.DEFINE_integer("max_prompt_length", 96, "Most tokens of a prompt.")
_MAX_LENGTH = flags.DEFINE_integer("max_completion_length", 4, "Most tokens of a completion.")
_MAX_SOFT_TOKENS = flags.DEFINE_integer("max_soft_tokens", 70, "Most tokens of an image.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-5, "The highest.")


def brevity(prompts, completions):
    """A reward of one's own: less for every letter beyond the first."""
    return [1 / max(len(message["content"].strip()), 1) for (message,) in completions]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    output = Path(_OUTPUT.value)
    model, data = _MODEL.value, _DATA.value
    if model is None:
        model = build_tiny_checkpoint(output / "tiny", preset="demo")
    if data is None:
        scans = digits.write_scans(output / "data")
        data = digits.write_task(output / "data", digits.DIGIT, *scans).train

    config = GrpoRunConfig(
        model=str(model),
        output_dir=str(output),
        data=PromptConfig(
            path=str(data),
            max_prompt_length=_MAX_PROMPT_LENGTH.value,
            max_soft_tokens=_MAX_SOFT_TOKENS.value,
        ),
        # One that comes with the package, and one from this file.
        reward_functions=["exact_answer", "__main__:brevity"],
        reward_weights=[1.0, 0.1],
        loss_type="grpo",
        beta=0.01,
        kl_estimator="k3",
        num_generations=_GENERATIONS.value,
        max_completion_length=_MAX_LENGTH.value,
        batch_size=_PROMPTS.value,
        max_steps=_STEPS.value,
        num_train_epochs=None,
        lora=LoraConfig(rank=16, alpha=32, targets="all"),
        learning_rate=_LEARNING_RATE.value,
        log_completions=True,
    )
    result = grpo.run(config)
    print("reward:", result.history("rewards/score/mean"))


if __name__ == "__main__":
    app.run(main)
