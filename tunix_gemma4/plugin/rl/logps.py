# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, entropies and scores: what the host computes, without its gaps.

For Gemma 4 nothing of size [B, T, V] exists; images, temperature and suppressed ids of the batch
in work are used where the host's call cannot carry them. Other models keep the host's functions;
those that do not take `segment_ids` are no longer given them, and with packed rows are refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from tunix.rl import common
from tunix.sft import sharding_utils

from ...losses import per_token_logps
from ...model.gemma4 import Gemma4ForConditionalGeneration
from ...model.scores import Gemma4ForTokenScores
from ...sharding import active_mesh
from .context import bound

# Where a wrapper usually keeps the model whose call it passes keyword arguments on to.
_INNER = ("transformer", "base_model", "base", "model", "module", "inner")
# What a call takes that might be a language model's.
_TELLING = {"tokens", "positions", "attention_mask", "segment_ids"}


def model_accepts_segment_ids(model: Any) -> bool:
    """Whether a call of `model` may be given `segment_ids`.

    Read from the signature, which adapters of Qwix keep. A `**kwargs` passes on what the wrapped
    model takes; without a wrapped model to look at, it is believed.
    """
    return _accepts(model, "segment_ids")


def _accepts(model: Any, name: str) -> bool:
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


def _gated(model: Any, segment_ids: jax.Array | None = None) -> Any:
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
            1,
            type(model).__name__,
        )
    return _Without(model, tuple(dropped)) if dropped else model


def wrap_model_accepts_segment_ids(original: Callable | None) -> Callable:
    """Ours in place of the host's, if it has one: that looks through fewer wrappers."""
    del original
    return model_accepts_segment_ids


def wrap_compute_per_token_logps(original: Callable) -> Callable:
    """Chunked for Gemma 4, with the images in work; gated for other models."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compute_per_token_logps(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        call = given.arguments
        model = nnx.merge(call["graphdef"], call["state"])
        if isinstance(model, Gemma4ForConditionalGeneration):
            temperature_given = "temperature" in call
            given.apply_defaults()
            return _logps(given.arguments, temperature_given=temperature_given)
        gated = _gated(model, call.get("segment_ids"))
        if gated is not model:
            call["graphdef"], call["state"] = nnx.split(gated)
        return original(*given.args, **given.kwargs)

    return compute_per_token_logps


def _logps(call: dict[str, Any], *, temperature_given: bool) -> Any:
    batch = bound()
    rows = call["completion_tokens"].shape[0]
    images, temperature, suppressed = call["images"], call["temperature"], ()
    if batch is not None:
        images = _placed(batch.rows(rows)) if images is None else images
        temperature = temperature if temperature_given else batch.temperature
        suppressed = batch.suppressed
    logps, entropy = chunked_logps(
        call["graphdef"],
        call["state"],
        call["prompt_tokens"],
        call["completion_tokens"],
        images,
        call["segment_ids"],
        call["segment_positions"],
        # The host takes 0, which is greedy, for 1.
        jnp.float32(temperature or 1.0),
        pad_id=call["pad_id"],
        eos_id=call["eos_id"],
        suppressed=suppressed,
        # The model refuses what does not divide.
        image_repeats=1 if images is None else max(1, rows // images.shape[0]),
    )
    if batch is not None:
        batch.logps, batch.entropy = logps, entropy
    if call["stop_gradient"]:
        logps, entropy = jax.lax.stop_gradient((logps, entropy))
    # In place of logits goes what they are asked for: see `wrap_compute_entropy_from_logits`. Newer
    # hosts ask for it by its name.
    wanted = call.get("return_logits") or call.get("return_entropy")
    return (logps, entropy) if wanted else logps


def _placed(images: Any) -> Any:
    """Rows of images on the host's mesh, split like its own inputs."""
    mesh = active_mesh()
    if images is None or isinstance(images, jax.core.Tracer) or mesh is None:
        return images
    return sharding_utils.shard_input(images, ("fsdp",)) if "fsdp" in mesh.shape else images


@functools.partial(jax.jit, static_argnames=("pad_id", "eos_id", "suppressed", "image_repeats"))
def chunked_logps(
    graphdef,
    state,
    prompt_tokens: jax.Array,
    completion_tokens: jax.Array,
    images: jax.Array | None,
    segment_ids: jax.Array | None,
    segment_positions: jax.Array | None,
    temperature: jax.Array,
    *,
    pad_id: int,
    eos_id: int,
    suppressed: tuple[int, ...],
    image_repeats: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies float32 [B, completion], or [B, T] of packed rows."""
    model = nnx.merge(graphdef, state)
    tokens, positions, mask, padding = common.process_ids(
        prompt_tokens, completion_tokens, pad_id, eos_id, segment_ids, segment_positions
    )
    if model.config.wants_kernel:
        # Kernels take no mask of all pairs. Segments, of which padding is one, say the same
        # of all tokens but padding.
        mask = None
    hidden, _ = model(
        tokens,
        positions=positions,
        attention_mask=mask,
        segment_ids=padding if segment_ids is None else segment_ids,
        images=images,
        skip_lm_head=True,
        image_repeats=image_repeats,
    )
    packed = segment_ids is not None
    count = tokens.shape[1] - 1 if packed else completion_tokens.shape[1]
    result = per_token_logps(
        model,
        hidden[:, -count - 1 : -1],
        tokens[:, -count:],
        temperature=temperature,
        suppressed=suppressed,
    )
    # Nothing predicts the first token of a packed row.
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (1, 0))), result) if packed else result


def wrap_compute_entropy_from_logits(original: Callable | None) -> Callable | None:
    """Lets entropies [B, T] through, which Gemma 4 has in place of logits [B, T, V]."""
    if original is None:  # Newer hosts need none.
        return None

    @functools.wraps(original)
    def compute_entropy_from_logits(logits: jax.Array) -> jax.Array:
        return logits if logits.ndim == 2 else original(logits)

    return compute_entropy_from_logits


def wrap_compute_score(original: Callable) -> Callable:
    """Gives Gemma 4 its images; gated for other models."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compute_score(*args: Any, **kwargs: Any) -> jax.Array:
        given = signature.bind(*args, **kwargs)
        call = given.arguments
        batch = bound()
        if not isinstance(call["model"], Gemma4ForTokenScores) or batch is None:
            call["model"] = _gated(call["model"], call.get("segment_ids"))
            return original(*given.args, **given.kwargs)
        # The host has no micro-batches here, and would score a whole rollout step at once.
        size = batch.score_rows or len(call["completion_tokens"])
        cut = ("prompt_tokens", "completion_tokens", "segment_ids", "segment_positions")
        parts = []
        for start in range(0, len(call["completion_tokens"]), size):
            rows = {name: call[name][start : start + size] for name in cut if _given(call, name)}
            images = _placed(batch.rows(len(rows["completion_tokens"])))
            seeing = call["model"] if images is None else _WithImages(call["model"], images)
            parts.append(original(**call | rows | {"model": seeing}))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    return compute_score


def _given(call: Mapping[str, Any], name: str) -> bool:
    return call.get(name) is not None


class _Images(nnx.Variable):
    """Images as a variable, so that a compiled function takes them as an argument."""


class _WithImages(nnx.Module):
    """A model that sees `images` in every call."""

    def __init__(self, model: nnx.Module, images: jax.Array):
        self.model, self.images = model, _Images(jnp.asarray(images))

    def __call__(self, tokens: jax.Array, *, segment_ids: Any = None, **kwargs: Any) -> Any:
        images = self.images[...]
        images = jnp.repeat(images, tokens.shape[0] // images.shape[0], axis=0)
        return self.model(tokens, segment_ids=segment_ids, images=images, **kwargs)


def wrap_get_per_token_logps(original: Callable) -> Callable:
    """DPO's log-probabilities, chunked for Gemma 4; gated for other models."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_per_token_logps(*args: Any, **kwargs: Any) -> jax.Array:
        given = signature.bind(*args, **kwargs)
        model = given.arguments["model"]
        if isinstance(model, Gemma4ForConditionalGeneration):
            given.apply_defaults()
            return _completion_logps(**given.arguments)
        given.arguments["model"] = _gated(model)
        return original(*given.args, **given.kwargs)

    return get_per_token_logps


@nnx.jit(static_argnames=("logits_to_keep",))
def _completion_logps(model, input_tokens, positions, attn_mask, logits_to_keep, images):
    """Log-probabilities float32 [B, logits_to_keep] of the last tokens."""
    hidden, _ = model(input_tokens, positions, None, attn_mask, images=images, skip_lm_head=True)
    targets = input_tokens[:, -logits_to_keep:]
    logps, _ = per_token_logps(model, hidden[:, -logits_to_keep - 1 : -1], targets)
    return logps
