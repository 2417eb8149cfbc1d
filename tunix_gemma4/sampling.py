# SPDX-License-Identifier: Apache-2.0
"""Text from prompts with images: one prefill and one decode loop, compiled together.

Prompts are left-padded, so that the next token of every row stands in the same column. A
generated token is never an image, video or audio placeholder: the model would read it as media
for which no soft token exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .checkpoint.check import NonFiniteError, nonfinite_variables, shown
from .config import ModelConfig, refuse_ids_beyond
from .config.domains import require
from .data.processor import Batch
from .model.gemma4 import Gemma4Model, unstack_layers
from .model.soft_tokens import check_images
from .sharding import active_mesh, constrain, mesh_of


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` returns.

    Attributes:
        tokens: int32 [B, max_new_tokens]; after its stop token a row holds the pad token.
        lengths: int32 [B], tokens that each row generated, its stop token included.
        logps: float32 [B, max_new_tokens], log-probability of each token among all that may be
            drawn, at the temperature (1 when greedy), before `top_k` and `top_p`; 0 after the
            stop token.
    """

    tokens: jax.Array
    lengths: jax.Array
    logps: jax.Array

    def rows(self) -> list[list[int]]:
        """The generated tokens of each row, without padding."""
        tokens, lengths = jax.device_get((self.tokens, self.lengths))
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def generate(
    model: Gemma4Model,
    batch: Batch,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    pad_id: int | None = None,
    suppress_ids: Sequence[int] = (),
    image_repeats: int = 1,
    prompt_repeats: int = 1,
    seed: int = 0,
    places: Sequence[int] | None = None,
) -> Generated:
    """Continues every row of `batch` until one of `stop_ids` or `max_new_tokens`.

    A second call with the same shapes, `top_k` and model structure compiles nothing: weights,
    `temperature`, `top_p`, `seed` and the stop list are arguments of the compiled program. On a
    model that was sharded, the work is sharded likewise.

    Args:
        model: a Gemma 4 model, with adapters or quantised weights or without.
        batch: left-padded prompts (`Processor` with `add_generation_prompt=True`); its images are
            read by the prefill only.
        max_new_tokens: most tokens a row gets.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it first.
        top_k: then only the `top_k` likeliest tokens are kept.
        top_p: then only the fewest tokens whose probabilities reach `top_p` together.
        stop_ids: a row ends with the first of these. Default: the config's `eos_token_id`;
            prefer `Processor.stop_ids`, which an instruction-tuned checkpoint needs.
        pad_id: fills rows that have ended. Default: the config's `pad_token_id`.
        suppress_ids: tokens that are never drawn, besides `media_ids`.
        image_repeats: rows in turn that share one row of images, which is encoded once.
        prompt_repeats: rows in turn that have the same prompt, which is computed once for them.
        seed: of the random draws. A row's depend on it, on the row's place and on how many tokens
            the row has got: not on the other rows, on padding, or on how the batch is sharded.
        places: of each row, a number of its own; by default 0, 1, 2, ...

    Raises:
        ValueError: rows that are not left-padded, images that do not fit their placeholders, or
            settings that contradict each other.
    """
    config = model.config
    check_settings(max_new_tokens, temperature, top_k, top_p)
    _check_prompts(config, batch, image_repeats, prompt_repeats)
    places = range(len(batch.tokens)) if places is None else places
    rules = _rules(config, stop_ids, pad_id, suppress_ids, temperature, top_p, seed, places)
    graphdef, state = nnx.split(model)
    with _on_its_mesh(state):
        tokens, padding = jnp.asarray(batch.tokens), jnp.asarray(batch.padding_mask) != 0
        said = _generate(
            *(graphdef, state, tokens, padding, batch.images, rules),
            top_k=None if top_k is None else min(top_k, config.vocab_size),
            max_new_tokens=max_new_tokens,
            image_repeats=image_repeats,
            prompt_repeats=prompt_repeats,
        )
    return Generated(*said)


def refuse_nonfinite(model: nnx.Module, said: Generated, name: str) -> None:
    """Raises NonFiniteError where an answer came from NaN because of the model's own weights.

    `said` is what `generate` made of the model, whose `name` begins the message.
    """
    if jnp.isfinite(said.logps).all():
        return
    names = nonfinite_variables(model)
    if names:
        raise NonFiniteError(
            f"{name}: {len(names)} of its tensors hold NaN or infinity ({shown(names)}), and so "
            "does what it answers from; copy or train the checkpoint anew"
        )


def trace_generate(
    model: Gemma4Model,
    tokens: jax.ShapeDtypeStruct,
    images: jax.ShapeDtypeStruct | None,
    *,
    place: Callable[..., jax.ShapeDtypeStruct],
    max_new_tokens: int,
    image_repeats: int = 1,
    prompt_repeats: int = 1,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.stages.Traced:
    """The program of `generate` on shapes, sampling at a temperature.

    Args:
        model: of shapes.
        tokens, images: of the prompts.
        place: `place(*shape, dtype=int32)` gives a shape that every device holds whole.
        max_new_tokens, image_repeats, prompt_repeats, top_k, top_p: as in `generate`.
    """
    number = place(dtype=jnp.float32)
    shapes: dict[str, Any] = {
        "stop_ids": place(1),
        "pad_id": place(),
        "suppressed": place(len(media_ids(model.config)) + 1),
        "key": place(dtype=jax.random.key(0).dtype),
        "places": place(len(tokens), dtype=jnp.uint32),
        "temperature": number,
        "top_p": None if top_p is None else number,
    }
    padding = jax.ShapeDtypeStruct(tokens.shape, jnp.bool, sharding=tokens.sharding)
    return _generate.trace(
        *(*nnx.split(model), tokens, padding, images, _Rules(**shapes)),
        top_k=None if top_k is None else min(top_k, model.config.vocab_size),
        max_new_tokens=max_new_tokens,
        image_repeats=image_repeats,
        prompt_repeats=prompt_repeats,
    )


def media_ids(config: ModelConfig) -> tuple[int, ...]:
    """Placeholders of images, videos and audio, which no sampler may draw."""
    ids = (config.image_token_id, config.video_token_id, config.audio_token_id)
    return tuple(token for token in ids if token is not None and token < config.vocab_size)


def _on_its_mesh(state: nnx.State) -> contextlib.AbstractContextManager:
    """Makes the mesh that the weights are on the active one, unless the caller has set one."""
    mesh = mesh_of(state)
    if mesh is None or active_mesh() is not None:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def _check_prompts(
    config: ModelConfig, batch: Batch, image_repeats: int, prompt_repeats: int
) -> None:
    """Raises ValueError for rows that cannot be continued.

    The model itself would answer an image that does not fit with NaN, since it is compiled here.
    """
    require(image_repeats=image_repeats, prompt_repeats=prompt_repeats)
    tokens, last = jnp.asarray(batch.tokens), jnp.asarray(batch.padding_mask)[:, -1] != 0
    images = None if batch.images is None else jnp.asarray(batch.images)
    if not last.all():
        raise ValueError(
            "batch: expected left-padded rows, found padding in the last column of row "
            f"{int(jnp.argmin(last))}; collate with side='left'"
        )
    largest = int(jnp.max(tokens))
    refuse_ids_beyond("batch", {str(largest): largest}, config)
    check_images(config, tokens, images, image_repeats)
    _check_repeats(tokens, images, image_repeats, prompt_repeats)
    expected = (tokens == config.image_token_id).sum(axis=1)
    found = jnp.zeros_like(expected)
    if images is not None:
        patches = (images[..., -1] >= 0).sum(axis=(1, 2))
        found = jnp.repeat(patches // config.tower.pooling_kernel_size**2, image_repeats)
    if (expected != found).any():
        row = int(jnp.argmax(expected != found))
        raise ValueError(
            f"batch: row {row} has {int(expected[row])} image placeholders in its tokens but "
            f"{int(found[row])} soft tokens from its images"
        )


def _check_repeats(tokens: jax.Array, images: Any, image_repeats: int, repeats: int) -> None:
    """Raises ValueError where rows that are to share a prompt do not have the same."""
    if len(tokens) % repeats or (images is not None and image_repeats % repeats):
        of = "image_repeats" if len(tokens) % repeats == 0 else f"the {len(tokens)} rows"
        raise ValueError(f"prompt_repeats: expected a divisor of {of}, found {repeats}")
    groups = tokens.reshape(-1, repeats, tokens.shape[1])
    differ = (groups != groups[:, :1]).any(axis=(1, 2))
    if differ.any():
        first = int(jnp.argmax(differ)) * repeats
        raise ValueError(
            f"prompt_repeats: rows {first} to {first + repeats - 1} do not have the same prompt"
        )


def check_settings(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Raises ValueError for settings of `generate` that cannot be meant."""
    numbers = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    require("generate", **numbers, top_k=top_k, top_p=top_p)
    if temperature == 0 and (top_k, top_p) != (None, None):
        raise ValueError(
            f"temperature=0 is greedy and would ignore top_k={top_k} and top_p={top_p}; "
            "set a temperature, or leave them out"
        )


class _Rules(NamedTuple):
    """Settings that the compiled program takes as arguments; see `generate`. None: not used."""

    stop_ids: jax.Array
    pad_id: jax.Array
    suppressed: jax.Array
    key: jax.Array
    places: jax.Array
    temperature: jax.Array | None
    top_p: jax.Array | None


def _rules(config, stop_ids, pad_id, suppress_ids, temperature, top_p, seed, places) -> _Rules:
    """The settings of `generate` as arrays."""
    return _Rules(
        stop_ids=jnp.ravel(jnp.array(config.eos_token_id if stop_ids is None else stop_ids)),
        pad_id=jnp.int32(config.pad_token_id if pad_id is None else pad_id),
        suppressed=jnp.array([*media_ids(config), *suppress_ids], jnp.int32),
        key=jax.random.key(seed),
        places=jnp.array(places, jnp.uint32),
        temperature=jnp.float32(temperature) if temperature else None,
        top_p=None if top_p is None else jnp.float32(top_p),
    )


class _Loop(NamedTuple):
    """What the decode loop carries."""

    step: jax.Array  # tokens sampled so far
    tokens: jax.Array  # int32 [B, max_new_tokens]
    logps: jax.Array  # float32 [B, max_new_tokens]
    lengths: jax.Array  # int32 [B]
    done: jax.Array  # bool [B], rows that have stopped
    cache: dict  # keys and values of the prompt and of all sampled tokens but the last


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "top_k", "max_new_tokens", "image_repeats", "prompt_repeats"),
)
def _generate(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: jax.Array,
    padding: jax.Array,
    images: jax.Array | None,
    rules: _Rules,
    *,
    top_k: int | None,
    max_new_tokens: int,
    image_repeats: int,
    prompt_repeats: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prefill, then decode until every row is done: tokens, lengths and log-probabilities."""
    B, T = tokens.shape
    # Once, and not in every step: slices of stacked layers are copies.
    graphdef, state = nnx.split(unstack_layers(nnx.merge(graphdef, state)))
    tokens, padding = constrain(tokens, "batch", None), constrain(padding, "batch", None)
    # The last token is never fed back and needs no slot.
    slots = jnp.arange(T + max_new_tokens - 1)
    real = jnp.pad(padding, ((0, 0), (0, max_new_tokens - 1)), constant_values=True)
    positions = jnp.maximum(jnp.cumsum(padding, axis=1) - 1, 0)

    def call(cache, tokens, positions, first_slot, **inputs):
        # Merged where it is called: a module belongs to the trace that made it.
        model = nnx.merge(graphdef, state)
        if cache is None:
            cache = model.init_cache(len(tokens), len(slots), model.config.dtype)
        queries = first_slot + jnp.arange(tokens.shape[1])
        rows = real[:: B // len(tokens)]
        visible = rows[:, None, :] & (slots[None, :] <= queries[:, None])[None]
        logits, cache = model(
            tokens, positions, cache, visible, decode_only_last_token=True, **inputs
        )
        logits = logits[:, -1].astype(jnp.float32)
        return logits.at[:, rules.suppressed].set(-jnp.inf), cache

    def decode(loop):
        token = jax.lax.dynamic_slice_in_dim(loop.tokens, loop.step - 1, 1, axis=1)
        before = T + loop.step - 1
        logits, cache = call(loop.cache, token, positions[:, -1:] + loop.step, before)
        return _append(loop, logits, cache, rules, top_k)

    empty = _Loop(
        step=jnp.int32(0),
        tokens=jnp.full((B, max_new_tokens), rules.pad_id),
        logps=jnp.zeros((B, max_new_tokens), jnp.float32),
        lengths=jnp.zeros(B, jnp.int32),
        done=jnp.zeros(B, bool),
        cache={},
    )
    seen = {"images": images, "image_repeats": max(1, image_repeats // prompt_repeats)}
    prefilled = call(None, tokens[::prompt_repeats], positions[::prompt_repeats], 0, **seen)
    logits, cache = jax.tree.map(lambda x: _repeat_rows(x, prompt_repeats), prefilled)
    loop = jax.lax.while_loop(
        lambda loop: (loop.step < max_new_tokens) & ~loop.done.all(),
        decode,
        _append(empty, logits, cache, rules, top_k),
    )
    return loop.tokens, loop.lengths, loop.logps


def _repeat_rows(x: jax.Array, count: int) -> jax.Array:
    """Each row `count` times, in a form that leaves it on its shard."""
    several = jnp.broadcast_to(x[:, None], (len(x), count, *x.shape[1:]))
    return several.reshape(-1, *x.shape[1:])


def _append(loop: _Loop, logits: jax.Array, cache: dict, rules: _Rules, top_k: int | None) -> _Loop:
    """`loop` with one token more in each row, drawn from logits [B, V]."""
    fold = jax.random.fold_in
    keys = jax.vmap(lambda place: fold(fold(rules.key, place), loop.step))(rules.places)
    token = sample(logits, keys=keys, temperature=rules.temperature, top_k=top_k, top_p=rules.top_p)
    scores = jax.nn.log_softmax(logits if rules.temperature is None else logits / rules.temperature)
    logp = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0]
    token = jnp.where(loop.done, rules.pad_id, token)
    return _Loop(
        step=loop.step + 1,
        tokens=loop.tokens.at[:, loop.step].set(token),
        logps=loop.logps.at[:, loop.step].set(jnp.where(loop.done, 0.0, logp)),
        lengths=loop.lengths + ~loop.done,
        done=loop.done | jnp.isin(token, rules.stop_ids),
        cache=cache,
    )


def sample(
    logits: jax.Array,
    *,
    keys: jax.Array,
    temperature: jax.Array | None = None,
    top_k: int | None = None,
    top_p: jax.Array | None = None,
) -> jax.Array:
    """One token of each row of logits [B, V], int32 [B], the row's own key deciding.

    The likeliest where `temperature` is None; otherwise temperature, then `top_k`, then `top_p`
    on what is left, as in transformers. Of equal logits at a border the lower ids stay.

    A token's chance hangs on noise of its own, whatever its rank, so that rounding cannot
    exchange the noise of two tokens.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is None:
        if top_p is not None:
            logits = jnp.where(_nucleus(jax.nn.softmax(logits), top_p), logits, -jnp.inf)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
    logits, ids = jax.lax.top_k(logits, top_k)
    if top_p is not None:
        # A token stays while those before it have not reached top_p, so the first always does.
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where(before < top_p, logits, -jnp.inf)
    one = lambda key, token: jax.random.gumbel(jax.random.fold_in(key, token))  # noqa: E731
    noise = jax.vmap(jax.vmap(one, (None, 0)))(keys, ids)
    choice = jnp.argmax(logits + noise, axis=-1)
    return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0].astype(jnp.int32)


def _nucleus(probabilities: jax.Array, top_p: jax.Array) -> jax.Array:
    """The fewest likeliest tokens of each row [B, V] that reach `top_p` together, bool [B, V].

    Without a sort: the bits of a positive float grow with it, so the least probability that stays
    is found bit by bit, each with one pass over the vocabulary.
    """
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def mass(kept: jax.Array) -> jax.Array:
        return jnp.where(kept, probabilities, 0).sum(axis=-1)

    def narrow(index: jax.Array, least: jax.Array) -> jax.Array:
        # The greatest number whose tokens at or above it reach top_p; 0 where rounding lets none.
        tried = least | (1 << (29 - index))
        return jnp.where(mass(bits >= tried[:, None]) >= top_p, tried, least)

    least = jax.lax.fori_loop(0, 30, narrow, jnp.zeros(len(bits), jnp.int32))[:, None]
    above, at = bits > least, bits == least
    missing = top_p - mass(above)
    each = jax.lax.bitcast_convert_type(least[:, 0], jnp.float32)
    wanted = jnp.ceil(missing / jnp.maximum(each, jnp.finfo(jnp.float32).tiny))
    # Of equal ones the first.
    count = jax.lax.cond(
        (at.sum(axis=-1) > 1).any(), lambda: jnp.cumsum(at, axis=-1), lambda: at.astype(jnp.int32)
    )
    return above | (at & (count <= jnp.maximum(wanted, 1)[:, None]))
