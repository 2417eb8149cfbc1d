# SPDX-License-Identifier: Apache-2.0
"""What the recipes share: mesh, model, optimizer, saving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from jax.sharding import AxisType, Mesh

from ..checkpoint import load_checkpoint, save_checkpoint
from ..config import ModelConfig
from ..data.processor import Processor
from ..extras import is_installed
from ..lora import apply_lora, describe, merge_lora, save_adapter
from ..model.gemma4 import Gemma4Model, num_parameters, stack_layers, unstack_layers
from ..plugin.optimizer import make_optimizer, make_schedule
from ..plugin.progress import history
from ..plugin.training_config import TENSORBOARD
from ..settings.common import MeshConfig, TrainSettings
from .run_directory import ADAPTER, MODEL, say


@dataclasses.dataclass
class Result:
    """What a run leaves.

    Attributes:
        model: trained, as it was trained.
        processor: for its prompts.
        trainer: the host's; its `metrics_logger` holds what `history` reads.
        saved: directories that were written.
    """

    model: Gemma4Model
    processor: Processor
    trainer: Any
    saved: list[Path]

    @property
    def steps(self) -> int:
        """Optimizer steps taken, those before a resumption included."""
        return self.trainer.train_steps

    def history(self, name: str, mode: str = "train") -> list[float]:
        """Every logged value of a metric, such as "loss", "actor/loss" or "rewards/score/mean"."""
        prefix, _, name = name.partition("/") if "/" in name else ("", "", name)
        return history(self.trainer, prefix, name, mode)


def device_mesh(
    shape: MeshConfig, *, name: str = "mesh", devices: Sequence[Any] | None = None
) -> Mesh:
    """The first of `devices`, or of all, as fsdp x tp; `name` is the setting's, for messages."""
    left = "" if devices is None else " beside those of mesh"
    devices = jax.devices() if devices is None else devices
    shape = shape.on_devices(len(devices), name)
    count = shape.fsdp * shape.tp
    if not 0 < count <= len(devices) or (jax.process_count() > 1 and count != len(devices)):
        raise ValueError(
            f"{name}: fsdp {shape.fsdp} x tp {shape.tp} is {count} devices, and there are "
            f"{len(devices)}{left} in {jax.process_count()} processes"
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(
        (shape.fsdp, shape.tp), ("fsdp", "tp"), axis_types=axis_types, devices=devices[:count]
    )


def warn_of_idle_devices(used: int) -> None:
    """Says how many devices the mesh leaves out, if any."""
    there = len(jax.devices())
    if used < there:
        logging.warning(
            "%d of %d devices are used; mesh.fsdp and mesh.tp choose more.", used, there
        )


def model_config(config: TrainSettings, source: Any) -> ModelConfig:
    """The model's config, from a directory or what its config.json holds."""
    fields: dict[str, Any] = {} if config.dtype is None else {"dtype": config.dtype}
    fields["attention_implementation"] = config.attention_implementation
    return ModelConfig.from_hf(
        source, text_only=config.text_only, remat_config=config.remat, **fields
    )


def say_of_long_images(config: TrainSettings, max_soft_tokens: int) -> None:
    """Says so where an image may be longer than the window in which its tokens see each other."""
    model = model_config(config, config.model)
    both_ways = model.has_vision and model.image_blocks_attend_both_ways
    if both_ways and max_soft_tokens > model.sliding_window:
        say(
            f"An image may become {max_soft_tokens} tokens, more than the sliding window of "
            f"{model.sliding_window}: in sliding layers its tokens see each other fewer than "
            f"{model.sliding_window} apart, on both sides. transformers 5.24 limits the past "
            "alone, so its results for such images are others."
        )


def load_base(config: TrainSettings, mesh: Mesh | None) -> Gemma4Model:
    """The checkpoint as it is."""
    settled = model_config(config, config.model)
    return load_checkpoint(config.model, mesh, config.text_only, config=settled)


def trainable(
    config: TrainSettings, model: Gemma4Model, log: Callable[[str], None] | None = None
) -> Gemma4Model:
    """The model with adapters, sharing its arrays; or, to train all of it, in place in float32.

    `log` is called with what is trained; `say` if None.
    """
    log = log or say
    if config.lora is None:  # bfloat16 would lose small updates.
        log(f"Trainable parameters: {num_parameters(model):,}, all of them, in float32")
        return cast(model, jnp.float32)
    try:
        model = apply_lora(model, config.lora, rngs=nnx.Rngs(config.seed))
    except ValueError as error:
        if str(error).startswith(tuple(vars(config.lora))):
            raise ValueError(f"lora.{error}") from error
        raise
    log(describe(model))
    return model


def cast(model: Gemma4Model, dtype: Any) -> Gemma4Model:
    """Turns every parameter into `dtype`, in place; activations keep theirs."""
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(dtype), state))
    return model


def optimizer_of(config: TrainSettings, total_steps: int) -> optax.GradientTransformation:
    """AdamW whose learning rate ends with the run."""
    schedule = make_schedule(
        config.lr_scheduler_type,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        total_steps=total_steps,
    )
    return make_optimizer(
        schedule,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        on_nonfinite=config.on_nonfinite,
        max_skipped_steps=config.max_skipped_steps,
    )


def say_of_epochs(config: TrainSettings, steps: int, about: str = "") -> None:
    """Says where the epochs end, after so many steps, before `max_steps`.

    `about` is a word before the number where that is an estimate.
    """
    if config.num_train_epochs and config.max_steps and steps < config.max_steps:
        say(
            f"max_steps={config.max_steps} is more than num_train_epochs={config.num_train_epochs} "
            f"has, {about}{steps} steps, after which the run ends; num_train_epochs=null goes on."
        )


def make_processor(config: TrainSettings) -> Processor:
    """The checkpoint's, as the section `data` of a recipe says."""
    data = config.data
    return Processor.from_pretrained(
        config.model,
        data.max_soft_tokens,
        thoughts=getattr(data, "thoughts", "last"),  # Prompts have none to learn.
        transformers_alpha=data.transformers_alpha,
        thinking=data.thinking,
        chat_template_kwargs=data.chat_template_kwargs,
    )


def stacked(config: TrainSettings, model: Gemma4Model) -> Gemma4Model:
    """The model, in place, as it is trained: with its layers stacked, if the settings say so."""
    if config.scan_layers:
        stack_layers(model)
    return model


def save(config: TrainSettings, model: Gemma4Model, output: Path) -> list[Path]:
    """Writes adapter/, or model/, or both; leaves the model's layers unstacked."""
    unstack_layers(model)
    if config.lora is None:
        stored = ModelConfig.from_hf(config.model, text_only=config.text_only).param_dtype
        save_checkpoint(cast(model, stored), output / MODEL)
        return [output / MODEL]
    save_adapter(model, output / ADAPTER)
    if not config.merge:
        return [output / ADAPTER]
    save_checkpoint(merge_lora(model), output / MODEL)
    return [output / ADAPTER, output / MODEL]


def say_resuming(config: TrainSettings, steps: int, directory: Path) -> None:
    """Says after which step a run goes on, and where it has nothing to do any more."""
    said = f"Resuming after step {steps} from {directory}."
    if config.max_steps is not None and config.max_steps <= steps:
        said += f" max_steps={config.max_steps} is reached: it is saved as it is."
    say(said)


def say_done(config: TrainSettings, steps: int, saved: Sequence[Path], left_out: str = "") -> None:
    """Says that a run has ended well, what shows its curves and, last, where everything is.

    `left_out` tells of the rows that could not be read.
    """
    if left_out:
        say(f"{config.data.path}: {left_out}")
    if config.report_to == "tensorboard":
        viewer = f"tensorboard --logdir {Path(config.output_dir) / TENSORBOARD}"
        if not is_installed("tensorboard"):
            viewer = f"pip install tensorboard, then {viewer}"
        say(f"Curves: {viewer}")
    say(f"{steps} steps done. Saved: {', '.join(map(str, saved))}")
