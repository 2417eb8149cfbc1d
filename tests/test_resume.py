# SPDX-License-Identifier: Apache-2.0
"""A run that is killed goes on as if nothing had happened.

This file is also the program that is killed: `python test_resume.py CHECKPOINT OUTPUT LOG`.
"""

import collections
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROWS, EPOCHS, STEPS_PER_EPOCH = 24, 2, 3
STEPS = EPOCHS * STEPS_PER_EPOCH
KILLED_IN_STEP = 4  # counted from 0; its first micro-batch is behind it


def conversations():
    return [
        {
            "messages": [
                {"role": "user", "content": f"row {index}"},
                {"role": "assistant", "content": "answer" * (1 + index % 3)},
            ]
        }
        for index in range(ROWS)
    ]


def train(checkpoint, output, *, log, max_steps=STEPS, save_steps=1, die=False):
    """Trains with two micro-batches a step; `log` gets (step, rows) and (step, loss) at once."""
    from tunix_gemma4.checkpoint import load_checkpoint
    from tunix_gemma4.data import make_dataset
    from tunix_gemma4.data.processor import Processor
    from tunix_gemma4.plugin.optimizer import make_optimizer, make_schedule
    from tunix_gemma4.plugin.sft.trainer import Gemma4Trainer
    from tunix_gemma4.plugin.training_config import make_training_config
    from tunix_gemma4.settings.sft import RunConfig

    processor = Processor.from_pretrained(checkpoint, max_soft_tokens=70)

    class Logged(Gemma4Trainer):
        def _prepare_inputs(self, batch):
            texts = [processor.decode(row) for row in batch.tokens]
            log(self.train_steps, [int(re.search(r"row (\d+)", text)[1]) for text in texts])
            in_the_middle = self.iter_steps == 2 * KILLED_IN_STEP + 1
            if die and in_the_middle:
                os.kill(os.getpid(), signal.SIGKILL)
            return super()._prepare_inputs(batch)

        def _log_metrics(self, loss, step=None, additional_metrics=None):
            log(step - 1, float(loss))
            super()._log_metrics(loss, step, additional_metrics)

    dataset = make_dataset(
        conversations(),
        processor,
        batch_size=4,
        max_length=64,
        gradient_accumulation_steps=2,
        num_epochs=EPOCHS,
        seed=1,
    )
    schedule = make_schedule("cosine", learning_rate=1e-3, warmup_steps=2, total_steps=STEPS)
    settings = RunConfig(
        output_dir=str(output),
        max_steps=max_steps,
        gradient_accumulation_steps=2,
        save_steps=save_steps,
        report_to="none",
    )
    config = make_training_config(settings)
    trainer = Logged(load_checkpoint(checkpoint), make_optimizer(schedule), config)
    first = trainer.train_steps
    trainer.train(dataset)
    return first


class Log:
    """Losses and rows by step."""

    def __init__(self):
        self.losses = {}
        self.rows = collections.defaultdict(list)

    def __call__(self, step, value):
        if isinstance(value, list):
            self.rows[step] += value
        else:
            self.losses[step] = value


@pytest.fixture(scope="module")
def unbroken(tiny_checkpoint, tmp_path_factory):
    log = Log()
    train(tiny_checkpoint("demo"), tmp_path_factory.mktemp("unbroken"), log=log)
    assert sorted(log.losses) == list(range(STEPS))
    return log


def assert_every_row_once_per_epoch(rows):
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        seen = sorted(row for step in steps for row in rows[step])
        assert seen == list(range(ROWS))


def test_unbroken_run_sees_every_row_once_per_epoch(unbroken):
    assert_every_row_once_per_epoch(unbroken.rows)
    assert unbroken.rows[0] != unbroken.rows[STEPS_PER_EPOCH]


def test_killed_run_goes_on_with_the_same_losses_and_rows(unbroken, tiny_checkpoint, tmp_path):
    checkpoint, log_file = tiny_checkpoint("demo"), tmp_path / "log.jsonl"
    run = subprocess.run(
        [sys.executable, __file__, checkpoint, tmp_path / "run", log_file],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    killed = Log()
    for line in log_file.read_text().splitlines():
        killed(*json.loads(line))
    assert max(killed.rows) == KILLED_IN_STEP

    resumed = Log()
    first = train(checkpoint, tmp_path / "run", log=resumed)
    # The checkpoint being written when the process died may or may not have become whole.
    assert first in (KILLED_IN_STEP - 1, KILLED_IN_STEP)
    assert resumed.losses == {step: unbroken.losses[step] for step in range(first, STEPS)}
    assert_every_row_once_per_epoch(
        {step: (killed if step < first else resumed).rows[step] for step in range(STEPS)}
    )


def test_last_checkpoint_of_a_finished_run_can_be_trained_on(unbroken, tiny_checkpoint, tmp_path):
    log = Log()
    shared = {"log": log, "save_steps": 100}
    train(tiny_checkpoint("demo"), tmp_path, max_steps=2, **shared)
    assert train(tiny_checkpoint("demo"), tmp_path, **shared) == 2
    assert log.losses == unbroken.losses
    assert log.rows == unbroken.rows


if __name__ == "__main__":
    checkpoint, output, log_path = sys.argv[1:]
    sys.path.insert(0, os.getcwd())
    with open(log_path, "w") as file:

        def write(step, value):
            print(json.dumps([step, value]), file=file, flush=True)

        train(checkpoint, output, log=write, die=True)
