# SPDX-License-Identifier: Apache-2.0
"""Tunix's checkpoints of a run: which are kept, which are read, and what ends a run with one."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from tunix.sft import checkpoint_manager, peft_trainer

from ..checkpoint.check import nonfinite
from . import stop
from .health import require_finite_state
from .hooks import extends, overrides

_DAMAGED = ".damaged"
_METADATA = "_CHECKPOINT_METADATA"


class UnusableError(ValueError):
    """There are checkpoints, and none can be read into this model."""


def newest_metadata(directory: Path) -> dict[str, Any]:
    """What was saved with the newest checkpoint of a run, read before there is a model.

    Whether that checkpoint can be used is not known then; empty where this much cannot be read.
    """
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    try:
        text = (directory / str(max(steps)) / _METADATA).read_text("utf-8")
        found = json.loads(text)["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclasses.dataclass
class Kept(ocp.checkpoint_managers.PreservationPolicy):
    """Which checkpoints stay.

    Attributes:
        newest: so many of the newest.
        named: steps of others that stay.
        finite: steps that are known to hold finite numbers alone, of which the last stays; filled
            by `CheckpointManager`.
    """

    newest: int
    named: tuple[int, ...] = ()
    finite: set[int] = dataclasses.field(default_factory=set)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]  # rising
        last_finite = [step for step in steps if step in self.finite][-1:]
        kept = {*steps[-self.newest :], *last_finite, *self.named}
        return [step in kept for step in steps]


@extends(__init__=("root_directory", "options"))
class CheckpointManager(checkpoint_manager.CheckpointManager):
    """Restores every array to where its counterpart lies, from the newest checkpoint that is whole.

    Tunix goes by the sharding metadata instead, and fails where an axis of it is not in the mesh
    or does not divide the array.

    Attributes:
        whole: steps after whose multiples a run can go on, and so may be stopped.
        position: what the metadata of a run's checkpoints have all, or none.
    """

    whole = 1
    position: str | None = None

    def __init__(self, root_directory: str | None = None, options: Any = None):
        super().__init__(None, options)
        if hasattr(self, "_checkpoint_manager"):
            super().__init__(root_directory, options)
        else:  # Newer hosts write through another interface; the files stay the same.
            self._checkpoint_manager = _manager(root_directory, options)
        policy = getattr(options, "preservation_policy", None)
        self._tested = policy.finite if isinstance(policy, Kept) else set()

    # ---- Writing.

    @overrides(*("step", "model", "optimizer", "save_only_lora_params", "force", "custom_metadata"))
    def save(
        self,
        step: int,
        model: nnx.Module,
        optimizer: nnx.Optimizer | None = None,
        save_only_lora_params: bool = False,
        force: bool = False,
        custom_metadata: dict[str, Any] | None = None,
    ) -> bool:
        """Tunix's, but for a state that is not finite, and for a run that is to stop here.

        Raises:
            NonFiniteError: if a number is not finite; then nothing is written.
            plugin.stop.Interrupted, plugin.stop.Terminated: once the checkpoint is on the disk.
        """
        stopping = self._stopping(step)
        manager, written = self._checkpoint_manager, False
        asked = force or stopping is not None
        if (
            manager is not None
            and manager.latest_step() != step
            and (asked or manager.should_save(step))
        ):
            require_finite_state(model, optimizer)
            self._tested.add(step)
            states = _states(model, optimizer, save_only_lora_params)
            items = {name: ocp.args.PyTreeSave(state) for name, state in states.items()}
            args = ocp.args.Composite(**items)
            manager.save(step, args=args, custom_metadata=custom_metadata or {}, force=True)
            written = True
        if stopping:
            self.close()
            saved = "without a directory to save to" if manager is None else "which is saved"
            stop.end(stopping, f"after step {step}, {saved}")
        return written

    @overrides()
    def latest_step(self) -> int | None:
        """The newest step there is; None if there is none."""
        return None if self._checkpoint_manager is None else self._checkpoint_manager.latest_step()

    @overrides()
    def close(self) -> None:
        """Waits for what is being written."""
        if self._checkpoint_manager is not None:
            self._checkpoint_manager.close()

    def _stopping(self, step: int) -> int | None:
        """The signal that ends the run after this step."""
        if step % self.whole:
            return None
        manager = self._checkpoint_manager
        # JAX sees to it that all processes agree on where to stop, which is at the count after the
        # highest of theirs: one that comes, so that steps that cannot be stopped at do not count.
        count = step // self.whole
        if jax.process_count() > 1 and manager is not None and manager.reached_preemption(count):
            return signal.SIGTERM
        return stop.asked()

    # ---- Reading.

    @overrides("model", "optimizer", "step", "restore_only_lora_params")
    def maybe_restore(
        self,
        model: nnx.Module,
        optimizer: nnx.Optimizer | None = None,
        step: int | None = None,
        restore_only_lora_params: bool = False,
    ) -> tuple[int, dict[str, Any]]:
        """Fills model and optimizer from the checkpoint of `step`, or from the newest whole one.

        Newer ones that cannot be read are named, and put aside as `STEP.damaged`.

        Returns:
            The step and the metadata saved with it; 0 and nothing where there is no checkpoint.

        Raises:
            UnusableError: there are checkpoints, and none can be read.
        """
        manager = self._checkpoint_manager
        if manager is None:
            return 0, {}
        wanted = sorted(manager.all_steps(), reverse=True) if step is None else [step]
        states = _states(model, optimizer, restore_only_lora_params)
        problems: dict[int, str] = {}
        for candidate in wanted:
            try:
                restored, metadata = self._read(manager, candidate, states)
            except Exception as error:  # Orbax, tensorstore and json each have their own.
                line = str(error).strip().partition("\n")[0]
                problems[candidate] = f"{type(error).__name__}: {line[:300]}"
                continue
            nnx.update(model, restored["model_params"])
            if optimizer is not None:
                nnx.update(optimizer, restored["optimizer_state"])
            _put_aside(manager, problems, candidate)
            self._tested.add(candidate)
            return candidate, metadata
        if problems:
            steps, newest = ", ".join(map(str, sorted(problems))), max(problems)
            raise UnusableError(
                f"{manager.directory}: none of its checkpoints (steps {steps}) can be used; "
                f"that of step {newest}: {problems[newest]}. They are left as they are: choose "
                "another output_dir to start anew"
            )
        return 0, {}

    def _read(
        self, manager: ocp.CheckpointManager, step: int, states: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        arguments = {
            name: ocp.args.PyTreeRestore(
                item=state, restore_args=ocp.checkpoint_utils.construct_restore_args(state)
            )
            for name, state in states.items()
        }
        metadata = _metadata(manager, step)
        if self.position is not None and self.position not in metadata:
            others = [other for other in manager.all_steps() if other < step]
            if any(self.position in _metadata(manager, other) for other in others):
                raise ValueError(f"its {self.position} is missing")
        found = manager.restore(step, args=ocp.args.Composite(**arguments))
        restored = {name: found[name] for name in states}
        bad = nonfinite(restored)
        if bad:
            raise ValueError(f"its {' and '.join(bad)} hold numbers that are not finite")
        return restored, metadata


def resume(
    trainer: peft_trainer.PeftTrainer,
    directory: str | None,
    *,
    whole: int = 1,
    position: str | None = None,
) -> int:
    """Gives a trainer its checkpoints, and goes on from the latest, whose step is returned.

    The host would do so before the optimizer's state lies where it belongs. See
    `CheckpointManager` for the other arguments.
    """
    manager = CheckpointManager(directory, trainer.config.checkpointing_options)
    manager.whole, manager.position = whole, position
    trainer.checkpoint_manager = manager
    steps, trainer._restored_custom_metadata = manager.maybe_restore(
        trainer.model, trainer.optimizer, restore_only_lora_params=trainer._lora_enabled
    )
    trainer._train_steps = steps
    trainer._iter_steps = steps * trainer.config.get_with_default("gradient_accumulation_steps", 1)
    return steps


def _metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    # Orbax goes on without the file.
    if not (manager.directory / str(step) / _METADATA).is_file():
        raise ValueError(f"{_METADATA} is missing")
    return manager.metadata(step).custom_metadata or {}


def _put_aside(manager: ocp.CheckpointManager, problems: dict[int, str], used: int) -> None:
    for step, problem in problems.items():
        place = manager.directory / str(step)
        aside = place.with_name(f"{step}{_DAMAGED}")
        logging.warning(
            "%s cannot be used (%s): going on from step %d before it. It is kept as %s.",
            *(place, problem, used, aside.name),
        )
        if jax.process_index() == 0:
            place.rename(_unused(aside))
    if problems:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints")
        manager.reload()


def _manager(directory: str | None, options: Any) -> ocp.CheckpointManager | None:
    """As Tunix 0.1.7 makes it."""
    if directory is None:
        return None
    handlers = {
        "model_params": ocp.PyTreeCheckpointHandler(),
        "optimizer_state": ocp.PyTreeCheckpointHandler(),
        "custom_metadata": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(directory, item_handlers=handlers, options=options)


def _states(
    model: nnx.Module, optimizer: nnx.Optimizer | None, only_adapters: bool
) -> dict[str, Any]:
    """What a checkpoint holds, by orbax's item."""
    states = {"model_params": nnx.state(model, nnx.LoRAParam if only_adapters else ...)}
    if optimizer is not None:
        states["optimizer_state"] = nnx.state(optimizer, nnx.optimizer.OptState)
    return states


def _unused(path: epath.Path) -> epath.Path:
    names = (path.name if not number else f"{path.name}-{number}" for number in range(1000))
    return next(other for name in names if not (other := path.with_name(name)).exists())
