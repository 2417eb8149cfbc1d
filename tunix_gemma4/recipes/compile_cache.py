# SPDX-License-Identifier: Apache-2.0
"""What shortens the time to a recipe's first step.

Compiled programs kept on disk by JAX's persistent compilation cache, so that a second start
compiles nothing, and fewer of Python's garbage collections; both for as long as a recipe runs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from ..settings.common import AUTO

_DIRECTORY, _ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
# By default JAX keeps what took a second or more; a first step has dozens of programs that took
# less, and together they take seconds.
_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"
# Python's own are 700, 10 and 10.
_COLLECT_AFTER = (50_000, 20, 100)


def default_directory() -> Path:
    """tunix_gemma4/compilation in the user's own cache directory."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "tunix_gemma4" / "compilation"


@contextlib.contextmanager
def compilation_cache(directory: str | None) -> Iterator[None]:
    """Keeps every program compiled within in `directory`, and takes from there what it holds.

    JAX's settings are as before afterwards. A cache that JAX already has, because
    `JAX_COMPILATION_CACHE_DIR` is set or because one of these is open, stays the one in use, and
    where `JAX_ENABLE_COMPILATION_CACHE` says no there is none.

    Args:
        directory: made if it does not exist; "auto" is `default_directory()`, without which a run
            goes on if it cannot be written to; None: no cache.

    Raises:
        ValueError: if a directory other than "auto" cannot be written to.
    """
    settings = jax.config.values
    if directory is None or settings[_DIRECTORY] is not None or not settings[_ENABLED]:
        yield
        return
    path = str(default_directory()) if directory == AUTO else os.path.expanduser(directory)
    try:
        _make(path)
    except OSError as error:
        message = (
            f"compilation_cache_dir: {path} cannot be written to ({error}), and compiled programs "
            "are kept there. Name another directory, or null to keep none"
        )
        if directory != AUTO:
            raise ValueError(message) from error
        logging.warning("%s. This run keeps none.", message)
        yield
        return
    changed: dict[str, Any] = {_DIRECTORY: path}
    if _LEAST_SECONDS.upper() not in os.environ:
        changed[_LEAST_SECONDS] = 0.0
    before = {name: settings[name] for name in changed}
    try:
        _configure(changed)
        yield
    finally:
        _configure(before)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Collects garbage less often.

    Building and tracing a model makes millions of objects that stay, and Python looks through
    them at every collection.
    """
    before = gc.get_threshold()
    gc.set_threshold(*_COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def fast_start(run: Callable) -> Callable:
    """A recipe's `run(config, ...)`, within what shortens its start."""

    @functools.wraps(run)
    def started(config: Any, **kwargs: Any) -> Any:
        with rare_collections(), compilation_cache(config.compilation_cache_dir):
            return run(config, **kwargs)

    return started


def _make(path: str) -> None:
    """Makes the directory, for its owner alone: what lies there is run. Raises OSError."""
    if "://" in path:  # A bucket; JAX writes there by itself.
        return
    Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX opens the directory once and for all, unless it is told to look again.
    jax_cache.reset_cache()
