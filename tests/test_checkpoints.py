# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: which are kept, and what is done about damaged and non-finite ones."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tunix_gemma4.checkpoint.check import NonFiniteError
from tunix_gemma4.plugin import stop
from tunix_gemma4.plugin.checkpoints import CheckpointManager, Kept


class Run:
    """A tiny model and its checkpoints."""

    def __init__(self, directory, kept=None):
        self.model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, optax.adam(0.1), wrt=nnx.Param)
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=1, preservation_policy=kept or Kept(9)
        )
        self.directory, self.manager = directory, CheckpointManager(str(directory), options)
        self.manager.position = "data_position"

    def save(self, step, value=None, **metadata):
        self.model.kernel[...] = np.full((3, 2), step if value is None else value, np.float32)
        return self.manager.save(
            step, self.model, self.optimizer, custom_metadata=metadata or {"data_position": step}
        )

    def restore(self):
        step, metadata = self.manager.maybe_restore(self.model, self.optimizer)
        return step, metadata, float(self.model.kernel[0, 0])

    def steps(self):
        return sorted(path.name for path in self.directory.iterdir())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1 to 3, on the disk."""
    run = Run(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        assert run.save(step)
    run.manager.close()
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("kept", "steps", "expected"),
    [
        (Kept(2), [1, 2, 3, 4], {3, 4}),
        (Kept(1, (2, 7)), [1, 2, 3, 4], {2, 4}),
        (Kept(1, (), {1, 2}), [1, 2, 3, 4], {2, 4}),
        (Kept(2, (1,), {1, 2}), [1, 2, 3, 4], {1, 2, 3, 4}),
        (Kept(2), [], set()),
    ],
)
def test_newest_named_and_last_finite_steps_are_kept(kept, steps, expected):
    infos = [SimpleNamespace(step=step) for step in steps]
    stays = kept.should_preserve(infos, context=None)
    assert {step for step, stay in zip(steps, stays, strict=True) if stay} == expected


def test_older_checkpoints_go_but_those_named(tmp_path):
    run = Run(tmp_path, Kept(2, named=(2,)))
    for step in range(1, 6):
        run.save(step)
    run.manager.close()
    assert run.steps() == ["2", "4", "5"]


def test_state_that_is_not_finite_is_not_written_and_the_last_finite_stays(tmp_path):
    run = Run(tmp_path, Kept(1))
    run.save(1)
    for value in (np.nan, np.inf):
        with pytest.raises(NonFiniteError):
            run.save(2, value)
    run.manager.close()
    assert run.steps() == ["1"]


def test_checkpoint_that_is_not_finite_is_passed_over(saved, monkeypatch, caplog):
    """As one that was written before this was looked at."""
    monkeypatch.setattr("tunix_gemma4.plugin.checkpoints.require_finite_state", lambda *given: None)
    run = Run(saved)
    run.save(4, np.nan)
    run.manager.close()
    assert Run(saved).restore()[0] == 3
    assert "its model_params hold numbers that are not finite" in caplog.text


def truncated(step):
    for path in step.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            os.truncate(path, path.stat().st_size // 2)


def edited(step, change):
    path = step / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGE = {
    "tensors": truncated,
    "metadata": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "cut metadata": lambda step: os.truncate(step / "_CHECKPOINT_METADATA", 20),
    "position": lambda step: edited(step, lambda content: content["custom_metadata"].clear()),
    "array metadata": lambda step: (step / "model_params" / "_METADATA").unlink(),
    "item": lambda step: shutil.rmtree(step / "optimizer_state"),
    "empty": lambda step: shutil.rmtree(step) or step.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_checkpoint_is_passed_over_by_name(saved, damage, caplog):
    DAMAGE[damage](saved / "3")
    run = Run(saved)
    assert run.restore() == (2, {"data_position": 2}, 2.0)
    assert f"{saved}/3 cannot be used" in caplog.text
    assert "going on from step 2" in caplog.text
    # The step can be saved again, and what was damaged can still be looked at.
    assert run.save(3)
    run.manager.close()
    assert run.steps() == ["1", "2", "3", "3.damaged"]
    assert Run(saved).restore() == (3, {"data_position": 3}, 3.0)


def test_where_none_is_whole_all_stay_and_the_advice_destroys_nothing(saved):
    for step in saved.iterdir():
        truncated(step)
    with pytest.raises(ValueError, match=r"none of its checkpoints \(steps 1, 2, 3\)") as raised:
        Run(saved).restore()
    assert "emove" not in str(raised.value)
    assert Run(saved).steps() == ["1", "2", "3"]


def test_signal_ends_a_run_behind_a_whole_step_with_its_checkpoint(tmp_path):
    run = Run(tmp_path)
    run.manager.whole = 2
    with stop.handled():
        message = "stopped by Ctrl-C after step 2, which is saved"
        with pytest.raises(stop.Interrupted, match=message), stop.after_the_step():
            signal.raise_signal(signal.SIGINT)
            run.save(1)
            run.save(2)
        assert Run(tmp_path).restore()[0] == 2
        with pytest.raises(stop.Terminated, match="stopped by SIGTERM") as raised:
            signal.raise_signal(signal.SIGTERM)
        assert raised.value.code == 143
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_several_processes_agree_on_a_step_that_can_be_stopped_at(tmp_path, monkeypatch):
    run, asked = Run(tmp_path), []

    def reached(count):
        """As JAX's, with a signal behind the first count: at the one after it, and no other."""
        asked.append(count)
        return count == asked[0] + 1

    run.manager.whole = 3
    monkeypatch.setattr(run.manager._checkpoint_manager, "reached_preemption", reached)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(run.manager._checkpoint_manager, "save", lambda *given, **more: None)
    with pytest.raises(stop.Terminated, match="after step 6, which is saved"):
        for step in range(1, 20):
            run.save(step)
