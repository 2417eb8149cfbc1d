# SPDX-License-Identifier: Apache-2.0
"""Modules under their former names, for one version; found behind those of the package."""

import warnings


def warn(old: str, new: str) -> None:
    """Says how `old` is called now, at the line that imports it."""
    warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=3)
