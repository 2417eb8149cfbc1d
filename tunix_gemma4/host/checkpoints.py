# SPDX-License-Identifier: Apache-2.0
"""Tunix's checkpoints of a run, read back onto the shards they are needed on."""

from __future__ import annotations

from typing import Any

import orbax.checkpoint as ocp
from flax import nnx
from tunix.sft import checkpoint_manager

from .health import wrap_save
from .hooks import extends, overrides


@extends(
    __init__=(
        "root_directory",
        "options",
    ),
    latest_step=(),
    close=(),
)
class CheckpointManager(checkpoint_manager.CheckpointManager):
    """Restores every array to where its counterpart lies.

    Tunix goes by the sharding metadata instead, and fails where an axis of it is not in the mesh
    or does not divide the array.
    """

    # In a run that has not registered, too.
    save = overrides(
        *("step", "model", "optimizer", "save_only_lora_params", "force", "custom_metadata")
    )(wrap_save(checkpoint_manager.CheckpointManager.save))

    @overrides("model", "optimizer", "step", "restore_only_lora_params")
    def maybe_restore(
        self,
        model: nnx.Module,
        optimizer: nnx.Optimizer | None = None,
        step: int | None = None,
        restore_only_lora_params: bool = False,
    ) -> tuple[int, dict[str, Any]]:
        """Fills model and optimizer from the checkpoint of `step`, or from the latest.

        Returns:
            The step and the metadata saved with it; 0 and nothing where there is no checkpoint.
        """
        manager = self._checkpoint_manager
        if step is None:
            step = self.latest_step()
        if manager is None or step is None:
            return 0, {}
        kind = nnx.LoRAParam if restore_only_lora_params else ...
        wanted = {"model_params": nnx.state(model, kind)}
        if optimizer is not None:
            wanted["optimizer_state"] = nnx.state(optimizer, nnx.optimizer.OptState)
        arguments = {
            name: ocp.args.PyTreeRestore(
                item=state, restore_args=ocp.checkpoint_utils.construct_restore_args(state)
            )
            for name, state in wanted.items()
        }
        restored = manager.restore(step, args=ocp.args.Composite(**arguments))
        nnx.update(model, restored.model_params)
        if optimizer is not None:
            nnx.update(optimizer, restored.optimizer_state)
        return step, manager.metadata(step).custom_metadata or {}
