# SPDX-License-Identifier: Apache-2.0
"""The output directory of a run: this run's alone while it lasts, whatever ends it.

What its checkpoints depend on, settings and the contents of files, lies beside them and goes with
them. A run that is resumed must agree with it. An error says what was kept, and Ctrl-C and SIGTERM
save a checkpoint first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging as python_logging
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml
from absl import logging

from ..checkpoint.check import NonFiniteError
from ..checkpoint.files import clear_leftovers, locked, sha256, write_text
from ..plugin import stop
from ..plugin.checkpoints import UnusableError
from ..plugin.training_config import CHECKPOINTS, require_backend
from ..settings.common import TrainSettings
from ..settings.load_config import read_yaml, sections, to_yaml

ADAPTER, MODEL = "adapter", "model"
SETTINGS = "run_config.yaml"
_NAME = "record.json"
_DATA = "data.path"
# Of a checkpoint directory, what decides what is trained.
_BASE = ("*.safetensors", "*.json", "*.jinja", "*.model")
# What the shape of a run's state depends on.
_SHAPE = ("lora", "lora.rank", "lora.targets", "scan_layers")


def say(text: str) -> None:
    """Prints once, however many processes there are."""
    if jax.process_index() == 0:
        print(text, flush=True)


def saved_steps(output: Path) -> list[int]:
    """The steps whose checkpoints are there to go on from."""
    # Supervised runs keep theirs in this directory, others in one of each model.
    checkpoints = output / CHECKPOINTS
    paths = (*checkpoints.glob("*"), *checkpoints.glob("*/*"))
    return [int(path.name) for path in paths if path.name.isdigit()]


def prepare_output(
    config: TrainSettings, fixed: Sequence[str], position: Sequence[str] = ()
) -> Path:
    """Makes the output directory, unless it holds what must not be overwritten or mixed.

    Where there are checkpoints, their settings stay beside them until `Record.keep`. A run that is
    resumed must have had the same `fixed` ones; its place in the data depends on those in
    `position`, whatever `allow_changes` says.
    """
    _require_directory(config.model)
    require_backend(config.report_to)
    output = Path(config.output_dir)
    settings = output / SETTINGS
    checkpoints = output / CHECKPOINTS
    resumable = bool(saved_steps(output))
    earlier = earlier_settings(settings) if resumable else {}
    _refuse_finished(config, output, earlier)
    if resumable:
        if not config.resume_from_checkpoint:
            raise ValueError(
                f"{checkpoints}: there are checkpoints, and resume_from_checkpoint is false. "
                "Choose another output_dir, or resume"
            )
        changed = differences(earlier or {}, config, fixed)
        if changed:
            refuse_change(
                config,
                f"{checkpoints}: they belong to a run with another {', '.join(changed)} (see "
                f"{settings}): {'; '.join(changed.values())}",
                "set these back",
                [name for name in changed if name in (*position, *_of_shape(config))],
            )
    elif jax.process_index() == 0:
        write_settings(output, config)
    return output


def _of_shape(config: TrainSettings) -> Sequence[str]:
    """Settings without which no checkpoint fits the model."""
    vision_is_trained = config.lora is None or config.lora.targets in ("vision", "all")
    return (*_SHAPE, "text_only") if vision_is_trained else _SHAPE


def _refuse_finished(config: TrainSettings, output: Path, earlier: dict[str, Any] | None) -> None:
    """Refuses a directory with results, unless the run broke off between adapter/ and model/.

    `earlier` are settings of the run that left checkpoints there; None if they are unknown.
    """
    finished = [name for name in (ADAPTER, MODEL) if (output / name).exists()]
    if not finished:
        return
    was_to_merge = earlier is None or earlier.get("merge", False)
    if finished == [ADAPTER] and config.merge and was_to_merge and config.resume_from_checkpoint:
        say(f"{output}: an earlier run wrote {ADAPTER}/ and not {MODEL}/; this one finishes it.")
        return
    raise ValueError(
        f"{output}: it holds a finished run ({', '.join(finished)}/). Choose another "
        "output_dir, or remove these to train on from the last checkpoint"
    )


def _require_directory(model: str) -> None:
    """Raises ValueError for what is not on this disk, with the command that puts it there."""
    if Path(model).is_dir():
        return
    message = f"model: expected a checkpoint directory, and there is no {model}"
    if model.count("/") == 1 and not model.startswith((".", "/")):
        name = model.split("/")[1]
        message += f". Download it (hf download {model} --local-dir {name}) and give model={name}"
    raise ValueError(message)


def check_file(output: Path, name: str) -> Path:
    """Keeps what the check of a run's data has found: of "train" or of "eval"."""
    return output / CHECKPOINTS / f"data_check_{name}.json"


def check_key(config: TrainSettings, path: str) -> str:
    """All that the check of the rows in `path` depends on."""
    return repr((path, config.model, config.data))


# ---- What checkpoints depend on.


class Record:
    """Hashes a run's files in a thread; `settle` then compares them with the checkpoints'.

    `keep` follows once a checkpoint is restored, where there is one: a run that is refused in
    between must not change what the checkpoints say of themselves.

    Args:
        output: of the run.
        config: its settings, with `model` and `data.path`.
        more: further files, by what they are called in messages.
    """

    def __init__(self, output: Path, config: TrainSettings, more: Mapping[str, Path] | None = None):
        self._path = output / CHECKPOINTS / _NAME
        self._config, self._settings = config, plain(config)
        self._files = {_DATA: Path(config.data.path), **(more or {})}
        model = Path(config.model)
        for path in sorted({path for pattern in _BASE for path in model.glob(pattern)}):
            self._files[f"model/{path.name}"] = path
        self._earlier = _read(self._path)
        self._found: dict[str, dict[str, Any]] = {}
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._hash, daemon=True)
        if jax.process_index() == 0:
            self._thread.start()

    def _hash(self) -> None:
        # A file of the same size and time is the one that was hashed then.
        known = (self._earlier or {}).get("files", {})
        try:
            for name, path in self._files.items():
                status = path.stat()
                entry: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
                before = known.get(name, {})
                same = all(before.get(key) == value for key, value in entry.items())
                entry["sha256"] = before["sha256"] if same and before else sha256(path)
                self._found[name] = entry
        except OSError as error:
            self._error = error

    def settle(self, *, rows_are_known: bool = False) -> None:
        """Waits for the hashes, and compares them where there are checkpoints.

        If `rows_are_known`, the saved position in the data tells by itself what has changed of
        them, row by row.

        Raises:
            ValueError: what the checkpoints' run was trained on has changed.
        """
        if jax.process_index() != 0:
            return
        self._thread.join()
        if self._error is not None:
            raise ValueError(f"{self._error.filename}: cannot be read ({self._error})")
        folder = self._path.parent
        if saved_steps(folder.parent):
            self._compare(folder, {_DATA} if rows_are_known else set())

    def keep(self) -> None:
        """Writes settled hashes and the settings: what is trained from here on depends on them."""
        if jax.process_index() != 0:
            return
        folder = self._path.parent
        write_settings(folder.parent, self._config)
        folder.mkdir(exist_ok=True)
        content = {"settings": self._settings, "files": self._found}
        write_text(self._path, json.dumps(content, indent=2) + "\n")

    @contextlib.contextmanager
    def restoring(self, names: Sequence[str]) -> Iterator[None]:
        """Around a restoration: where no checkpoint fits, says which of the settings are others."""
        try:
            yield
        except UnusableError as error:
            earlier = {} if self._earlier is None else self._earlier["settings"]
            changed = differences(earlier, self._config, names).values()
            if not changed:
                raise
            raise ValueError(
                f"{error}. Their run had other settings: {'; '.join(changed)}"
            ) from error

    def _compare(self, folder: Path, left_out: set[str]) -> None:
        if self._earlier is None:
            logging.warning(
                "%s: there is no readable %s, so whether data and base are those of the "
                "checkpoints is not known; from now on it is kept.",
                *(folder, _NAME),
            )
            return
        was, is_now = self._earlier["files"], self._found
        changed = [
            f"{name} ({_content(was.get(name))}, now {_content(is_now.get(name))})"
            for name in sorted((was.keys() | is_now.keys()) - left_out)
            if was.get(name, {}).get("sha256") != is_now.get(name, {}).get("sha256")
        ]
        if changed:
            refuse_change(
                self._config,
                f"{folder}: they belong to a run with other contents of {', '.join(changed)}",
                "put these files back",
            )


def refuse_change(
    config: TrainSettings, what: str, remedy: str, settled: Sequence[str] = ()
) -> None:
    """Raises ValueError for `what` a resumed run has otherwise, unless `allow_changes` is set.

    `remedy` is what to do besides choosing another directory; `settled` names what
    `allow_changes` does not cover, because no checkpoint could be used.
    """
    if settled:
        raise ValueError(
            f"{what}. Choose another output_dir, or {remedy}: the place in the data, or the shape "
            f"of what is trained, depends on {', '.join(settled)}"
        )
    if not config.allow_changes:
        raise ValueError(
            f"{what}. Choose another output_dir, or {remedy}; allow_changes=true goes on all the "
            "same"
        )
    logging.warning("%s. The run goes on all the same, as allow_changes says.", what)


def _content(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "no such file"
    return f"{entry['size']} bytes, SHA-256 {entry['sha256'][:12]}"


def _read(path: Path) -> dict[str, Any] | None:
    """The record, or None if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text("utf-8"))
        well_formed = all(
            isinstance(content[key], dict) and all(isinstance(key, str) for key in content[key])
            for key in ("settings", "files")
        ) and all(
            isinstance(entry.get("sha256"), str) and isinstance(entry.get("size"), int)
            for entry in content["files"].values()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return content if well_formed else None


def plain(config: TrainSettings) -> dict[str, Any]:
    """The settings as dicts, lists and scalars, as the record holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def write_settings(output: Path, config: TrainSettings) -> None:
    """Writes run_config.yaml. Raises ValueError where nothing can be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / SETTINGS, to_yaml(config))
    except OSError as error:
        raise ValueError(f"output_dir: {output} cannot be written to ({error})") from error


def earlier_settings(settings: Path) -> dict[str, Any] | None:
    """Settings of the run that left the checkpoints beside `settings`; None if no file tells."""
    record = _read(settings.parent / CHECKPOINTS / _NAME)
    if record is not None:
        return record["settings"]
    if not settings.exists():
        return None
    try:
        text = settings.read_text("utf-8")
        given = read_yaml(text) if text.endswith("\n") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        given, reason = None, str(error).partition("\n")[0]
    else:
        reason = "it is cut"
    if isinstance(given, dict):
        return given
    logging.warning(
        "%s cannot be read (%s): that the settings are those of the checkpoints is not known. The "
        "run goes on; choose another output_dir if they are not.",
        *(settings, reason),
    )
    return None


# What may change within sections that are otherwise compared.
_FREE = ("data.check", "data.skip_bad_rows", "data.eval_path")
# Compared by the place that they name, however it is spelt.
_PLACES = ("model", _DATA)


def differences(
    earlier: Mapping[str, Any], config: TrainSettings, names: Sequence[str]
) -> dict[str, str]:
    """What of the settings `names` was another, by dotted name: what it was and what it is."""
    kind = type(config)
    now, usual = plain(config), plain(kind())
    # Where a section is null by default, it has its own where it is given.
    own = {name: plain(section()) for name, section in sections(kind).items()}
    found = {}
    for name in names:
        # What an older version did not have was as it is by default.
        was = earlier.get(name, usual[name] if len(earlier) else now[name])
        found |= _different(name, was, now[name], own.get(name))
    return found


def _different(
    name: str, was: Any, now: Any, usual: Mapping[str, Any] | None = None
) -> dict[str, str]:
    if isinstance(was, dict) and isinstance(now, dict):
        usual = usual or {}
        return {
            dotted: text
            for key in now | was  # Also what only another version has.
            for dotted, text in _different(
                f"{name}.{key}", was.get(key, usual.get(key)), now.get(key)
            ).items()
        }
    same = was == now or (name in _PLACES and Path(str(was)).resolve() == Path(now).resolve())
    return {} if same or name in _FREE else {name: f"{name} was {was}, is {now}"}


# ---- The way out of a run.


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
    loggers = [python_logging.getLogger(name) for name in ("absl", "asyncio")]
    # Those that an earlier failed run has left are taken off.
    error_hook = getattr(sys.excepthook, "around", sys.excepthook)
    unraisable_hook = getattr(sys.unraisablehook, "around", sys.unraisablehook)

    def excepthook(kind: type, error: BaseException, trace: Any) -> None:
        if not _comes_back(error):
            error_hook(kind, error, trace)

    def unraisablehook(given: Any) -> None:
        if not _comes_back(given.exc_value):
            unraisable_hook(given)

    vars(excepthook)["around"], vars(unraisablehook)["around"] = error_hook, unraisable_hook
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


def _is_raised_nowhere_else(record: python_logging.LogRecord) -> bool:
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
            for pattern in ("*.orbax-checkpoint-tmp*", "*/*.orbax-*-tmp*"):
                for path in (output / CHECKPOINTS).glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)  # A killed run did not finish it.
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                output.rmdir()


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
    steps = saved_steps(output)
    if steps:
        kept = f"The checkpoint of step {max(steps)} is kept in {output / CHECKPOINTS}"
        # The same steps would come to the same numbers; what broke off before, to the same error.
        from_outside = in_training or isinstance(error, (KeyboardInterrupt, SystemExit, OSError))
        goes_on = from_outside and not isinstance(error, NonFiniteError)
        _note(error, f"{kept}; the same command goes on from there." if goes_on else f"{kept}.")
