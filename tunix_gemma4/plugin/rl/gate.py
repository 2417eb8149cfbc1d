# SPDX-License-Identifier: Apache-2.0
"""What models of other families are given: never an argument that their call does not take.

The host passes `segment_ids` and `attention_mask` to every model. One that takes none is no longer
given them, and with packed rows is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from flax import nnx

# Where a wrapper usually keeps the model whose call it passes keyword arguments on to.
_INNER = ("transformer", "base_model", "base", "model", "module", "inner")
# What a call takes that might be a language model's.
_TELLING = {"tokens", "positions", "attention_mask", "segment_ids"}


def _accepts(model: Any, name: str) -> bool:
    """Whether a call of `model` may be given an argument of this name.

    Read from the signature, which adapters of Qwix keep. A `**kwargs` passes on what the wrapped
    model takes; without a wrapped model to look at, it is believed.
    """
    parameters = _parameters(model)
    if name in parameters:
        return True
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return False
    held = getattr(model, "__dict__", {})
    inner = [held[attribute] for attribute in _INNER if callable(held.get(attribute))][:1]
    inner = inner or [value for value in held.values() if _TELLING & set(_parameters(value))]
    return any(_accepts(value, name) for value in inner) if inner else True


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """Parameters of a call of `model`; none if it cannot be called, or does not say."""
    try:
        return inspect.signature(model).parameters
    except (TypeError, ValueError):
        return {}


class _Without(nnx.Module):
    """A model that is not given some of the keyword arguments that the host passes."""

    def __init__(self, model: nnx.Module, dropped: tuple[str, ...]):
        self.model, self.dropped = model, dropped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **{k: v for k, v in kwargs.items() if k not in self.dropped})


def gated(model: Any, segment_ids: jax.Array | None = None) -> Any:
    """`model`, kept from arguments that it does not take.

    Raises:
        ValueError: if `segment_ids`, as the caller gave them, are among those.
    """
    dropped = [name for name in ("segment_ids", "attention_mask") if not _accepts(model, name)]
    if segment_ids is not None and "segment_ids" in dropped:
        raise ValueError(
            f"segment_ids: {type(model).__name__} takes none, so packed sequences would see each "
            "other; give its call a `segment_ids` parameter, or leave packing off "
            "(max_seq_token_per_tpu=None)"
        )
    if "attention_mask" in dropped:
        logging.log_first_n(
            logging.WARNING,
            "%s takes no attention_mask: it is not told which tokens are padding.",
            *(1, type(model).__name__),
        )
    return _Without(model, tuple(dropped)) if dropped else model


def wrap_model_accepts_segment_ids(original: Callable | None) -> Callable:
    """One answer for all: newer hosts have a gate of their own, 0.1.7 none under this name.

    Theirs looks through fewer wrappers.
    """
    del original
    return functools.partial(_accepts, name="segment_ids")
