# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, directories that one run writes to, and what dead runs left.

What is being written beside its place is called `.NAME.new-PID`, and what it is about to replace
`.NAME.old-PID`, PID being the process's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from absl import logging

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|old)-(?P<pid>[0-9]+)")


def beside(path: Path, kind: str) -> Path:
    """Where this process puts the new, or keeps the old, `path`."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def write_text(path: Path, text: str) -> None:
    """Writes a small file, which is at any moment the old one or the new one, whole."""
    new = beside(path, "new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal. In the hub's cache that is the name of the blob."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what dead processes were writing in `folder`, or puts back what they had moved.

    Args:
        folder: where to look.
        name: of what they were writing; None: anything.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or name not in (None, found["name"]) or _lives(int(found["pid"])):
            continue
        place = path.with_name(found["name"])
        if found["kind"] == "old" and not place.exists():
            path.rename(place)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether another process has this number. In a container ours is often that of a dead one."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other runs out of `directory` until the block, or the process, ends.

    The lock is the system's, on the directory itself: it leaves no file.

    Raises:
        ValueError: if another run has it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{directory}: another run is writing to it. Wait for it, stop it, or choose "
                "another output_dir"
            ) from error
        except OSError as error:  # Some network file systems have none for directories.
            logging.warning(
                "%s cannot be locked (%s): take care that no other run writes to it.",
                *(directory, error),
            )
        yield
    finally:
        os.close(descriptor)
