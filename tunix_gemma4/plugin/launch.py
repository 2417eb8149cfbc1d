# SPDX-License-Identifier: Apache-2.0
"""Programs written for Tunix, run as they are with `register()` on."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from .register import register


def run(target: str, arguments: Sequence[str]) -> None:
    """Runs a module or a script as `python -m MODULE` or `python SCRIPT` would, registered.

    What the program raises, `SystemExit` included, is not caught.

    Args:
        target: dotted name of a module, or path of a script.
        arguments: what the program finds in `sys.argv` behind its own name.
    """
    register()
    sys.argv = [target, *arguments]
    is_script = target.endswith(".py") or os.sep in target
    # The interpreter put the place of this command first; the program expects its own.
    sys.path.insert(0, os.path.dirname(os.path.abspath(target)) if is_script else os.getcwd())
    if is_script:
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
