# SPDX-License-Identifier: Apache-2.0
"""Five steps of SFT, GRPO and DPO with images on another Tunix, against the installed one.

Run by hand, with a checkout of google/tunix (Python 3.11, about five minutes):

    TUNIX_CHECKOUT=../tunix python tests/tunix_versions.py

It says which commit it saw, and ends with 1 where a loss differs by more than 1e-5.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "TUNIX_CHECKOUT"
TOLERANCE = 1e-5
STEPS = 5


def main():
    checkout = os.environ.get(VARIABLE)
    if checkout is None or not (Path(checkout) / "tunix").is_dir():
        print(f"{VARIABLE}: expected the folder of a checkout of google/tunix, found {checkout!r}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        expected = run(folder, "installed", [ROOT])
        found = run(folder, "checkout", [Path(checkout).resolve(), ROOT])
    print(f"Expected of {expected.pop('host')}, found with {found.pop('host')}, {commit(checkout)}")
    largest = 0.0
    for name, losses in expected.items():
        others = found[name]
        assert len(losses) == len(others) == STEPS, (name, losses, others)
        difference = max(abs(a - b) for a, b in zip(losses, others, strict=True))
        print(f"{name}: largest difference {difference:.1e} of losses {losses}")
        largest = max(largest, difference)
    return int(not largest <= TOLERANCE)


def commit(checkout):
    found = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "commit unknown: no .git"


def run(folder, name, path):
    """The losses with `path` as PYTHONPATH."""
    output = Path(folder) / name
    output.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    environment.setdefault("JAX_PLATFORMS", "cpu")
    subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(output)], env=environment, check=True
    )
    return json.loads((output / "losses.json").read_text())


def measure(output):
    import tunix_gemma4
    from tunix_gemma4.plugin.version import found
    from tunix_gemma4.testing.digits import DIGIT, write_scans, write_task
    from tunix_gemma4.testing.tiny import build_tiny_checkpoint

    tunix_gemma4.register()
    model = build_tiny_checkpoint(output / "model", preset="demo")
    data = write_task(output, DIGIT, *write_scans(output))
    losses = {
        "host": str(found()),
        "SFT": sft_losses(model, data, output / "sft"),
        "GRPO": grpo_losses(model, data, output / "grpo"),
        "DPO": dpo_losses(model, data),
    }
    (output / "losses.json").write_text(json.dumps(losses))


def sft_losses(model, data, output):
    from tunix_gemma4.lora import LoraConfig
    from tunix_gemma4.recipes import sft
    from tunix_gemma4.settings.sft import DataConfig, RunConfig

    config = RunConfig(
        model=str(model),
        output_dir=str(output),
        data=DataConfig(
            path=str(data.train), max_length=96, bucket_lengths=[96], image_buckets=[1]
        ),
        lora=LoraConfig(rank=4, alpha=8),
        batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
    )
    return sft.run(config).trainer.history("loss")


def grpo_losses(model, data, output):
    from tunix_gemma4.lora import LoraConfig
    from tunix_gemma4.recipes import grpo
    from tunix_gemma4.settings.grpo import GrpoRunConfig, PromptConfig

    config = GrpoRunConfig(
        model=str(model),
        output_dir=str(output),
        data=PromptConfig(path=str(data.train), max_prompt_length=96),
        lora=LoraConfig(rank=4, alpha=8),
        reward_functions=[f"{Path(__file__).resolve()}:early_letters"],
        num_generations=4,
        max_completion_length=6,
        batch_size=4,
        train_micro_batch_size=2,
        beta=0.1,
        max_steps=STEPS,
        learning_rate=1e-2,
    )
    return grpo.run(config).history("actor/loss")


def early_letters(completions, **columns):
    """The share of letters before m, which a tiny model's random words have some of."""
    texts = [said if isinstance(said, str) else said[0]["content"] for said in completions]
    return [sum(c.lower() < "m" for c in text) / max(len(text), 1) for text in texts]


def dpo_losses(model, data):
    import optax
    from tunix.sft.dpo import dpo_trainer

    from tunix_gemma4 import LoraConfig, Processor, apply_lora, load_checkpoint
    from tunix_gemma4.data.preferences import collate, read_preference

    processor = Processor.from_pretrained(model)
    rows = [json.loads(line) for line in Path(data.train).read_text().splitlines()[:8]]
    read = []
    for row in rows:
        question, answer = row["messages"]
        for part in question["content"]:
            if part["type"] == "image":
                part["image"] = str(Path(data.train).parent / part["image"])
        pair = {"prompt": [question], "chosen": answer["content"], "rejected": "none"}
        read.append(read_preference(pair, processor))
    lengths = {"max_prompt_length": 96, "max_response_length": 8}
    batches = [collate(read[i : i + 4], processor, **lengths) for i in (0, 4)]
    reference = load_checkpoint(model, text_only=False)
    policy = apply_lora(reference, LoraConfig(rank=4, alpha=8))
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=100, max_steps=STEPS, beta=0.1)
    trainer = dpo_trainer.DPOTrainer(policy, reference, optax.adam(3e-3), config)
    trainer.train((batches * STEPS)[:STEPS])
    return trainer.metrics_logger.get_metric_history("", "loss", "train").tolist()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
    else:
        sys.exit(main())
