# SPDX-License-Identifier: Apache-2.0
"""Counts what JAX compiles."""

import collections
import contextlib
import logging

import jax

_DONE = "Finished XLA compilation of "


class _Counter(logging.Handler):
    def __init__(self):
        super().__init__()
        self.programs = collections.Counter()

    def emit(self, record):
        message = record.getMessage()
        if message.startswith(_DONE):
            self.programs[message.removeprefix(_DONE).split()[0]] += 1


@contextlib.contextmanager
def compiled_programs():
    """The programs compiled within, `{"jit(step)": 1, ...}`; those from disk count as well.

    From JAX's log, because Tunix takes every listener off `jax.monitoring` when a trainer closes.
    """
    counter, logger = _Counter(), logging.getLogger("jax")
    propagates = logger.propagate
    logger.addHandler(counter)
    logger.propagate = False
    # In every thread, unlike `jax.log_compiles`: the host samples in one of its own.
    jax.config.update("jax_log_compiles", True)
    try:
        yield counter.programs
    finally:
        jax.config.update("jax_log_compiles", False)
        logger.removeHandler(counter)
        logger.propagate = propagates
