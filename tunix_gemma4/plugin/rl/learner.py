# SPDX-License-Identifier: Apache-2.0
"""Tunix's learners on Gemma 4: images from data set to gradient, and what a step shows.

The learners are the host's own; these wrappers stand around the methods through which a batch
goes. `docs/explanation/rl_images.md` follows one on its way.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np
from tunix.rl.rl_cluster import Mode

from ...data.keys import REFUSED
from ...data.processor import Processor
from ...data.prompts import Prompt
from ...model.gemma4 import Gemma4ForConditionalGeneration
from ..metric_names import MetricNames
from .context import Bound, Draws, bind, bound
from .micro_batches import AGREEMENT, TOKENS, step_mean
from .prompts import IMAGE_COLUMNS, PromptReader, unwrap
from .rewards import REWARDS, checked, require_sums, without_abstained, without_spread
from .rollout import Rollout, gemma4_rollout
from .rollout_step import begin, evaluate_last, packs, padded_logps, rollout_step, with_old_logps

# Rollouts of evaluation draw from streams that no training step has.
_EVAL_STREAM = 1 << 32
EXTRA = "completions/extra/"  # before the names of what a reward function says of each completion
METRICS = {"entropy": np.mean, f"{AGREEMENT}/mean": np.mean, f"{AGREEMENT}/max": np.max}


def set_processor(rl_cluster: Any, processor: Processor) -> None:
    """Makes `processor` the one that reads this cluster's conversations and images.

    Raises:
        ValueError: if the cluster's rollout is not Gemma 4's; see `tunix_gemma4.register`.
    """
    rollout = gemma4_rollout(rl_cluster)
    if rollout is None:
        raise ValueError(
            f"the cluster's rollout is a {type(rl_cluster.rollout).__name__}; processors belong to "
            'rollout_engine="vanilla" of a Gemma 4 actor, made after tunix_gemma4.register()'
        )
    rollout.processor = processor


class InWork:
    """Marks examples that carry what `extended` adds."""


@functools.cache
def extended(kind: type) -> type:
    """The host's example `kind` with what the loss needs besides."""

    @flax.struct.dataclass
    class Example(kind, InWork):
        images: Any = None
        rollout_logps: Any = None
        # [B]: tokens of the optimizer step over its micro-batches, where the loss is their mean.
        loss_denominator: Any = None
        image_repeats: int = flax.struct.field(pytree_node=False, default=1)
        temperature: float = flax.struct.field(pytree_node=False, default=1.0)
        suppressed: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    return Example


def wrap_init(original: Callable) -> Callable:
    """Checks rewards, and gives metric functions what the data set gave."""

    @functools.wraps(original)
    def init(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if hasattr(self, "rl_engine"):  # As newer hosts call it.
            self.rl_cluster = self.rl_engine
        if gemma4_rollout(self.rl_cluster) is None:
            return
        manager = self.reward_manager
        # PPO with a reward model has None for its one reward function.
        names = MetricNames()
        manager.reward_fns = [checked(fn) for fn in manager.reward_fns if fn is not None]
        for number, fn in enumerate(manager.reward_fns):
            # The host's name of its metric.
            name = names.of(f"{REWARDS}{fn.__name__}", ("reward", number))
            fn.__name__ = name.removeprefix(REWARDS)
        self.metric_fns = [_metric(names, number, fn) for number, fn in enumerate(self.metric_fns)]
        self.metric_names = names

    return init


def _metric(names: MetricNames, number: int, metric_fn: Callable) -> Callable:
    """`metric_fn` with the data set's own columns, and with names of its own."""

    @functools.wraps(metric_fn)
    def metric(**columns: Any) -> dict[str, Any]:
        found = metric_fn(**{name: _plain(value) for name, value in columns.items()})
        return {names.of(name, ("metric", number)): value for name, value in found.items()}

    return metric


def _plain(value: Any) -> Any:
    """A column as the data set gave it; arrays of numbers stay arrays."""
    if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
        return unwrap(value)
    return value


def wrap_train(original: Callable) -> Callable:
    """Reads prompts and images of the data sets before the host moves them about.

    The policy that training leaves is evaluated like those before.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def train(self, train_ds: Iterable, eval_ds: Iterable | None = None, *args, **kwargs) -> None:
        cluster = self.rl_cluster
        rollout = gemma4_rollout(cluster)
        if rollout is None:
            if isinstance(cluster.actor_trainer.model, Gemma4ForConditionalGeneration):
                train_ds = _WithoutImages(train_ds, type(cluster.rollout).__name__)
            return original(self, train_ds, eval_ds, *args, **kwargs)
        if not packs(self):
            trainer = cluster.actor_trainer
            trainer.with_rl_metrics_to_log(trainer.rl_metrics_to_log | METRICS)
        read, names = {}, _asked_for(self.reward_manager.reward_fns)
        for mode, dataset in ((Mode.TRAIN, train_ds), (Mode.EVAL, eval_ds)):
            reader = _reader(cluster, rollout, mode, names)
            read[mode] = None if dataset is None else _Read(dataset, reader)
        given = signature.bind(self, train_ds, eval_ds, *args, **kwargs).arguments
        cluster.before_close = functools.partial(
            evaluate_last, self, read[Mode.EVAL], bool(given.get("skip_jit"))
        )
        try:
            return original(self, read[Mode.TRAIN], read[Mode.EVAL], *args, **kwargs)
        finally:
            vars(cluster).pop("before_close", None)

    return train


def _reader(
    rl_cluster: Any, rollout: Rollout, mode: Mode, names: Collection[str] = ()
) -> PromptReader:
    length = _rollout_config(rl_cluster, mode).max_prompt_length
    return PromptReader(rollout.tokenize, lambda: rollout.processor, length, names)


def _asked_for(reward_fns: Iterable[Callable]) -> set[str]:
    """Columns that reward functions name, or, where one takes all, whatever there may be."""
    asked = [p for fn in reward_fns for p in inspect.signature(fn).parameters.values()]
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in asked)
    return {parameter.name for parameter in asked} | (REFUSED.keys() if takes_all else set())


def _rollout_config(rl_cluster: Any, mode: Mode) -> Any:
    """The mode's settings, or those of training where evaluation has none of its own."""
    settings = rl_cluster.cluster_config.rollout_config
    return settings.get(mode, settings[Mode.TRAIN]) if isinstance(settings, dict) else settings


class _Read:
    """A data set whose batches are read as they are taken, as often as it can be iterated."""

    def __init__(self, dataset: Iterable, reader: PromptReader):
        self._dataset, self._reader = dataset, reader

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self._reader.batches(self._dataset)


class _WithoutImages:
    """A data set for a rollout engine that would drop its images."""

    def __init__(self, dataset: Iterable, engine: str):
        self._dataset, self._engine = dataset, engine

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._dataset:
            found = [name for name in IMAGE_COLUMNS if name in batch]
            if found:
                raise ValueError(
                    f"column {found[0]!r}: {self._engine} would drop the images; call "
                    'tunix_gemma4.register() and make the cluster with rollout_engine="vanilla"'
                )
            yield batch


def wrap_compute_rewards(original: Callable) -> Callable:
    """Hands reward functions what the data set gave, and reports the spread of rewards."""

    @functools.wraps(original)
    def compute_rewards(self, prompts, completions, mode, step=None, **columns):
        if not any(isinstance(prompt, Prompt) for prompt in prompts):
            return original(self, prompts, completions, mode, step, **columns)
        work = bound()
        if work is not None:
            work.prompts = unwrap(list(prompts))
            work.for_rewards = _for_rewards(self.rl_cluster, work, mode, self.metric_names)
        # The host logs prompts, so it gets their texts.
        texts = [prompt.text for prompt in prompts]
        columns = {name: _plain(value) for name, value in columns.items()}
        found = original(self, texts, completions, mode, step, **columns)
        require_sums(found)
        rewards = without_abstained(found, groups=self._num_generations() > 1)
        groups = [group[~np.isnan(group)] for group in found.reshape(-1, self._num_generations())]
        for reward in np.concatenate(groups):
            # One by one, so that it is the spread of the step, in how many pieces it may come.
            self.rl_cluster.buffer_metrics({"rewards/score/std": (reward, np.std)}, mode=mode)
        if self._num_generations() > 1:
            flat = np.mean([without_spread(group) for group in groups])
            metric = {"rewards/groups_without_spread": (flat, np.mean)}
            self.rl_cluster.buffer_metrics(metric, mode=mode)
        return rewards

    return compute_rewards


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """How far a run is, for reward functions; the names are transformers'.

    Attributes:
        global_step: optimizer steps taken.
        max_steps: of the run; None: not known.
    """

    global_step: int
    max_steps: int | None


def _for_rewards(rl_cluster: Any, work: Bound, mode: Mode, names: MetricNames) -> dict[str, Any]:
    """What reward functions may ask for besides columns of the data."""
    trainer = rl_cluster.actor_trainer

    def log_metric(name: str, value: float) -> None:
        own = names.of(name, "log_metric")
        rl_cluster.buffer_metrics({own: (float(value), np.nanmean)}, mode=mode)

    def log_extra(column: str, values: list[Any]) -> None:
        if len(values) != len(work.prompts):
            raise ValueError(
                f"log_extra({column!r}): expected {len(work.prompts)} values, one per completion, "
                f"found {len(values)}"
            )
        shown = [str(value) for value in values]
        rl_cluster.buffer_metrics({f"{EXTRA}{column}": (shown, None)}, mode=mode)

    return {
        "completion_ids": [row.tolist() for row in work.completion_ids],
        "trainer_state": TrainerState(trainer.train_steps, trainer.config.max_steps),
        "log_extra": log_extra,
        "log_metric": log_metric,
    }


def wrap_generate_and_compute_advantage(original: Callable) -> Callable:
    """Keeps a batch's images at hand for rollout and log-probabilities, and in its example."""

    @functools.wraps(original)
    def generate_and_compute_advantage(self, training_input, mode=Mode.TRAIN):
        rollout = gemma4_rollout(self.rl_cluster)
        prompts = list(training_input["prompts"])
        if rollout is None or not all(isinstance(prompt, Prompt) for prompt in prompts):
            return original(self, training_input, mode)
        repeats = self._num_generations()
        batch = Bound(
            images=rollout.images([prompt.example for prompt in prompts[::repeats]]),
            image_repeats=repeats,
            temperature=_rollout_config(self.rl_cluster, mode).temperature or 1.0,
            # The host's packed examples could not tell the loss.
            suppressed=() if packs(self) else rollout.suppressed,
            count=len(prompts),
            draws=_draws(self, mode),
            off_policy=mode == Mode.TRAIN and rollout_step(self).updates > 1,
            score_rows=self._compute_logps_micro_batch_size,
        )
        if packs(self) and batch.images is not None:
            raise ValueError(
                "max_seq_token_per_tpu: the host's packing drops images; leave it None, and shape "
                "batches with train_micro_batch_size instead"
            )
        with bind(batch):
            example = with_old_logps(self, original(self, training_input, mode), batch)
        for cut in batch.truncated:
            self.rl_cluster.buffer_metrics({"completions/truncated": (cut, np.mean)}, mode=mode)
        return example if packs(self) else _with_batch(example, batch)

    return generate_and_compute_advantage


def _draws(learner: Any, mode: Mode) -> Draws:
    """Those of the rollout step; each evaluation, which `_prepare_data` begins, has the same."""
    step = learner.rl_cluster.global_steps if mode == Mode.TRAIN else _EVAL_STREAM
    drawn = vars(learner).setdefault("_drawn", {})
    if mode not in drawn or drawn[mode].step != step:
        drawn[mode] = Draws(step)
    return drawn[mode]


def _with_batch(example: Any, batch: Bound) -> Any:
    """`example` with the images and the sampler's log-probabilities, padded like completions."""
    fields = {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
    return extended(type(example))(
        **fields,
        # The host cuts examples by rows; the loss takes one row of images for each prompt again.
        images=None if batch.images is None else np.repeat(batch.images, batch.image_repeats, 0),
        rollout_logps=padded_logps(batch, example.completion_ids.shape),
        image_repeats=batch.image_repeats,
        temperature=batch.temperature,
        suppressed=batch.suppressed,
    )


def wrap_run_global_step(original: Callable) -> Callable:
    """Samples for the whole step, and reports its time and that of its rollout."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def run_global_step(self, *args: Any, **kwargs: Any) -> None:
        rollout = gemma4_rollout(self.rl_cluster)
        if rollout is None:
            return original(self, *args, **kwargs)
        sizes = signature.bind(self, *args, **kwargs).arguments
        begin(self, sizes["full_batch_size"], sizes["mini_batch_size"])
        start, before = time.perf_counter(), rollout.seconds
        original(self, *args, **kwargs)
        times = {
            "perf/step_time_sec": (time.perf_counter() - start, np.mean),
            "perf/rollout_time_sec": (rollout.seconds - before, np.mean),
        }
        self.rl_cluster.buffer_metrics(times, mode=Mode.TRAIN)

    return run_global_step


def wrap_with_loss_fn(original: Callable) -> Callable:
    """Gives losses the images of their example, and measures how the sampler agrees."""

    @functools.wraps(original)
    def with_loss_fn(self, loss_fn: Callable, has_aux: bool = False) -> Any:
        return original(self, _with_images(loss_fn) if has_aux else loss_fn, has_aux)

    return with_loss_fn


def _with_images(loss_fn: Callable) -> Callable:
    @functools.wraps(loss_fn)
    def loss(model: Any, train_example: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
        if not isinstance(train_example, InWork):
            return loss_fn(model, train_example, *args, **kwargs)
        images, repeats = train_example.images, train_example.image_repeats
        batch = Bound(
            images=None if images is None else images[::repeats],
            image_repeats=repeats,
            temperature=train_example.temperature,
            suppressed=train_example.suppressed,
        )
        with bind(batch):
            value, aux = _computed(loss_fn(model, train_example, *args, **kwargs))
        aux = aux | _agreement(batch, train_example)
        return step_mean(value, train_example), aux | {TOKENS: train_example.completion_mask.sum()}

    return loss


def _computed(out: Any) -> tuple[Any, dict[str, Any]]:
    """A loss and its metrics; newer hosts leave their divisions for later."""
    if isinstance(out, tuple):
        return out
    metrics = {
        name: value.compute() if hasattr(value, "compute") else value
        for name, value in out.aux_metrics.items()
    }
    return out.primary_loss.compute(), metrics


def _agreement(batch: Bound, example: Any) -> dict[str, Any]:
    """The mean entropy, and how far log-probabilities of sampled tokens are from the sampler's.

    In the first update on a rollout, which alone is reported, both are of one policy.
    """
    if batch.logps is None:
        return {}
    mask = example.completion_mask.astype(jnp.float32)
    count = jnp.maximum(mask.sum(), 1)
    difference = jnp.abs(batch.logps - example.rollout_logps) * mask
    return {
        "entropy": (batch.entropy * mask).sum() / count,
        f"{AGREEMENT}/mean": difference.sum() / count,
        f"{AGREEMENT}/max": difference.max(),
    }
