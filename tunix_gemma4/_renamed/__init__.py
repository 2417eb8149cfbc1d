# SPDX-License-Identifier: Apache-2.0
"""Modules under their former names, for one version; found behind those of the package."""

import warnings


def warn(old: str, new: str, *others: str) -> None:
    """Says how `old` is called now, at the line that imports it, and `others` of its names."""
    said = "; ".join([f"{old} is called {new} now", *others])
    warnings.warn(said, DeprecationWarning, stacklevel=3)
