# SPDX-License-Identifier: Apache-2.0
"""Eight fake CPU devices, quick compiles, and tiny checkpoints that are built once."""

import gc
import importlib.metadata
import importlib.util
import os
import signal
import sys

# Read by JAX when its backend starts, so they are set before any test imports it. A caller's own
# choice of platform or flags stands.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The recipes keep compiled programs in the user's cache directory; tests leave that alone.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Tiny models spend nearly all of a test compiling; without LLVM's optimisations that is about
# three times faster (a tiny loss with gradients: 6.0 s to 2.2 s) and runs as fast.
_flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Another factor of 2.5 (8.2 s to 3.2 s of CPU); later versions have no such choice.
    _flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
for _flag in _flags:
    if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()

import pytest  # noqa: E402

# A shell that starts a command in the background has it ignore Ctrl-C, which runs then do too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_HAS_TORCH = importlib.util.find_spec("torch") is not None
# Without torch these files cannot even be imported; the report's header says so.
collect_ignore = [] if _HAS_TORCH else ["parity"]


def pytest_report_header():
    if not _HAS_TORCH:
        return "tests/parity is not collected: torch is not installed (extra `parity`)"
    return None


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_go_with_their_file():
    """Frees what a file compiled.

    Each program maps several pieces of memory, and a process may map some 65,000: the whole suite
    in one process ran out of them and crashed inside the compiler.
    """
    yield
    import jax

    # A run of the recipe registers and leaves it so, as in a user's process.
    if "tunix_gemma4.plugin.register" in sys.modules:
        sys.modules["tunix_gemma4.plugin.register"].unregister()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """`tiny_checkpoint(preset="e2b", **options) -> Path` of a tiny directory in HF's format.

    Each combination is built once per session and shared: read it, or copy it before writing.
    """
    from tunix_gemma4.testing.tiny import build_tiny_checkpoint

    built = {}

    def build(preset="e2b", **options):
        key = (preset, *sorted(options.items()))
        if key not in built:
            directory = tmp_path_factory.mktemp("tiny") / preset
            build_tiny_checkpoint(directory, preset=preset, **options)
            built[key] = directory
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_dir(tiny_checkpoint):
    """The tiny E2B directory. Shared: read it, or copy it before writing."""
    return tiny_checkpoint("e2b")
