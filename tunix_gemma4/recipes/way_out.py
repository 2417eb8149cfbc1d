# SPDX-License-Identifier: Apache-2.0
"""The one way out of a run, whatever ends it.

The directory is this run's alone while it lasts. Its checkpoint in flight is finished, the error
says what was kept, and Ctrl-C and SIGTERM save a checkpoint first.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from ..checkpoint.disk import clear_leftovers, locked
from ..checkpoint.finite import NonFiniteError
from ..plugin import stop
from ..plugin.training_config import CHECKPOINTS
from ..settings.common import TrainSettings


def one_way_out(run: Callable) -> Callable:
    """A recipe's `run(config, ...)`, in an output directory that is its own."""

    @functools.wraps(run)
    def guarded(config: TrainSettings, **kwargs: Any) -> Any:
        config.validate()
        with _own(Path(config.output_dir)), stop.handled():
            undo = _quieten()
            try:
                result = run(config, **kwargs)
                undo()
                return result
            except BaseException as error:
                _say_what_is_kept(error, Path(config.output_dir))
                raise

    return guarded


def _quieten() -> Callable[[], None]:
    """Leaves out what orbax's threads say besides the error that it raises; returns the undoing.

    Behind a failed run it stays, because they go on for a while.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    hooks = sys.excepthook, sys.unraisablehook
    # Those that an earlier failed run has left are taken off.
    error_hook, unraisable_hook = (getattr(hook, "around", hook) for hook in hooks)

    def excepthook(kind: type, error: BaseException, trace: Any) -> None:
        if not _comes_back(error):
            error_hook(kind, error, trace)

    def unraisablehook(given: Any) -> None:
        if not _comes_back(given.exc_value):
            unraisable_hook(given)

    excepthook.around, unraisablehook.around = error_hook, unraisable_hook
    for logger in loggers:
        logger.addFilter(_is_raised_nowhere_else)
    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook

    def undo() -> None:
        for logger in loggers:
            logger.removeFilter(_is_raised_nowhere_else)
        sys.excepthook, sys.unraisablehook = error_hook, unraisable_hook

    return undo


def _comes_back(error: BaseException | None) -> bool:
    """Whether it is of a write of tensorstore that comes back to a save which was given up."""
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _is_raised_nowhere_else(record: logging.LogRecord) -> bool:
    """False for the tracebacks that orbax's threads log of errors which it raises as well."""
    trace = record.exc_info[2] if isinstance(record.exc_info, tuple) else None
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
    return not any("orbax" in Path(file).parts for file in files)


@contextlib.contextmanager
def _own(output: Path) -> Iterator[None]:
    """Makes the directory and keeps other runs out of it; one that stays empty goes again."""
    if jax.process_index() != 0:
        yield
        return
    try:
        is_new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        is_file = isinstance(error, FileExistsError)
        what = "is a file" if is_file else f"cannot be made ({error.strerror})"
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
        vars(error)["in_training"] = True
        for part in (trainer.checkpoint_manager, trainer.metrics_logger):
            try:
                part.close()
            except Exception as second:  # What ended the run is what is raised.
                _note(error, f"Besides, {type(part).__name__} did not close: {second}")
        raise


def _note(error: BaseException, text: str) -> None:
    """Adds to what the error says, apart from what libraries add to it (grain does)."""
    error.add_note(text)
    vars(error).setdefault("of_run", []).append(text)


def _say_what_is_kept(error: BaseException, output: Path) -> None:
    if isinstance(error, OSError) and error.filename is None:
        _note(error, f"The run writes to {output}.")
    # What is refused before training says itself what to do.
    in_training = "in_training" in vars(error)
    if isinstance(error, ValueError) and not in_training:
        return
    checkpoints = output / CHECKPOINTS
    steps = [
        int(path.name)
        for path in (*checkpoints.glob("*"), *checkpoints.glob("*/*"))
        if path.name.isdigit()
    ]
    if steps:
        kept = f"The checkpoint of step {max(steps)} is kept in {checkpoints}"
        # The same steps would come to the same numbers; what broke off before, to the same error.
        from_outside = in_training or isinstance(error, (KeyboardInterrupt, SystemExit, OSError))
        goes_on = from_outside and not isinstance(error, NonFiniteError)
        _note(error, f"{kept}; the same command goes on from there." if goes_on else f"{kept}.")
