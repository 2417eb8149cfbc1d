# SPDX-License-Identifier: Apache-2.0
"""The one way out of a run, whatever ends it.

The directory is this run's alone while it lasts. Its checkpoint in flight is finished, the error
says what was kept, and Ctrl-C and SIGTERM save a checkpoint first.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from ..checkpoint_disk import clear_leftovers, locked
from ..host import stop
from ..host.settings import CHECKPOINTS
from .settings import TrainSettings


def one_way_out(run: Callable) -> Callable:
    """A recipe's `run(config, ...)`, in an output directory that is its own."""

    @functools.wraps(run)
    def guarded(config: TrainSettings, **kwargs: Any) -> Any:
        config.validate()
        with _own(Path(config.output_dir)), stop.handled():
            try:
                return run(config, **kwargs)
            except BaseException as error:
                _say_what_is_kept(error, Path(config.output_dir))
                raise

    return guarded


@contextlib.contextmanager
def _own(output: Path) -> Iterator[None]:
    """Makes the directory and keeps other runs out of it; one that stays empty goes again."""
    if jax.process_index() != 0:
        yield
        return
    is_new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "is a file" if output.is_file() else f"cannot be made ({error})"
        raise ValueError(f"output_dir: {output} {what}; choose another") from error
    try:
        with locked(output):
            clear_leftovers(output)
            _clear_unfinished(output / CHECKPOINTS)
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                output.rmdir()


def _clear_unfinished(checkpoints: Path) -> None:
    """Removes checkpoints that a killed run did not finish."""
    for path in (
        *checkpoints.glob("*.orbax-checkpoint-tmp*"),
        *checkpoints.glob("*/*.orbax-*-tmp*"),
    ):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def training(trainer: Any) -> Iterator[None]:
    """Around a trainer's steps: signals wait for a step's end, errors for the checkpoint's."""
    try:
        with stop.after_the_step():
            yield
    except BaseException as error:
        for part in (trainer.checkpoint_manager, trainer.metrics_logger):
            try:
                part.close()
            except Exception as second:  # What ended the run is what is raised.
                error.add_note(f"Besides, {type(part).__name__} did not close: {second}")
        raise


def _say_what_is_kept(error: BaseException, output: Path) -> None:
    if isinstance(error, OSError) and error.filename is None:
        error.add_note(f"The run writes to {output}.")
    checkpoints = output / CHECKPOINTS
    steps = [
        int(path.name)
        for path in (*checkpoints.glob("*"), *checkpoints.glob("*/*"))
        if path.name.isdigit()
    ]
    if steps:
        error.add_note(
            f"The checkpoint of step {max(steps)} is kept in {checkpoints}; the same command goes "
            "on from there."
        )
