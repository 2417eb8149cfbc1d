# SPDX-License-Identifier: Apache-2.0
"""Whole runs, each readable from top to bottom."""

from pathlib import Path

__path__.append(str(Path(__file__).parents[1] / "_renamed" / "recipes"))
