# SPDX-License-Identifier: Apache-2.0
"""Accelerators that are not here, and what their makers say of them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from ..extras import require_extra

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Chips of one kind.

    Attributes:
        name: as in `topology=v5e:2x4`.
        platform: "tpu", "cuda" or "cpu".
        chips: how many there are.
        capacity: bytes of memory of one chip that a program may fill; None: not known.
        flops: bfloat16 operations per second of one chip; None: not known.
    """

    name: str
    platform: str
    chips: int
    capacity: int | None
    flops: float | None

    def devices(self) -> Sequence[Any]:
        """The compiler's `jax.Device`s, on which nothing runs; for "cpu" this process's own.

        Raises:
            ValueError: for a compiler that is not installed, a shape that it refuses, or more CPU
                devices than this process has.
        """
        if self.platform == "cpu":
            return _cpus(self.chips)
        if self.platform == "tpu":
            return _tpus(self.name)
        return _gpus(self.name.split(":")[0], self.chips)

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Triton's matrix products are chosen by timing them, which takes a GPU."""
        if self.platform != "cuda":
            return None
        return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


# Bytes per chip that the TPU compiler lets a program use, and bfloat16 operations per second.
_TPUS = {
    "v5e": (int(15.75 * GIB), 197e12),
    "v5p": (int(95.74 * GIB), 459e12),
    "v6e": (int(31.25 * GIB), 918e12),
}


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """Bytes, bfloat16 operations and bytes per second, multiprocessors, compute capability."""

    memory: int
    flops: float
    bandwidth: float
    cores: int
    capability: tuple[int, int]
    clock_ghz: float
    shared_memory: int
    cache: int


_GPUS = {
    "h200": _Gpu(141 * 10**9, 989e12, 4.8e12, 132, (9, 0), 1.98, 233472, 50 * 2**20),
    "h100": _Gpu(80 * 10**9, 989e12, 3.35e12, 132, (9, 0), 1.98, 233472, 50 * 2**20),
    "a100": _Gpu(80 * 10**9, 312e12, 2.04e12, 108, (8, 0), 1.41, 167936, 40 * 2**20),
}

_KNOWN = ", ".join([*(f"{name}:2x4" for name in _TPUS), *(f"{name}:8" for name in _GPUS), "cpu:8"])


def hardware(topology: str) -> Hardware:
    """The chips of `topology`: `v5e:2x4`, `v5p:2x2x1`, `h200:8`, `cpu:8`.

    Raises:
        ValueError: for a name that is not known.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology.strip())
    if match is None or match[1] not in {*_TPUS, *_GPUS, "cpu"}:
        raise ValueError(f"topology: expected one such as {_KNOWN}, found {topology!r}")
    kind, count = match[1], math.prod(int(size) for size in match[2].split("x"))
    if not count:
        raise ValueError(f"topology: expected at least one chip, found {topology!r}")
    if kind == "cpu":
        return Hardware(topology, "cpu", count, None, None)
    if kind in _TPUS:
        return Hardware(topology, "tpu", count, *_TPUS[kind])
    return Hardware(topology, "cuda", count, _GPUS[kind].memory, _GPUS[kind].flops)


def _cpus(count: int) -> Sequence[Any]:
    # Fails once a backend is up; then there are as many as there are.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"topology: expected at most cpu:{len(devices)}, the devices of this process; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before it starts"
        )
    return devices[:count]


def _tpus(topology: str) -> Sequence[Any]:
    require_extra("libtpu", "aot", "topology: the compiler of a TPU")
    # The compiler would else look for the TPU's own machine, and warn.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Nothing is run, so another process may use the TPU, or plan, at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # The plug-in's errors have no class of their own.
        raise ValueError(f"topology: the TPU compiler refuses {topology!r}: {error}") from error


def _gpus(kind: str, count: int) -> Sequence[Any]:
    require_extra("jax_cuda12_plugin", "aot-gpu", "topology: the compiler of a GPU")
    options = {"topology": f"1x1x{count}", "target_config": _target(kind, _GPUS[kind])}
    try:
        return topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices
    except Exception as error:  # As above.
        raise ValueError(
            f"topology: the GPU compiler refuses {kind}:{count}: {error}; without a driver, "
            "JAX_PLATFORMS=cpu must be set before JAX starts"
        ) from error


def _target(kind: str, gpu: _Gpu) -> str:
    """A GPU in the compiler's own text format."""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}  threads_per_core_limit: 2048
  core_count: {gpu.cores}  fpus_per_core: {128 if major >= 9 else 64}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.bandwidth)}  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock_ghz}  device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}  device_description_str: "NVIDIA {kind.upper()}"
"""
