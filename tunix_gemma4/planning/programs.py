# SPDX-License-Identifier: Apache-2.0
"""The programs that a recipe compiles, traced on shapes alone.

They are the recipe's own: its model, its trainer's step, its sampler. Only the weights are
missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import sampling
from ..config import ModelConfig
from ..data.processor import Batch
from ..losses import CHUNK_TOKENS
from ..model.cache import init_cache
from ..model.gemma4 import Gemma4ForConditionalGeneration, Gemma4Model
from ..plugin.rl.cluster import example_shapes, make_trainer
from ..plugin.rl.logps import chunked_logps
from ..plugin.sft.trainer import Gemma4Trainer
from ..plugin.train_step import TrainStep
from ..plugin.training_config import make_training_config
from ..recipes import common, grpo, sft
from ..settings.grpo import GrpoRunConfig, PromptConfig
from ..settings.sft import DataConfig, RunConfig
from ..sharding import eval_shape, shapes_on
from .measure import bits, bytes_per_chip


@dataclasses.dataclass(frozen=True)
class Resident:
    """What lies in memory all the time, in bytes per chip."""

    weights: int  # frozen ones, or all of them where all are trained
    adapters: int  # trained low-rank ones
    optimizer: int  # its state
    reference: int = 0  # weights that only the reference has


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a recipe. Bytes are per chip."""

    name: str  # "step", "log-probs" or "rollout"
    mesh: Mesh  # that it runs on
    resident: Resident  # what lies in memory there all the time
    trace: Callable[[], jax.stages.Traced]  # traces it
    runs: float  # times per optimizer step
    logits: int  # bytes among its temporaries, as caches are
    caches: int = 0
    beside: int = 0  # bytes that lie in memory while it runs and are not its arguments
    while_trips: int = 1  # most rounds of its loop that may end early

    @property
    def arguments(self) -> int:
        """Bytes of what is resident and handed to it."""
        return sum(vars(self.resident).values()) - self.beside


# Its value does not matter to a program's size.
_EOS = 1


class Shapes:
    """Abstract arrays on a mesh.

    Attributes:
        config: of the model.
        mesh: where they lie; an abstract one will do.
    """

    def __init__(self, config: ModelConfig, mesh: Any):
        self.config, self.mesh = config, mesh

    def build(
        self, make: Callable[[Gemma4ForConditionalGeneration], tuple[Any, tuple]]
    ) -> tuple[Any, tuple]:
        """What `make` gives for the checkpoint's model: anything, and modules.

        The modules' variables become shapes, each where its sharding says.
        """
        made = []

        def build() -> tuple:
            base = Gemma4ForConditionalGeneration(self.config, rngs=nnx.Rngs(0))
            result, modules = make(base)
            made.append(result)
            return modules

        modules = eval_shape(build)
        for module in modules:
            nnx.update(module, shapes_on(nnx.state(module), self.mesh))
        return made[0], modules

    def rows(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """Rows on the data axis, or whole where it does not divide them, as the host does."""
        divides = shape[0] % self.mesh.shape["fsdp"] == 0
        where = NamedSharding(self.mesh, PartitionSpec(*(("fsdp",) if divides else ())))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def whole(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        where = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def images(self, rows: int, count: int, data: DataConfig | PromptConfig) -> Any:
        """`count` images of a row, of the budget that `plan` has settled; None for none."""
        if not count or data.max_soft_tokens is None:
            return None
        vision = self.config.tower
        patches = data.max_soft_tokens * vision.pooling_kernel_size**2
        return self.rows(rows, count, patches, vision.patch_dim + 2, dtype=jnp.float32)

    def logits(self, tokens: int) -> int:
        """Bytes per chip of float32 logits, whose words lie on all chips."""
        return min(tokens, CHUNK_TOKENS) * self.config.vocab_size * 4 // self.mesh.size

    def caches(self, rows: int, length: int) -> int:
        """Bytes per chip of caches, split by rows and by key/value heads."""
        tree = jax.eval_shape(lambda: init_cache(self.config, rows, length, self.config.dtype))
        total, tp = 0, self.mesh.shape["tp"]
        for leaf in jax.tree.leaves(tree):
            split = tp if leaf.ndim == 4 and leaf.shape[2] % tp == 0 else 1
            total += leaf.size * bits(leaf.dtype) // 8 // (self.mesh.shape["fsdp"] * split)
        return total


def resident_of(config: RunConfig | GrpoRunConfig, shapes: Shapes) -> Resident:
    """What a recipe keeps in memory on its training mesh."""
    if isinstance(config, GrpoRunConfig):
        return _resident(*_grpo_trainer(config, shapes)[1])
    return _resident(*_sft_trainer(config, shapes)[1])


def _sft_trainer(
    config: RunConfig, shapes: Shapes
) -> tuple[Gemma4Trainer, tuple[nnx.Module, nnx.Optimizer]]:
    """The trainer, its model and its optimizer."""
    quiet = dataclasses.replace(config, report_to="none")
    training = make_training_config(quiet, max_steps=None, checkpoint_root_directory=None)

    def make(base: Gemma4ForConditionalGeneration) -> tuple[Gemma4Trainer, tuple]:
        model = sft.prepare_model(config, base, logging.debug)
        trainer = Gemma4Trainer(model, _optimizer(config), training)
        return trainer, (trainer.model, trainer.optimizer)

    return shapes.build(make)


def sft_programs(config: RunConfig, shapes: Shapes, images: int) -> list[Program]:
    """What supervised fine-tuning compiles, with so many images in a row at most."""
    trainer, (model, optimizer) = _sft_trainer(config, shapes)
    count, length = config.batch_size, config.data.max_length
    fields: dict[str, Any] = dict.fromkeys(
        ("tokens", "loss_mask", "padding_mask"), shapes.rows(count, length)
    )
    fields["images"] = shapes.images(count, images, config.data)
    fields["loss_denominator"] = shapes.rows(count, dtype=jnp.float32)
    fields["rows"] = shapes.rows(count)
    step = _step(trainer.create_train_step_fn(), model, optimizer, Batch(**fields))
    runs, logits = config.gradient_accumulation_steps, shapes.logits(count * length)
    return [Program("step", shapes.mesh, _resident(model, optimizer), step, runs, logits)]


def _optimizer(config: RunConfig | GrpoRunConfig) -> Any:
    return common.optimizer_of(config, total_steps=config.max_steps or 1)


def _step(
    function: Callable, model: nnx.Module, optimizer: nnx.Optimizer, batch: Any
) -> Callable[[], jax.stages.Traced]:
    """Traces a trainer's step on `batch`."""

    def trace() -> jax.stages.Traced:
        step = TrainStep(function, model, optimizer)
        return step.jitted_fn.trace(*step.arguments(), batch)

    return trace


def _resident(
    model: nnx.Module, optimizer: Any = None, reference: nnx.Module | None = None
) -> Resident:
    _, adapters, weights = nnx.split(model, nnx.LoRAParam, ...)
    return Resident(
        *map(bytes_per_chip, (weights, adapters)),
        *(0 if x is None else bytes_per_chip(nnx.state(x)) for x in (optimizer, reference)),
    )


def _grpo_trainer(config: GrpoRunConfig, shapes: Shapes) -> tuple[Any, tuple]:
    """The policy's trainer, the policy, its optimizer and, where it has its own weights, the
    reference."""

    def make(base: Gemma4ForConditionalGeneration) -> tuple[Any, tuple]:
        policy, reference = grpo.prepare_models(config, base, logging.debug)
        ids = {"pad_id": shapes.config.pad_token_id, "eos_id": _EOS}
        trainer = make_trainer(policy, _optimizer(config), config, **ids)
        # With adapters the reference is the policy's own backbone.
        kept = () if config.lora is not None or reference is None else (reference,)
        return trainer, (trainer.model, trainer.optimizer, *kept)

    return shapes.build(make)


def grpo_programs(
    config: GrpoRunConfig, shapes: Shapes, images: int, sampler: Shapes | None = None
) -> list[Program]:
    """What reinforcement learning compiles, likewise.

    `sampler` makes the arrays of sampling, where that has a mesh of its own.
    """
    trainer, (model, optimizer, *reference) = _grpo_trainer(config, shapes)
    resident = _resident(model, optimizer, *reference)
    suppressed = (*sampling.media_ids(shapes.config), shapes.config.pad_token_id)
    rows = config.micro * config.num_generations
    pictures = shapes.images(rows, images, config.data)
    example = example_shapes(shapes.rows, config, pictures, suppressed)
    step = _step(trainer.create_train_step_fn(), model, optimizer, example)
    logits = shapes.logits(rows * config.max_completion_length)
    runs = config.mini // config.micro
    found = [Program("step", shapes.mesh, resident, step, runs, logits, beside=resident.reference)]
    if config.beta:
        found.append(_logps(config, shapes, model, resident, images, suppressed))
    if sampler is not None:
        # It has a copy of the policy, and nothing else.
        _, (model,) = sampler.build(
            lambda base: (None, grpo.prepare_models(config, base, logging.debug)[:1])
        )
        shapes, resident = sampler, _resident(model)
    found.append(_rollout(config, shapes, model, resident, images))
    return found


def per_row_of(config: GrpoRunConfig, model: ModelConfig, prompts: int) -> int:
    """How many completions of so many prompts share a row; kernels take no such rows."""
    return 1 if model.wants_kernel else config.per_row(prompts)


def _rows(
    config: GrpoRunConfig, shapes: Shapes, images: int, prompts: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Any, int]:
    """Prompts and completions of a pass over so many `prompts`, images, and repeats of these."""
    rows = prompts * config.num_generations
    pictures = shapes.images(prompts, images, config.data)
    return (
        shapes.rows(rows, config.data.max_prompt_length),
        shapes.rows(rows, config.max_completion_length),
        pictures,
        1 if pictures is None else config.num_generations,
    )


def _logps(
    config: GrpoRunConfig,
    shapes: Shapes,
    model: nnx.Module,
    resident: Resident,
    images: int,
    suppressed: tuple[int, ...],
) -> Program:
    """Log-probabilities of the reference."""
    prompts = config.compute_logps_micro_batch_size or config.micro
    asked, answers, pictures, repeats = _rows(config, shapes, images, prompts)

    def trace() -> jax.stages.Traced:
        return chunked_logps.trace(
            *nnx.split(model),
            *(asked, answers, pictures, None, None, shapes.whole(dtype=jnp.float32)),
            pad_id=shapes.config.pad_token_id,
            eos_id=_EOS,
            suppressed=suppressed,
            image_repeats=repeats,
            completions_per_row=per_row_of(config, shapes.config, prompts),
        )

    runs = config.mini / prompts / config.num_iterations
    logits, beside = shapes.logits(answers.size), resident.optimizer + resident.reference
    return Program("log-probs", shapes.mesh, resident, trace, runs, logits, beside=beside)


def _rollout(
    config: GrpoRunConfig, shapes: Shapes, model: Gemma4Model, resident: Resident, images: int
) -> Program:
    """Sampling, prefill and decoding in one program."""
    prompts = config.rollout_micro_batch_size or config.micro
    asked, _, pictures, repeats = _rows(config, shapes, images, prompts)
    rows, length = asked.shape

    def trace() -> jax.stages.Traced:
        return sampling.trace_generate(
            model,
            asked,
            pictures,
            place=shapes.whole,
            max_new_tokens=config.max_completion_length,
            image_repeats=repeats,
            prompt_repeats=config.per_row(prompts, config.rollout_mesh),
            top_k=config.top_k,
            top_p=config.top_p,
        )

    return Program(
        *("rollout", shapes.mesh, resident, trace),
        config.mini / prompts / config.num_iterations,
        rows * shapes.config.vocab_size * 4 // shapes.mesh.size,
        caches=shapes.caches(rows, length + config.max_completion_length - 1),
        beside=resident.optimizer + resident.reference,
        while_trips=config.max_completion_length - 1,
    )
