# SPDX-License-Identifier: Apache-2.0
"""Tunix's learners on Gemma 4: images from data set to gradient, and what a step shows.

The learners are the host's own; these wrappers stand around the methods through which a batch
goes, in the order in which they stand here: made (`init`), fed (`train`), sampled and judged
(`generate_and_compute_advantage`, within it `compute_rewards`), and trained on (`run_global_step`;
the loss is in `losses`). `docs/explanation/rl_images.md` follows one on its way.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tunix.rl.rl_cluster import Mode

from ...data.keys import REFUSED
from ...data.processor import Processor
from ...data.prompts import Prompt
from ...model.gemma4 import Gemma4ForConditionalGeneration
from ..hooks import around, call_of
from .context import RolloutContext, bind, current
from .lengths import fitting_length
from .logps import known
from .losses import extended
from .metrics import AGREEMENT, MetricNames
from .prompts import IMAGE_COLUMNS, PromptReader, unwrap
from .rewards import REWARDS, checked, require_sums, without_abstained, without_spread
from .rollout import Rollout, gemma4_rollout
from .rollout_step import (
    begin,
    draws,
    evaluate_last,
    packs,
    padded_logps,
    rollout_step,
    with_old_logps,
)

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


@around
def wrap_init(original, self, *args: Any, **kwargs: Any) -> None:
    """A reward that goes wrong stops the run and names the sample.

    Metric functions get what the data set gave.
    """
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
        # The host names a function's metric after it: two of one name would share one.
        name = names.of(f"{REWARDS}{fn.__name__}", ("reward", number))
        fn.__name__ = name.removeprefix(REWARDS)
    self.metric_fns = [_metric(names, number, fn) for number, fn in enumerate(self.metric_fns)]
    self.metric_names = names


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


@around
def wrap_train(original, self, train_ds: Iterable, eval_ds=None, *args, **kwargs) -> None:
    """Prompts and images of any form are read before the host moves them about.

    The policy that training leaves is evaluated like those before.
    """
    cluster = self.rl_cluster
    rollout = gemma4_rollout(cluster)
    if rollout is None:
        if isinstance(cluster.actor_trainer.model, Gemma4ForConditionalGeneration):
            engine = type(cluster.rollout).__name__
            train_ds = Read(train_ds, functools.partial(_without_images, engine))
        return original(self, train_ds, eval_ds, *args, **kwargs)
    if not packs(self):
        trainer = cluster.actor_trainer
        trainer.with_rl_metrics_to_log(trainer.rl_metrics_to_log | METRICS)
    names = _asked_for(self.reward_manager.reward_fns)
    train_ds = Read(train_ds, reader_of(cluster, rollout, Mode.TRAIN, names).read)
    if eval_ds is not None:
        eval_ds = Read(eval_ds, reader_of(cluster, rollout, Mode.EVAL, names).read)
    given = call_of(original, self, train_ds, eval_ds, *args, **kwargs).arguments
    # The host closes the cluster, and with it the metrics, at the end of `train`: what is still to
    # be done then goes with the cluster, whose `close` does it first.
    skip_jit = bool(given.get("skip_jit"))
    cluster.before_close = functools.partial(evaluate_last, self, eval_ds, skip_jit)
    try:
        return original(self, train_ds, eval_ds, *args, **kwargs)
    finally:
        vars(cluster).pop("before_close", None)


def reader_of(
    rl_cluster: Any, rollout: Rollout, mode: Mode, names: Collection[str] = ()
) -> PromptReader:
    """Of the prompts of a mode; `names` are columns that reward functions ask for."""
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


class Read:
    """A data set whose batches `read` takes as they come, as often as it can be iterated."""

    def __init__(self, dataset: Iterable, read: Callable[[Any], Any]):
        self._dataset, self._read = dataset, read

    def __iter__(self) -> Iterator[Any]:
        return map(self._read, self._dataset)


def _without_images(engine: str, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch for a rollout engine that would drop its images."""
    found = [name for name in IMAGE_COLUMNS if name in batch]
    if found:
        raise ValueError(
            f"column {found[0]!r}: {engine} would drop the images; call "
            'tunix_gemma4.register() and make the cluster with rollout_engine="vanilla"'
        )
    return batch


@around
def wrap_generate(original, self, training_input, mode=Mode.TRAIN):
    """Images reach rollout, log-probabilities and example (GRPO, GSPO, Dr.GRPO, DAPO).

    The host's method samples, scores, rewards and makes an example of one batch, and hands to none
    of these what its prompts are made of. They find it in the context that is bound here.
    """
    rollout = gemma4_rollout(self.rl_cluster)
    prompts = list(training_input["prompts"])
    if rollout is None or not all(isinstance(prompt, Prompt) for prompt in prompts):
        return original(self, training_input, mode)
    # The host has each prompt as often as it has completions: PPO once.
    repeats = self._num_generations()
    limit = _rollout_config(self.rl_cluster, mode).max_prompt_length
    longest = max(len(prompt.example.tokens) for prompt in prompts)
    context = RolloutContext(
        images=rollout.images([prompt.example for prompt in prompts[::repeats]]),
        image_repeats=repeats,
        group=1 if packs(self) else rollout.group_of(repeats),
        columns=(0 if packs(self) else fitting_length(longest, limit), 0),
        temperature=_rollout_config(self.rl_cluster, mode).temperature or 1.0,
        # The host's packed examples could not tell the loss.
        suppressed=() if packs(self) else rollout.suppressed,
        count=len(prompts),
        draws=draws(self, mode, len(prompts)),
        off_policy=mode == Mode.TRAIN and rollout_step(self).updates > 1,
        score_rows=self._compute_logps_micro_batch_size,
    )
    if packs(self) and context.images is not None:
        raise ValueError(
            "max_seq_token_per_tpu: the host's packing drops images; leave it None, and shape "
            "batches with train_micro_batch_size instead"
        )
    with bind(context):
        example = with_old_logps(self, original(self, training_input, mode), context)
    # Outside of the context, in which a mean counts as often as there are rows.
    for cut in context.record.truncated:
        self.rl_cluster.buffer_metrics({"completions/truncated": (cut, np.mean)}, mode=mode)
    return example if packs(self) else _with_batch(example, context, rollout.pad_id())


def _with_batch(example: Any, context: RolloutContext, pad_id: int) -> Any:
    """`example` with the images and the sampler's log-probabilities, padded like completions.

    From here on the host carries them: what was bound ends with the batch, and the loss, which is
    compiled, takes no more than its arguments.
    """
    fields = {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
    images, repeats = context.images, context.image_repeats
    group, columns = known(example.prompt_ids, example.completion_ids, context, pad_id)
    return extended(type(example))(
        **fields,
        # The host cuts examples by rows; the loss takes one row of images for each prompt again.
        images=None if images is None else np.repeat(images, repeats, 0),
        rollout_logps=padded_logps(context.record, example.completion_ids.shape),
        image_repeats=repeats,
        group=group,
        columns=columns,
        temperature=context.temperature,
        suppressed=context.suppressed,
    )


@around
def wrap_compute_rewards(original, self, prompts, completions, mode, step=None, **columns):
    """Reward functions get the data set's own columns.

    The spread of rewards is reported.
    """
    context = current()
    if context is None or not any(isinstance(prompt, Prompt) for prompt in prompts):
        return original(self, prompts, completions, mode, step, **columns)
    # The host logs prompts, so it gets their texts, and functions find the prompts themselves.
    texts = [prompt.text for prompt in prompts]
    given = unwrap(list(prompts))
    offered = _for_rewards(self.rl_cluster, context, len(given), mode, self.metric_names)
    columns = {name: _plain(value) for name, value in columns.items()}
    with bind(dataclasses.replace(context, prompts=given, for_rewards=offered)):
        found = original(self, texts, completions, mode, step, **columns)
    require_sums(found)
    generations = self._num_generations()
    rewards = without_abstained(found, groups=generations > 1)
    groups = [group[~np.isnan(group)] for group in found.reshape(-1, generations)]
    for reward in np.concatenate(groups):
        # One by one, so that it is the spread of the step, in how many pieces it may come.
        self.rl_cluster.buffer_metrics({"rewards/score/std": (reward, np.std)}, mode=mode)
    if generations > 1:
        flat = np.mean([without_spread(group) for group in groups])
        metric = {"rewards/groups_without_spread": (flat, np.mean)}
        self.rl_cluster.buffer_metrics(metric, mode=mode)
    return rewards


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """How far a run is, for reward functions; the names are transformers'.

    Attributes:
        global_step: optimizer steps taken.
        max_steps: of the run; None: not known.
    """

    global_step: int
    max_steps: int | None


def _for_rewards(
    rl_cluster: Any, context: RolloutContext, count: int, mode: Mode, names: MetricNames
) -> dict[str, Any]:
    """What reward functions may ask for besides columns of the data."""
    trainer = rl_cluster.actor_trainer

    def log_metric(name: str, value: float) -> None:
        own = names.of(name, "log_metric")
        rl_cluster.buffer_metrics({own: (float(value), np.nanmean)}, mode=mode)

    def log_extra(column: str, values: list[Any]) -> None:
        if len(values) != count:
            raise ValueError(
                f"log_extra({column!r}): expected {count} values, one per completion, found "
                f"{len(values)}"
            )
        shown = [str(value) for value in values]
        rl_cluster.buffer_metrics({f"{EXTRA}{column}": (shown, None)}, mode=mode)

    return {
        "completion_ids": [row.tolist() for row in context.record.completion_ids],
        "trainer_state": TrainerState(trainer.train_steps, trainer.config.max_steps),
        "log_extra": log_extra,
        "log_metric": log_metric,
    }


@around
def wrap_run_global_step(original, self, *args: Any, **kwargs: Any) -> None:
    """The time of a step and of its rollout among the metrics.

    Sampling is told of the whole step's sizes.
    """
    rollout = gemma4_rollout(self.rl_cluster)
    if rollout is None:
        return original(self, *args, **kwargs)
    sizes = call_of(original, self, *args, **kwargs).arguments
    begin(self, sizes["full_batch_size"], sizes["mini_batch_size"])
    start, before = time.perf_counter(), rollout.seconds
    original(self, *args, **kwargs)
    times = {
        "perf/step_time_sec": (time.perf_counter() - start, np.mean),
        "perf/rollout_time_sec": (rollout.seconds - before, np.mean),
    }
    return self.rl_cluster.buffer_metrics(times, mode=Mode.TRAIN)
