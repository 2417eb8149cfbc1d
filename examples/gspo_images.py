# SPDX-License-Identifier: Apache-2.0
"""Teaches a Gemma 4 checkpoint from rewards on images that are in memory, with GSPO.

    python examples/gspo_images.py --model=/path/to/gemma-4-26B-A4B-it --output=outputs/gspo_images

GSPO weighs whole completions instead of tokens, which keeps mixtures of experts steady. The task is
drawn here: how many squares does a picture show? Rows have none, one or two pictures, as PIL images
in a column of their own. Without --model a tiny checkpoint with random weights is asked, which
shows every part in a minute. For data in files see `grpo_images.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optax
from absl import app, flags
from PIL import Image, ImageDraw

import tunix_gemma4 as g4
from tunix_gemma4 import recipes
from tunix_gemma4.testing import build_tiny_checkpoint

_MODEL = flags.DEFINE_string("model", None, "Checkpoint directory; None: a tiny one.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the results.", required=True)
_STEPS = flags.DEFINE_integer("steps", 3, "Optimizer steps.")
_PROMPTS = flags.DEFINE_integer("prompts", 4, "Of one step.")
_GENERATIONS = flags.DEFINE_integer("generations", 4, "Completions of a prompt.")
_MAX_LENGTH = flags.DEFINE_integer("max_completion_length", 4, "Most tokens of a completion.")


def picture(squares: int) -> Image.Image:
    image = Image.new("RGB", (32, 32), "white")
    for left in range(0, 8 * squares, 8):
        ImageDraw.Draw(image).rectangle([left + 1, 8, left + 6, 16], "black")
    return image


def batches(seed: int = 0) -> Iterator[dict[str, list]]:
    """Batches without end: prompts, pictures (None, one or a list), and the right answer."""
    draw = np.random.default_rng(seed)
    while True:
        counts = [draw.integers(0, 4, size=draw.integers(0, 3)) for _ in range(_PROMPTS.value)]
        question = {"type": "text", "text": "How many squares are there in all?"}
        yield {
            "prompts": [
                [{"role": "user", "content": [{"type": "image"}] * len(row) + [question]}]
                for row in counts
            ],
            "images": [[picture(count) for count in row] or None for row in counts],
            "answer": [int(row.sum()) for row in counts],
        }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    output = Path(_OUTPUT.value)
    directory = _MODEL.value or build_tiny_checkpoint(output / "tiny", preset="demo")

    # No KL penalty, so no reference: GSPO's clip is narrow enough.
    g4.register()
    processor = g4.Processor.from_pretrained(directory, max_soft_tokens=70)
    mesh = recipes.device_mesh(recipes.MeshConfig(fsdp=1, tp=1))
    model = g4.load_checkpoint(directory, mesh, text_only=False)
    policy = g4.apply_lora(model, g4.LoraConfig(rank=16, alpha=32))
    print(g4.lora.describe(policy))
    settings = recipes.GrpoRunConfig(
        output_dir=str(output),
        data=recipes.PromptConfig(max_prompt_length=256),
        loss_type="gspo",
        num_generations=_GENERATIONS.value,
        epsilon=3e-4,
        epsilon_high=4e-4,
        batch_size=_PROMPTS.value,
        max_completion_length=_MAX_LENGTH.value,
        max_steps=_STEPS.value,
        report_to="none",
    )
    cluster = recipes.make_cluster(
        policy, None, processor, settings, optimizer=optax.adamw(2e-5), mesh=mesh
    )
    rewards = [g4.rewards.numeric_answer, g4.rewards.soft_overlong(max_length=32, buffer=32)]
    learner = recipes.make_learner(cluster, settings, rewards)
    learner.train(batches())
    metrics = cluster.actor_trainer.metrics_logger
    print("reward:", metrics.get_metric_history("rewards", "score/mean", "train"))
    g4.save_adapter(policy, output / "adapter")
    print(f"adapter: {output / 'adapter'}")


if __name__ == "__main__":
    app.run(main)
