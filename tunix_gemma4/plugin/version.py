# SPDX-License-Identifier: Apache-2.0
"""Which google-tunix is there, and what is known of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

NAME = "google-tunix"
TESTED = ("0.1.7",)
# Of these, a commit of Tunix's main branch gave 0.1.7's losses; see tests/tunix_versions.py.
TRIED = {"0.1.8": "c7d8950f"}


@dataclasses.dataclass(frozen=True)
class Found:
    """The google-tunix that is imported.

    Attributes:
        version: of the installed package, or what the pyproject.toml beside a checkout says.
        checkout: the folder that `tunix` lies in, where that is not an installed package.
    """

    version: str
    checkout: Path | None = None

    def __str__(self) -> str:
        where = "" if self.checkout is None else f" (from {self.checkout})"
        return f"{NAME} {self.version}{where}"

    def advice(self) -> str:
        """What leads to a version that was tested."""
        if self.checkout is not None:
            return f"Take {self.checkout} off the path and pip install {NAME}=={TESTED[-1]}"
        again = "--force-reinstall --no-deps " if self.version in TESTED else ""
        return f"pip install {again}{NAME}=={TESTED[-1]}"


def require() -> None:
    """Raises RuntimeError where the google-tunix that is there is known not to do."""
    reason = refusal(found())
    if reason is not None:
        raise RuntimeError(reason)


def found() -> Found:
    """The google-tunix that `import tunix` gives, which the path may bring from elsewhere.

    Raises:
        ModuleNotFoundError: there is none.
    """
    spec = importlib.util.find_spec("tunix")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"{NAME} is not installed; pip install {NAME}=={TESTED[-1]}", name="tunix"
        )
    package = Path(spec.origin).parent
    try:
        installed = importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed and Path(str(installed.locate_file("tunix"))).resolve() == package.resolve():
        return Found(installed.version)
    project = package.parent / "pyproject.toml"
    if not project.is_file():
        return Found("of an unknown version", package.parent)
    version = tomllib.loads(project.read_text("utf-8")).get("project", {}).get("version", "unknown")
    return Found(version, package.parent)


def refusal(host: Found) -> str | None:
    """Why this one cannot be used; None where that is not known."""
    number = _number(host.version)
    if not number or number >= _number(TESTED[0]):
        return None
    return (
        f"{host} does not go with this tunix_gemma4: it is older than {TESTED[0]}, whose functions "
        f"are hooked into. {host.advice()}"
    )


def doubt(host: Found) -> str | None:
    """What is to be said of one that can be used; None of one that was tested."""
    if host.version in TESTED and host.checkout is None:
        return None
    if host.version in TRIED:
        return (
            f"{host}: commit {TRIED[host.version]} of Tunix's main branch was tried with "
            "tunix_gemma4. SFT, GRPO and DPO with images gave the losses of "
            f"{TESTED[-1]}; the other learners, packing, meshes and resuming passed the tests "
            "once; ORPO's loss is that host's own"
        )
    return f"{host} is untested with tunix_gemma4; tested: {', '.join(TESTED)}"


def _number(version: str) -> tuple[int, ...]:
    """(0, 1, 7) of "0.1.7"; empty where it is none."""
    parts = version.split(".")[:3]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()
