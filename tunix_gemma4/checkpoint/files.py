# SPDX-License-Identifier: Apache-2.0
"""Files: safetensors read tensor by tensor through mapped pages, and directories that are whole.

The safetensors package reads and writes whole tensors in host memory and a whole file at once; a
model larger than the host needs slices in and blocks out. The package judges every file that is
read: what the format forbids is refused. The format is an 8-byte length, a JSON header and the
bytes.

What is being written beside its place is called `.NAME.new-PID`, and what it is about to replace
`.NAME.old-PID`, PID being the process's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open

from ..config.source import parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What a checkpoint of this model may hold; tensors that are copied unread may be of any dtype.
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What comes along from the source of a saved model or adapter; each is copied if it is there.
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "additional_chat_templates"),
    *("*processor_config.json", "generation_config.json"),
)
# What a directory that is replaced is not asked to keep: it is written anew, or not of it any more.
_WRITTEN = (*_COMPANIONS, "*.safetensors", INDEX, "config.json", "adapter_config.json")
_CODES = {dtype: code for code, dtype in FLOATS.items()}
_MARK = "tunix_gemma4"  # In the metadata of every file written here: this output may be replaced.
_BLOCK_BYTES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `dtype` is the format's code, `offset` and `nbytes` are bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self) -> np.ndarray:
        """The tensor, read-only, backed by the pages of the file. Only for the codes in FLOATS."""
        if not self.nbytes:
            return np.zeros(self.shape, FLOATS[self.dtype])
        mapped = np.memmap(self.file, FLOATS[self.dtype], "r", self.offset, self.shape)
        return mapped.view(np.ndarray)

    def copied(self) -> NewTensor:
        """To be written as it is, whatever its dtype."""
        return NewTensor(self.name, self.dtype, self.shape, self.nbytes, self._blocks)

    def _blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, self.nbytes, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, self.nbytes - start)
            yield np.memmap(self.file, np.uint8, "r", self.offset + start, (size,))


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: `blocks` makes its bytes, in order, when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Callable[[], Iterable[np.ndarray]]


# ---- Reading.


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint directory by name; reads headers, no values.

    Raises:
        ValueError: no such directory, no weights in it, or files that are truncated, missing, or
            at odds with their index.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory}: not a directory; expected one with a config.json")
    single, index = directory / SINGLE, directory / INDEX
    if not index.is_file():
        if not single.is_file():
            raise ValueError(
                f"{directory}: found neither {SINGLE} nor {INDEX}; save the model with "
                "save_pretrained of transformers to get one"
            )
        return read_header(single)[0]
    weight_map = _read_index(index)
    if single.is_file() and set(weight_map.values()) != {SINGLE}:
        raise ValueError(
            f"{directory}: found both {SINGLE} and {INDEX}, which names other files; "
            "remove the one that does not belong"
        )
    return _read_shards(directory, weight_map)


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a weight_map of tensors, found {weight_map!r}")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file == Path(file).name
        if not plain or not file.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map[{name!r}]: expected the name of a .safetensors file beside "
                f"it, found {file!r}"
            )
    return weight_map


def _read_shards(directory: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory}: {INDEX} names {len(names)} files, {len(missing)} of them missing: "
            f"{listing(missing)}; copy or download them again"
        )
    tensors, problems = {}, []
    for file in names:
        stored, _ = read_header(directory / file)
        listed = {name for name, where in weight_map.items() if where == file}
        absent, unlisted = sorted(listed - set(stored)), sorted(set(stored) - listed)
        if absent:
            problems.append(f"not in {file}, where it should be: {listing(absent)}")
        if unlisted:
            problems.append(f"in {file}, but not there in the index: {listing(unlisted)}")
        tensors |= {name: stored[name] for name in stored if name in listed}
    if problems:
        raise ValueError(
            f"{directory}: {INDEX} does not describe its files, which may come from several "
            "checkpoints:\n  " + "\n  ".join(problems)
        )
    return tensors


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of one safetensors file and its metadata.

    Raises:
        ValueError: the file is truncated, or is none that the format allows: tensors that overlap
            or leave holes, lengths that do not fit shape and dtype, names twice, stray bytes.
    """
    try:
        with safe_open(file, "numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(_unreadable(file, error)) from error
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = stream.read(length)
    try:
        content = parse_json(header)  # The package itself takes the last of equal names.
    except ValueError as error:
        raise ValueError(f"{file}: not a valid safetensors file ({error})") from error
    metadata = content.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in content.items():
        begin, end = entry["data_offsets"]
        place = 8 + length + begin, end - begin
        tensors[name] = StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), *place)
    return tensors, metadata


def _unreadable(file: Path, error: Exception) -> str:
    """Why the package does not read `file`; it says of a truncated one only that it is wrong."""
    size, described = file.stat().st_size if file.is_file() else 0, 0
    with contextlib.suppress(Exception), file.open("rb") as stream:
        length = min(struct.unpack("<Q", stream.read(8))[0], 10**8)
        header = stream.read(length)
        described = 8 + length if header.startswith(b"{") else 0
        content = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in content.items() if name[:2] != "__"]
        described += max(ends, default=0)
    if described > size:
        return (
            f"{file}: truncated: its header describes {described:,} bytes, the file has {size:,}; "
            "copy or download it again"
        )
    reason = str(error).removeprefix("Error while deserializing header: ")
    return (
        f"{file}: not a valid safetensors file ({reason}; {size:,} bytes); copy or download it "
        "again, or save it with the safetensors package"
    )


def listing(names: Iterable[str], most: int = 20) -> str:
    """`a, b, c`, and how many more beyond `most`."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- Writing.


def new_tensor(
    name: str, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[], np.ndarray]
) -> NewTensor:
    """A tensor to be written; `read` gives its array, of any strides, when its turn comes."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize

    def blocks() -> Iterator[np.ndarray]:
        array = read().view(f"u{dtype.itemsize}")  # Plain integers copy faster than bfloat16.
        if not array.ndim:
            array = array.reshape(1)
        rows = max(1, _BLOCK_BYTES * len(array) // max(nbytes, 1))
        for start in range(0, len(array), rows):
            yield np.ascontiguousarray(array[start : start + rows])

    return NewTensor(name, _CODES[dtype], shape, nbytes, blocks)


def write_tensors(
    directory: Path | None, tensors: Iterable[NewTensor], *, max_shard_bytes: int
) -> None:
    """Writes one safetensors file, or several and their index, one block at a time.

    `directory` None makes every tensor and writes nothing, for the processes that take part in
    gathering a tensor without writing it. Files are filled in the order of `tensors`; one holds no
    more than `max_shard_bytes`, or a single tensor.
    """
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    count, weight_map = len(shards), {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_file(None if directory is None else directory / file, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    if directory is not None and count > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_file(file: Path | None, shard: list[NewTensor]) -> None:
    # Wide dtypes first, so that every tensor begins at a multiple of its own width.
    shard = sorted(shard, key=lambda tensor: (-_width(tensor.dtype), tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "writer": _MARK}}
    offset = 0
    for tensor in shard:
        place = [offset, offset + tensor.nbytes]
        described = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        header[tensor.name] = described
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with contextlib.ExitStack() as stack:
        stream = None if file is None else stack.enter_context(file.open("wb"))
        if stream is not None:
            stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in shard:
            _write_blocks(stream, tensor)
        if stream is not None:
            stream.flush()
            os.fsync(stream.fileno())


def _write_blocks(stream: BinaryIO | None, tensor: NewTensor) -> None:
    # A function of its own: its last block must not keep one tensor while the next is made.
    for block in tensor.blocks():
        if stream is not None:
            stream.write(block.data)


def _width(code: str) -> int:
    """Bits of a number of this dtype; the codes end in it, but for F8's variants and BOOL."""
    return int("".join(filter(str.isdigit, code.split("_")[0])) or 8)


# ---- Replacing directories.


def check_target(directory: Path, overwrite: bool) -> None:
    """Raises ValueError unless `directory` may be written: absent, empty, or ours to replace."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory}: exists and is not a directory; choose another")
    if not any(directory.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{directory}: exists and is not empty; choose another directory, or pass "
            "overwrite=True to replace an earlier output of save_checkpoint"
        )
    if not _is_our_output(directory):
        raise ValueError(
            f"{directory}: overwrite=True replaces only what save_checkpoint wrote, and this was "
            "not; choose another directory, or remove it yourself"
        )


def _is_our_output(directory: Path) -> bool:
    files = list(directory.glob("*.safetensors"))
    try:
        return bool(files) and all(read_header(f)[1].get("writer") == _MARK for f in files)
    except ValueError:
        return False


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory` that takes its place when the block ends well.

    If anything goes wrong, the new one is removed and whatever was there before stays. What others
    have put into it, a model card say, is found in the new one.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(directory.parent, directory.name)
    new, old = beside(directory, "new"), beside(directory, "old")
    new.mkdir()
    try:
        yield new
        if directory.exists():
            _keep_foreign(directory, new)
            directory.rename(old)
        try:
            new.rename(directory)
        except OSError:
            if old.exists():
                old.rename(directory)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _keep_foreign(directory: Path, new: Path) -> None:
    """Puts into `new` what `directory` holds and neither a checkpoint nor an adapter has."""
    for path in directory.iterdir():
        written = any(path.match(pattern) for pattern in _WRITTEN)
        if written or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def copy_companions(origin: Path, new: Path) -> None:
    """Copies tokenizer, chat template, processor and generation files of `origin` into `new`."""
    for found in sorted({path for pattern in _COMPANIONS for path in origin.glob(pattern)}):
        if found.is_dir():
            shutil.copytree(found, new / found.name)
        else:
            shutil.copy(found, new / found.name)


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

    With a `name`, only what is called that.
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
            message = "%s cannot be locked (%s): take care that no other run writes to it."
            logging.warning(message, directory, error)
        yield
    finally:
        os.close(descriptor)
