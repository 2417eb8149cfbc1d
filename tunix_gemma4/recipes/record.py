# SPDX-License-Identifier: Apache-2.0
"""What the checkpoints of a run depend on: its settings, and the contents of its files.

It lies beside the checkpoints and goes with them. A run that is resumed must agree with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml
from absl import logging

from ..checkpoint.disk import sha256, write_text
from ..plugin.checkpoints import UnusableError
from ..plugin.training_config import CHECKPOINTS
from ..settings.common import TrainSettings
from ..settings.load_config import read_yaml, sections, to_yaml

SETTINGS = "run_config.yaml"
_NAME = "record.json"
_DATA = "data.path"
# Of a checkpoint directory, what decides what is trained.
_BASE = ("*.safetensors", "*.json", "*.jinja", "*.model")


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
                entry = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
                before = known.get(name, {})
                same = all(before.get(key) == value for key, value in entry.items())
                entry["sha256"] = before["sha256"] if same and before else sha256(path)
                self._found[name] = entry
        except OSError as error:
            self._error = error

    def settle(self, *, rows_are_known: bool = False) -> None:
        """Waits for the hashes, and compares them where there are checkpoints.

        Args:
            rows_are_known: whether the saved position in the data tells by itself what has changed
                of them, row by row.

        Raises:
            ValueError: what the checkpoints' run was trained on has changed.
        """
        if jax.process_index() != 0:
            return
        self._thread.join()
        if self._error is not None:
            raise ValueError(f"{self._error.filename}: cannot be read ({self._error})")
        folder = self._path.parent
        if any(path.name.isdigit() for path in (*folder.glob("*"), *folder.glob("*/*"))):
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
    """Raises ValueError for what a resumed run has otherwise, unless `allow_changes` is set.

    Args:
        config: of the run.
        what: is otherwise.
        remedy: what to do besides choosing another directory.
        settled: what of it `allow_changes` does not cover, because no checkpoint could be used.
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
