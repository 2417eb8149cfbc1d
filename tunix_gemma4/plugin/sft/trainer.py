# SPDX-License-Identifier: Apache-2.0
"""Tunix's PeftTrainer for batches of conversations.

It is a drop-in: same arguments, same `train(train_ds, eval_ds)`. What it adds is the loss and
its inputs, exact resumption of the data pipeline, shardings that stay put, refusals of what the
host would do silently wrong, and metrics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.sft import hooks, metrics_logger, peft_trainer

from ...config.domains import require_fields
from ...data import BatchDataset
from ...data.processor import Batch
from ...losses import next_token_loss
from ...sharding import mesh_of
from .. import stop
from ..checkpoints import resume
from ..health import NonFiniteError, evaluation_text, settle, state_is_finite
from ..hooks import check_host, extends, overrides
from ..optimizer import StepRecord, find, max_skipped, skipped_steps
from ..placement import place_optimizer
from ..progress import NoBar, Progress, history
from ..train_step import gradient_sums, wrap_jit_train_and_eval_step
from .metrics import StepMetrics, supervised_tokens

TrainingConfig = peft_trainer.TrainingConfig
Mode = metrics_logger.Mode

POSITION = "data_position"
_LOGGERS = ("metrics_logger", "perf_tracer", "perf_tracer_v2")


def model_input(batch: Batch) -> dict[str, Any]:
    """The arguments of `losses.next_token_loss`. For `PeftTrainer.with_gen_model_input_fn`.

    Positions and the attention mask are left to the model, which derives them from the segments.
    """
    return {
        "input_tokens": batch.tokens,
        "input_mask": batch.loss_mask,
        "positions": None,
        "attention_mask": None,
        "images": batch.images,
        "segment_ids": batch.padding_mask,
        "loss_denominator": batch.loss_denominator,
    }


@extends()
class PositionedData(hooks.DataHooks):
    """Hands batches to the host, which then skips none by itself, and knows the position.

    The position is that behind the last batch handed out. No batch is taken that will not be
    trained on, so at every checkpoint it is that of the next step.
    """

    def __init__(self, dataset: BatchDataset, position: dict[str, Any] | None):
        self.name = dataset.name
        self._iterator = iter(dataset)
        if position is not None:
            self._iterator.set_state(position)

    @overrides("train_ctx")
    def load_next_train_batch(self, train_ctx: peft_trainer.PeftTrainer) -> Batch | None:
        most = train_ctx.config.max_steps
        if most is not None and train_ctx.train_steps >= most:
            return None
        return next(self._iterator, None)

    @overrides("train_ctx")
    def load_next_eval_batch(self, train_ctx: peft_trainer.PeftTrainer) -> None:
        """Not called: `Gemma4Trainer` reads evaluation data from the dataset it was given."""

    def position(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def close(self) -> None:
        self._iterator.close()


@extends(
    __init__=("model", "optimizer", "training_config", *_LOGGERS),
    _train_step={
        ("model", "optimizer", "inputs"),
        ("model", "optimizer", "grad_accumulator", "inputs", "is_update_step"),
    },
    _switch_mode=("mode",),
    with_loss_fn=("loss_fn", "has_aux"),
    with_gen_model_input_fn=("gen_model_input_fn",),
    with_data_hooks=("data_hooks",),
    _log_metrics=("loss", "step", "additional_metrics"),
)
class Gemma4Trainer(peft_trainer.PeftTrainer):
    """Trains the adapters of a model that has some, all parameters of one that has none.

    Args:
        model: placed on a mesh or not; where it is, `train` enters that mesh.
        optimizer: `optimizer.make_optimizer` makes one whose metrics are exact; any will do.
        training_config: Tunix's. A checkpoint in its directory is resumed from.
        metrics_logger: Tunix's; by default one is made from the config.
        logging_steps: optimizer steps between lines of text.
        log: takes the lines, those of evaluation too. The host's progress bar is never shown.
        after_eval: called with this trainer after each evaluation.
        progress: total and epochs for the lines; by default what `max_steps` and the data tell.
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        training_config: TrainingConfig,
        metrics_logger: metrics_logger.MetricsLogger | None = None,
        *,
        logging_steps: int = 10,
        log: Callable[[str], None] = print,
        after_eval: Callable[[Gemma4Trainer], None] | None = None,
        progress: Progress | None = None,
    ):
        check_host()
        require_fields(training_config)
        # The host would restore before the optimizer's state lies where it belongs.
        without = dataclasses.replace(training_config, checkpoint_root_directory=None)
        super().__init__(model, optimizer, without, metrics_logger)
        self._mesh = mesh_of(nnx.state(model))
        axes = tuple(
            axis
            for axis in training_config.data_sharding_axis
            if self._mesh is not None and axis in self._mesh.shape
        )
        self.config = dataclasses.replace(training_config, data_sharding_axis=axes)
        self._shard_optimizer(self._mesh)
        resume(self, training_config.checkpoint_root_directory, position=POSITION)
        self.with_loss_fn(next_token_loss)  # pyright: ignore[reportArgumentType]
        self.with_gen_model_input_fn(model_input)
        self._log = log
        self.progress = progress or Progress(training_config.max_steps)
        self._metrics = StepMetrics(log=log, logging_steps=logging_steps)
        self._after_eval = after_eval
        self._eval_ds: Iterable[Batch] | None = None
        self._jitted_eval: Callable[..., Any] | None = None
        self._evaluated_at: int | None = None

    @property
    def _micro_batches(self) -> int:
        return self.config.get_with_default("gradient_accumulation_steps", 1)

    # ---- Data.

    @overrides("train_ds", "eval_ds", "skip_jit", "cache_nnx_graph")
    def train(
        self,
        train_ds: Iterable[Batch],
        eval_ds: Iterable[Batch] | None = None,
        skip_jit: bool = False,
        *,
        cache_nnx_graph: bool = True,
    ) -> None:
        """Trains until `max_steps` or the end of the data, whichever comes first.

        Args:
            train_ds: from `data.make_dataset`, whose position is saved with each checkpoint and
                restored; or any iterable of batches, of which the host skips the first ones.
            eval_ds: any iterable that can be read repeatedly. Read before the first step, every
                `eval_every_n_steps` and at the end.
            skip_jit, cache_nnx_graph: as the host's.
        """
        self._eval_ds = eval_ds
        with contextlib.ExitStack() as stack:
            if self._mesh is not None:
                stack.enter_context(self._mesh)
            if isinstance(train_ds, BatchDataset):
                data = self._positioned(train_ds)
                stack.callback(data.close)
                self.with_data_hooks(data)
                self.progress.per_epoch = self.progress.per_epoch or train_ds.steps_per_epoch()
                train_ds = ()
            self._pbar = NoBar()
            super().train(train_ds, eval_ds, skip_jit, cache_nnx_graph=cache_nnx_graph)

    def _positioned(self, dataset: BatchDataset) -> PositionedData:
        position = self._restored_custom_metadata.get(POSITION)
        if self._train_steps and position is None:
            raise ValueError(
                f"the checkpoint of step {self._train_steps} in "
                f"{self.config.checkpoint_root_directory} has no data position, so it was not "
                "written from a dataset of data.make_dataset. Choose another directory to start "
                "anew."
            )
        data = PositionedData(dataset, position)
        found = data.position()["settings"]["gradient_accumulation_steps"]
        if found != self._micro_batches:
            raise ValueError(
                f"gradient_accumulation_steps: the dataset forms steps of {found} micro-batches "
                f"and the training config of {self._micro_batches}; give both the same number"
            )
        return data

    def refuse_other_data(self, dataset: BatchDataset) -> None:
        """Raises ValueError, as `train` would, for data that the restored position is not of."""
        self._positioned(dataset).close()

    @overrides()
    def custom_checkpoint_metadata(self) -> dict[str, Any]:
        """Saved with each checkpoint: where the data pipeline stands."""
        data = self.data_hooks
        return {POSITION: data.position()} if isinstance(data, PositionedData) else {}

    @overrides()
    def _save_last_checkpoint(self) -> None:
        # As the host's, which leaves the metadata out.
        latest = self.checkpoint_manager.latest_step()
        if latest is None or latest < self._train_steps:
            self._save(force=True)

    def _save(self, *, force: bool = False) -> None:
        self.checkpoint_manager.save(
            self._train_steps,
            self.model,
            self.optimizer,
            save_only_lora_params=self._lora_enabled,
            custom_metadata=self.custom_checkpoint_metadata(),
            force=force,
        )

    @overrides("input_data")
    def _prepare_inputs(self, batch: Batch) -> Batch:
        """Counts tokens and puts the rows of `batch` on the data axes of the mesh."""
        if self._mode == Mode.TRAIN:
            self._metrics.count(batch)
        if self._mesh is None:
            return batch
        axes = self.config.data_sharding_axis
        parts = math.prod(self._mesh.shape[axis] for axis in axes)
        rows = len(batch.tokens) * jax.process_count()
        if rows % parts:
            # The host would give every device the whole batch, without a word.
            raise ValueError(
                f"batch of {rows} rows: expected a multiple of {parts}, the size of mesh axes "
                f"{axes}; change the batch size or the mesh"
            )
        sharding = NamedSharding(self._mesh, PartitionSpec(*axes))
        place = jax.make_array_from_process_local_data
        return jax.tree.map(lambda rows: place(sharding, np.asarray(rows)), batch)

    # ---- The step.

    @overrides()
    def create_train_step_fn(self) -> Callable[..., Any]:
        """The host's step, which also returns the optimizer's record of it and of what it skips."""

        def recorded(model, optimizer, *inputs):
            loss, _, gradient_norm = self._train_step(model, optimizer, *inputs)
            record = find(optimizer.opt_state, StepRecord)
            skips = max_skipped(optimizer) is not None
            skipped = skipped_steps(optimizer) if skips else None
            return loss, nnx.as_pure((record, skipped)), gradient_norm

        # The host looks for the names.
        def train_step(model, optimizer, inputs):
            return recorded(model, optimizer, inputs)

        def summing_step(model, optimizer, grad_accumulator, inputs, is_update_step):
            return recorded(model, optimizer, grad_accumulator, inputs, is_update_step)

        return train_step if gradient_sums(self) is None else summing_step

    @overrides("skip_jit", "cache_nnx_graph")
    def jit_train_and_eval_step(self, *args: Any, **kwargs: Any) -> tuple[Callable, Callable]:
        """The host's, compiled so that frozen parameters lie in memory once."""
        compiled = wrap_jit_train_and_eval_step(peft_trainer.PeftTrainer.jit_train_and_eval_step)
        return compiled(self, *args, **kwargs)

    @overrides("mesh")
    def _shard_optimizer(self, mesh: Mesh | None) -> None:
        """Places the optimizer's state like the parameters it belongs to.

        Without this the first step would move it, and the second compile anew.
        """
        if mesh is not None and not mesh.empty:
            place_optimizer(self, mesh)

    # ---- Metrics and evaluation.

    @overrides("aux")
    def _post_process_train_step(self, aux: Any) -> None:
        self._metrics.add_to(self._buffered_train_metrics, *aux)

    @overrides()
    def _write_train_metrics(self) -> None:
        self._metrics.finish(self._prev_buffered_train_metrics)
        super()._write_train_metrics()

    @overrides("metrics", "step", "loss")
    def _may_update_pbar(self, metrics, step=None, loss=None) -> None:
        super()._may_update_pbar(metrics, step, loss)
        if self._mode == Mode.TRAIN and step is not None:
            self._metrics.report(self, step)

    @overrides("eval_ds", "eval_step_fn")
    def _run_eval(self, eval_ds: Iterable[Batch], eval_step_fn: Callable[..., Any]) -> None:
        """Mean loss over all supervised tokens of `eval_ds`; the host's is a mean over batches."""
        self._jitted_eval = eval_step_fn
        losses, weights, rows = [], [], []
        with self._metrics.paused(), self._switch_mode(Mode.EVAL):
            for batch in eval_ds:
                number = stop.asked()  # Evaluation may take long.
                if number is not None:
                    if not self._train_steps:
                        stop.end(number, "before the first step")
                    self._save()  # Which ends the run.
                # What the loss was divided by.
                told = batch.loss_denominator
                weights.append(supervised_tokens(batch) if told is None else float(np.mean(told)))
                rows.append(batch.rows)
                loss, _ = eval_step_fn(self._prepare_inputs(batch))
                losses.append(loss)
            if not sum(weights):
                raise ValueError("eval_ds: it has no supervised token; nothing can be evaluated")
            losses = jax.device_get(losses)
            settle(self)
            if not np.isfinite(losses).all() and max_skipped(self.optimizer) is None:
                if self._train_steps:
                    self._save_last_checkpoint()  # What was trained is finite.
                raise NonFiniteError(evaluation_text(self, losses, rows))
            loss = float(np.dot(losses, weights) / sum(weights))
            self._log_metrics(loss=loss, step=self._train_steps)
            self._log(f"eval  step {self._train_steps}  loss {loss:.4f}")
            if self.training_hooks:
                self.training_hooks.on_eval_step_end(self, loss)
            if self._after_eval is not None:
                self._after_eval(self)
        self._evaluated_at = self._train_steps

    def state_is_finite(self) -> bool:
        """Whether what a checkpoint of the latest step would hold is finite. Waits for the step."""
        return state_is_finite(self)

    @overrides()
    def close(self) -> None:
        """Evaluates if there were steps since, then as the host's.

        Raises:
            NonFiniteError: if one of the last steps was not finite.
        """
        settle(self)
        self._write_train_metrics()
        if self._jitted_eval is not None and self._evaluated_at != self._train_steps:
            self._run_eval(self._eval_ds, self._jitted_eval)
        super().close()

    def history(self, name: str, mode: str = "train") -> list[float]:
        """Every logged value of a metric, oldest first; empty if there is none."""
        return history(self, self.metrics_prefix, name, Mode(mode))
