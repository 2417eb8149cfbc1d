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
# Seen to differ too much; reasons in words. Versions before the tested ones are refused as well.
_REFUSED = {
    "0.1.8": (
        "its trainer accumulates gradients outside of the optimizer, its checkpoints are written "
        "through another interface of orbax, and its learners call the cluster an engine"
    ),
}


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
    if (
        installed is not None
        and Path(installed.locate_file("tunix")).resolve() == package.resolve()
    ):
        return Found(installed.version)
    project = package.parent / "pyproject.toml"
    if not project.is_file():
        return Found("of an unknown version", package.parent)
    version = tomllib.loads(project.read_text("utf-8")).get("project", {}).get("version", "unknown")
    return Found(version, package.parent)


def refusal(host: Found) -> str | None:
    """Why this one cannot be used; None where that is not known."""
    reason = _REFUSED.get(host.version)
    if reason is None and _number(host.version) and _number(host.version) < _number(TESTED[0]):
        reason = f"it is older than {TESTED[0]}, whose functions are hooked into"
    if reason is None:
        return None
    return f"{host} does not go with this tunix_gemma4: {reason}. {host.advice()}"


def _number(version: str) -> tuple[int, ...]:
    """(0, 1, 7) of "0.1.7"; empty where it is none."""
    parts = version.split(".")[:3]
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()
