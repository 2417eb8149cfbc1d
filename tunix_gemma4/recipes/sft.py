# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: a checkpoint and conversations in, an adapter or a checkpoint out.

tunix-gemma4 sft lora-image e2b model=gemma-4-E2B-it data.path=train.jsonl
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..data import BatchDataset, make_dataset
from ..data.processor import Processor
from ..model.gemma4 import Gemma4Model
from ..plugin.checkpoints import newest_metadata
from ..plugin.progress import Progress, compiling
from ..plugin.sft.trainer import POSITION, Gemma4Trainer
from ..plugin.training_config import CHECKPOINTS, make_training_config
from ..settings.sft import RunConfig
from . import common
from .common import Result, say
from .compile_cache import fast_start
from .run_directory import Record, check_file, check_key, one_way_out, prepare_output, training

# What a checkpoint depends on: a run that is resumed must have the same.
_FIXED = (
    *("model", "data", "lora", "text_only", "dtype", "scan_layers", "batch_size"),
    *("gradient_accumulation_steps", "seed"),
)
# What of these the saved place in the data depends on.
_POSITION = (
    *("batch_size", "gradient_accumulation_steps", "seed", "data.shuffle", "data.thoughts"),
    *("data.max_length", "data.bucket_lengths", "data.image_buckets"),
)


@fast_start
@one_way_out
def run(config: RunConfig, *, after_eval: Callable[[Gemma4Trainer], None] | None = None) -> Result:
    """Trains as `config` says, resuming a run that was broken off.

    `after_eval` is called with the trainer after each evaluation.
    """
    config = config.on_devices(jax.device_count())
    output = prepare_output(config, _FIXED, _POSITION)
    record = Record(output, config)
    mesh = make_mesh(config)
    processor = common.make_processor(config)
    common.say_of_long_images(config, processor.max_soft_tokens)
    train_ds, eval_ds = make_datasets(config, processor)
    check_datasets(config, output, train_ds, eval_ds)
    position = newest_metadata(output / CHECKPOINTS).get(POSITION)
    if position is not None:  # Before the model is loaded; the trainer looks again.
        train_ds.refuse_other(position)
    say(f"{train_ds.num_rows} rows in {config.data.path}. The first:")
    say(processor.explain(processor.collate([train_ds.first()])))
    say_of_empty_rows(config, train_ds)
    say_of_estimate(config, train_ds)

    model = prepare_model(config, common.load_base(config, mesh))
    record.settle(rows_are_known=train_ds.rows_are_known)
    with record.restoring(_FIXED):
        trainer = make_trainer(
            config,
            model,
            train_ds.num_rows,
            after_eval,
            steps_per_epoch=train_ds.steps_per_epoch(),
            all_checked=train_ds.checked is not None and train_ds.checked.is_whole,
        )
    if trainer.train_steps:
        trainer.refuse_other_data(train_ds)
        common.say_resuming(config, trainer.train_steps, output / CHECKPOINTS)
    record.keep()
    say(compiling("the training step, once for each shape of batch"))
    with training(trainer):
        trainer.train(train_ds, eval_ds)

    saved = common.save(config, model, output)
    common.say_done(config, trainer.train_steps, saved, train_ds.left_out)
    return Result(model, processor, trainer, saved)


def make_mesh(config: RunConfig) -> Mesh | None:
    """Devices as mesh.fsdp x mesh.tp; None for a single one."""
    mesh = common.device_mesh(config.mesh)
    common.warn_of_idle_devices(mesh.size)
    return None if mesh.size == 1 else mesh


def make_datasets(
    config: RunConfig, processor: Processor
) -> tuple[BatchDataset, BatchDataset | None]:
    """Batches to train on, and to evaluate on if `data.eval_path` is given."""
    data = config.data
    same = ("max_length", "bucket_lengths", "image_buckets", "skip_bad_rows")
    shared: dict[str, Any] = {name: getattr(data, name) for name in same}
    shared["batch_size"] = config.batch_size
    train_ds = make_dataset(
        data.path,
        processor,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seed=config.seed,
        shuffle=data.shuffle,
        num_epochs=config.num_train_epochs,
        **shared,
    )
    if data.eval_path is None:
        return train_ds, None
    return train_ds, make_dataset(data.eval_path, processor, num_epochs=1, shuffle=False, **shared)


def check_datasets(
    config: RunConfig, output: Path, train_ds: BatchDataset, eval_ds: BatchDataset | None
) -> None:
    """Reads rows before the model is loaded, as `data.check` says.

    Raises:
        ValueError: naming rows that cannot be read.
    """
    named = (("train", train_ds, config.data.path), ("eval", eval_ds, config.data.eval_path))
    for name, dataset, path in named:
        if dataset is not None and path is not None:
            file, key = check_file(output, name), check_key(config, path)
            dataset.check(config.data.check, log=say, cache=file, key=key)


def prepare_model(
    config: RunConfig, model: Gemma4Model, log: Callable[[str], None] | None = None
) -> Gemma4Model:
    """The checkpoint's model as it is trained; see `common.trainable`."""
    return common.stacked(config, common.trainable(config, model, log))


def make_trainer(
    config: RunConfig,
    model: Gemma4Model,
    num_rows: int,
    after_eval: Callable[[Gemma4Trainer], None] | None,
    *,
    steps_per_epoch: int | None = None,
    all_checked: bool = False,
) -> Gemma4Trainer:
    """The trainer with its optimizer; it restores the latest checkpoint, if there is one."""
    steps = config.total_steps(num_rows, steps_per_epoch)
    estimated = not all_checked and steps != config.max_steps
    return Gemma4Trainer(
        model,
        common.optimizer_of(config, steps),
        make_training_config(config),
        logging_steps=config.logging_steps,
        log=say,
        after_eval=after_eval,
        progress=Progress(steps, steps_per_epoch, estimated=estimated),
    )


def say_of_empty_rows(config: RunConfig, train_ds: BatchDataset) -> None:
    """Says so where an epoch has fewer rows than a batch, or a step, which nothing can fill."""
    rows = 0 if train_ds.checked is None else train_ds.checked.examples
    batches = config.gradient_accumulation_steps
    step = config.batch_size * batches
    if not 0 < rows < step:
        return
    size = f"batch_size={config.batch_size}"
    if batches > 1:
        size += f" x gradient_accumulation_steps={batches} is {step} rows a step, which"
    say(
        f"{size} is more than the {rows} rows to train on: a step takes all of them, and the other "
        f"{step - rows} are computed empty."
    )


def say_of_estimate(config: RunConfig, train_ds: BatchDataset) -> None:
    """Says where the epochs end first, and where the rate ends with rows that are not yet read."""
    whole = train_ds.checked is not None and train_ds.checked.is_whole
    steps = config.total_steps(train_ds.num_rows, train_ds.steps_per_epoch())
    common.say_of_epochs(config, steps, "" if whole else "about ")
    if config.max_steps is None and config.lr_scheduler_type != "constant" and not whole:
        say(
            f"The learning rate is planned for about {steps} steps, because not all rows were "
            "checked; data.check=all makes it exact."
        )
