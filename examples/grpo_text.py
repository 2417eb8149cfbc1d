# SPDX-License-Identifier: Apache-2.0
"""Teaches a Gemma 4 checkpoint to answer from rewards, with Tunix's own GRPO learner.

    python examples/grpo_text.py --model=/path/to/gemma-4-E2B-it --data=train.jsonl \\
        --output=outputs/grpo_text

Each line of the data is {"prompt": ..., "answer": "... #### 42"}. Without --model and --data
a tiny checkpoint with random weights is asked for sums, which shows every part in a minute.

The cluster and the learner are Tunix's; `grpo_images.py` does the same through a recipe.
"""

from __future__ import annotations

import json
from pathlib import Path

import optax
from absl import app, flags
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

import tunix_gemma4 as g4
from tunix_gemma4 import rewards
from tunix_gemma4.data import PromptBatches, PromptRows
from tunix_gemma4.recipes import MeshConfig, device_mesh
from tunix_gemma4.testing import build_tiny_checkpoint

_MODEL = flags.DEFINE_string("model", None, "Checkpoint directory; None: a tiny one.")
_DATA = flags.DEFINE_string("data", None, "Prompts and answers, .jsonl; None: sums.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for the results.", required=True)
_STEPS = flags.DEFINE_integer("steps", 3, "Optimizer steps.")
_PROMPTS = flags.DEFINE_integer("prompts", 4, "Of one step.")
_GENERATIONS = flags.DEFINE_integer("generations", 4, "Completions of a prompt.")
_MAX_PROMPT_LENGTH = flags.DEFINE_integer("max_prompt_length", 64, "Most tokens of a prompt.")
_MAX_LENGTH = flags.DEFINE_integer("max_completion_length", 8, "Most tokens of a completion.")


def right_number(prompts, completions, answer):
    """1 for the right number, 0 for another, a little less for none."""
    said = [rewards.read_number(rewards.completion_text(completion)) for completion in completions]
    pairs = zip(said, map(rewards.read_number, answer), strict=True)
    return [-0.1 if number is None else float(number == right) for number, right in pairs]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    output = Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    directory = _MODEL.value or build_tiny_checkpoint(output / "tiny", preset="demo")
    data = Path(_DATA.value or output / "sums.jsonl")
    if _DATA.value is None:
        sums = [{"prompt": f"{a}+{b}=", "answer": f"{a + b}"} for a in range(5) for b in range(5)]
        data.write_text("".join(json.dumps(row) + "\n" for row in sums))

    # Batches of columns: conversations under "prompts", the others for the rewards.
    g4.register()
    processor = g4.Processor.from_pretrained(directory)
    rows = PromptRows(data, processor, max_prompt_length=_MAX_PROMPT_LENGTH.value)
    batches = PromptBatches(rows, _PROMPTS.value, seed=0)

    # The policy is the checkpoint with an adapter; the reference shares its arrays.
    mesh = device_mesh(MeshConfig(fsdp=1, tp=1))
    reference = g4.load_checkpoint(directory, mesh)
    policy = g4.apply_lora(reference, g4.LoraConfig(rank=16, alpha=32))
    print(g4.lora.describe(policy))
    cluster = RLCluster(
        actor=policy,
        reference=reference,
        tokenizer=processor.tokenizer,
        cluster_config=ClusterConfig(
            role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
            training_config=RLTrainingConfig(
                actor_optimizer=optax.adamw(2e-5),
                eval_every_n_steps=1000,
                max_steps=_STEPS.value,
            ),
            rollout_config=RolloutConfig(
                max_prompt_length=_MAX_PROMPT_LENGTH.value,
                max_tokens_to_generate=_MAX_LENGTH.value,
                temperature=1.0,
            ),
        ),
    )
    # k3; the gradient of Tunix's default, k1, does not pull towards the reference.
    config = GRPOConfig(num_generations=_GENERATIONS.value, beta=0.01, kl_loss_mode="low_var_kl")
    GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=right_number).train(batches)

    metrics = cluster.actor_trainer.metrics_logger
    print("reward:", metrics.get_metric_history("rewards", "score/mean", "train"))
    g4.save_adapter(policy, output / "adapter")
    print(f"adapter: {output / 'adapter'}")


if __name__ == "__main__":
    app.run(main)
