# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: a checkpoint and conversations in, an adapter or a checkpoint out.

tunix-gemma4 sft configs/sft/e2b_lora_image.yaml model=gemma-4-E2B-it data.path=train.jsonl
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.sharding import AxisType, Mesh

from ..checkpoint import load_checkpoint, save_checkpoint
from ..config import ModelConfig
from ..data import BatchDataset, make_dataset
from ..data_sources import Rows
from ..host.optimizer import make_optimizer, make_schedule
from ..host.settings import CHECKPOINTS, make_training_config
from ..host.trainer import Gemma4Trainer
from ..lora import LoraConfig, apply_lora, merge_lora, save_adapter
from ..model.gemma4 import num_parameters
from ..processor import Processor
from .run_config import RunConfig, load_run_config, to_yaml

ADAPTER, MODEL, SETTINGS = "adapter", "model", "run_config.yaml"

# What a checkpoint depends on: a run that is resumed must have the same.
_FIXED = (
    *("model", "data", "lora", "text_only", "dtype", "batch_size"),
    *("gradient_accumulation_steps", "seed"),
)


@dataclasses.dataclass
class Result:
    """What a run leaves.

    Attributes:
        model: trained, as it was trained.
        processor: for its prompts.
        trainer: holds the metrics; see `Gemma4Trainer.history`.
        saved: directories that were written.
    """

    model: nnx.Module
    processor: Processor
    trainer: Gemma4Trainer
    saved: list[Path]


def run(config: RunConfig, *, after_eval: Callable[[Gemma4Trainer], None] | None = None) -> Result:
    """Trains as `config` says, resuming a run that was broken off.

    Args:
        config: the settings.
        after_eval: called with the trainer after each evaluation.
    """
    config.validate()
    output = prepare_output(config)
    mesh = make_mesh(config)
    processor = Processor.from_pretrained(config.model, config.data.max_soft_tokens)
    train_ds, eval_ds = make_datasets(config, processor)
    say(f"{train_ds.num_rows} rows in {config.data.path}. The first:")
    say(first_row(config, processor))

    model = load_model(config, mesh)
    trainer = make_trainer(config, model, train_ds.num_rows, after_eval)
    if trainer.train_steps:
        say(f"Resuming after step {trainer.train_steps} from {output / CHECKPOINTS}.")
    trainer.train(train_ds, eval_ds)

    saved = save(config, model, output)
    say(f"{trainer.train_steps} steps done. Saved: {', '.join(map(str, saved))}")
    return Result(model, processor, trainer, saved)


def prepare_output(config: RunConfig) -> Path:
    """Makes the output directory, unless it holds what must not be overwritten or mixed."""
    output = Path(config.output_dir)
    finished = [name for name in (ADAPTER, MODEL) if (output / name).exists()]
    if finished:
        raise ValueError(
            f"{output}: it holds a finished run ({', '.join(finished)}/). Choose another "
            "output_dir, or remove these to train on from the last checkpoint"
        )
    checkpoints, settings = output / CHECKPOINTS, output / SETTINGS
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        if not config.resume_from_checkpoint:
            raise ValueError(
                f"{checkpoints}: there are checkpoints, and resume_from_checkpoint is false. "
                "Choose another output_dir, remove them, or resume"
            )
        if settings.is_file():
            earlier = load_run_config(settings)
            changed = [key for key in _FIXED if vars(earlier)[key] != vars(config)[key]]
            if changed:
                raise ValueError(
                    f"{checkpoints}: they belong to a run with another {', '.join(changed)} (see "
                    f"{settings}). Choose another output_dir, remove them, or set these back"
                )
    if jax.process_index() == 0:
        output.mkdir(parents=True, exist_ok=True)
        settings.write_text(to_yaml(config), "utf-8")
    return output


def make_mesh(config: RunConfig) -> Mesh | None:
    """Devices as mesh.fsdp x mesh.tp; None for a single one."""
    shape = (config.mesh.fsdp, config.mesh.tp)
    count, devices = math.prod(shape), jax.devices()
    if count > len(devices) or (jax.process_count() > 1 and count != len(devices)):
        raise ValueError(
            f"mesh: fsdp {shape[0]} x tp {shape[1]} is {count} devices, and there are "
            f"{len(devices)} in {jax.process_count()} processes"
        )
    if config.batch_size % shape[0]:
        raise ValueError(
            f"batch_size: expected a multiple of mesh.fsdp={shape[0]}, found {config.batch_size}"
        )
    if count < len(devices):
        logging.warning(
            "%d of %d devices are used; mesh.fsdp and mesh.tp choose more.", count, len(devices)
        )
    if len(devices) == 1 or count == 1:
        return None
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, ("fsdp", "tp"), axis_types=axis_types, devices=devices[:count])


def make_datasets(
    config: RunConfig, processor: Processor
) -> tuple[BatchDataset, BatchDataset | None]:
    """Batches to train on, and to evaluate on if `data.eval_path` is given."""
    data = config.data
    shared = {
        "batch_size": config.batch_size,
        "max_length": data.max_length,
        "bucket_lengths": data.bucket_lengths,
        "image_buckets": data.image_buckets,
    }
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


def first_row(config: RunConfig, processor: Processor) -> str:
    """The first row of the data, and which of its tokens are learnt."""
    example = processor.encode(Rows(config.data.path)[0])
    return processor.explain(processor.collate([example]))


def load_model(config: RunConfig, mesh: Mesh | None) -> nnx.Module:
    """The checkpoint, with adapters or, to train all of it, in float32."""
    fields = {} if config.dtype is None else {"dtype": config.dtype}
    model_config = ModelConfig.from_hf(
        config.model, text_only=config.text_only, remat_config=config.remat, **fields
    )
    model = load_checkpoint(config.model, mesh, config.text_only, config=model_config)
    if config.lora is not None:
        lora = LoraConfig(**vars(config.lora))
        return apply_lora(model, lora, rngs=nnx.Rngs(config.seed))
    say(f"Trainable parameters: {num_parameters(model):,}, all of them, in float32")
    return cast(model, jnp.float32)


def cast(model: nnx.Module, dtype: Any) -> nnx.Module:
    """Turns every parameter into `dtype`, in place; activations keep theirs."""
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(dtype), state))
    return model


def make_trainer(
    config: RunConfig,
    model: nnx.Module,
    num_rows: int,
    after_eval: Callable[[Gemma4Trainer], None] | None,
) -> Gemma4Trainer:
    """The trainer with its optimizer; it restores the latest checkpoint, if there is one."""
    schedule = make_schedule(
        config.lr_scheduler_type,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=total_steps(config, num_rows),
    )
    optimizer = make_optimizer(
        schedule,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    training_config = make_training_config(
        config.output_dir,
        max_steps=config.max_steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        report_to=config.report_to,
    )
    return Gemma4Trainer(
        model,
        optimizer,
        training_config,
        logging_steps=config.logging_steps,
        log=say,
        after_eval=after_eval,
    )


def total_steps(config: RunConfig, num_rows: int) -> int:
    """Steps for the learning rate to reach zero in.

    Where epochs decide, this is an estimate: rows that are too long make for fewer steps, and the
    rest of each bucket at an epoch's end for more.
    """
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    per_epoch = math.ceil(num_rows / rows_per_step)
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.num_train_epochs is not None:
        limits.append(per_epoch * config.num_train_epochs)
    return min(limits)


def save(config: RunConfig, model: nnx.Module, output: Path) -> list[Path]:
    """Writes adapter/, or model/, or both."""
    if config.lora is None:
        stored = ModelConfig.from_hf(config.model, text_only=config.text_only).param_dtype
        save_checkpoint(cast(model, stored), output / MODEL)
        return [output / MODEL]
    save_adapter(model, output / ADAPTER)
    if not config.merge:
        return [output / ADAPTER]
    save_checkpoint(merge_lora(model), output / MODEL)
    return [output / ADAPTER, output / MODEL]


def say(text: str) -> None:
    """Prints once, however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)
