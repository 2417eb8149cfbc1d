# SPDX-License-Identifier: Apache-2.0
"""GRPO, GSPO, Dr.GRPO and DAPO: a checkpoint, prompts and rewards in, an adapter out.

tunix-gemma4 grpo gsm8k e2b 1gpu model=gemma-4-E2B-it data.path=train.jsonl
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from ..data.processor import Processor
from ..data.prompts import CONTEXT, PromptBatches, PromptRows
from ..data.road import checked_rows
from ..lora import reference_model
from ..model.gemma4 import Gemma4Model
from ..plugin.progress import Progress, compiling
from ..plugin.register import register
from ..plugin.rl.cluster import checkpoint_directory, make_algorithm, make_cluster, make_learner
from ..plugin.rl.lengths import allowed_lengths
from ..plugin.rl.report import Report
from ..plugin.rl.rewards import limited
from ..rewards import RewardFn, load_reward, source_files, weighted
from ..settings.grpo import GrpoRunConfig
from . import common
from .common import Result, say
from .compile_cache import fast_start
from .run_directory import (
    Record,
    check_file,
    check_key,
    one_way_out,
    prepare_output,
    saved_steps,
    training,
)

# What a checkpoint depends on: a run that is resumed must have the same.
_FIXED = (
    *("model", "data", "lora", "text_only", "dtype", "scan_layers", "batch_size"),
    *("mini_batch_size", "train_micro_batch_size", "num_iterations", "seed"),
    *("reward_functions", "reward_weights", "loss_type", "num_generations"),
    *("beta", "kl_estimator"),
    *("epsilon", "epsilon_high", "temperature", "top_p", "top_k", "max_completion_length"),
)
# What of these the place in the prompts is reckoned from.
_POSITION = ("batch_size", "mini_batch_size", "num_iterations")


@fast_start
@one_way_out
def run(config: GrpoRunConfig, *, after_step: Callable[[Any], None] | None = None) -> Result:
    """Trains as `config` says, resuming a run that was broken off.

    `after_step` is called with the policy's trainer once for each optimizer step; its `train_steps`
    tells how many it has taken by then.
    """
    register()
    reward_functions(config)  # What cannot be imported is named before anything is loaded.
    config = config.on_devices(jax.device_count())
    output = prepare_output(config, _FIXED, _POSITION)
    record = Record(output, config, source_files(config.reward_functions))
    mesh, rollout_mesh = make_meshes(config)
    processor = common.make_processor(config)
    common.say_of_long_images(config, processor.max_soft_tokens)
    is_older = not check_file(output, "train").is_file()
    rows = prompt_rows(config.data.path, processor, config, output)
    eval_ds = eval_batches(config, processor, output)
    first = processor.explain(processor.collate([rows.first().example], side="left"))
    say(f"{len(rows)} prompts in {config.data.path}. The first:\n{first}")

    policy, reference = prepare_models(config, common.load_base(config, mesh))
    record.settle(rows_are_known=rows.are_known)
    say_of_rows(config, policy)
    steps = config.total_steps(len(rows))
    say_of_end(config, len(rows), steps)
    with record.restoring(_FIXED):
        cluster = make_cluster(
            *(policy, reference, processor, config),
            optimizer=common.optimizer_of(config, steps),
            mesh=mesh,
            rollout_mesh=rollout_mesh,
            max_steps=steps,
        )
    Report(
        cluster,
        progress=Progress(steps, len(rows) * config.updates_per_batch / config.batch_size),
        logging_steps=config.logging_steps,
        updates_per_batch=config.updates_per_batch,
        log=say,
        log_completions=config.log_completions,
        after_step=after_step,
    )
    trainer: Any = cluster.actor_trainer
    if trainer.train_steps:
        resume(config, rows, trainer.train_steps, is_older=is_older)
    record.keep()
    if trainer.train_steps < steps:
        say(compiling("sampling, log-probabilities and the training step"))
        learner = make_learner(cluster, config, reward_functions(config))
        batches = train_batches(config, rows, trainer.train_steps)
        with training(trainer):
            learner.train(batches, eval_ds)  # pyright: ignore[reportArgumentType]

    saved = common.save(config, trainer.model, output)
    common.say_done(config, trainer.train_steps, saved, rows.left_out)
    return Result(trainer.model, processor, trainer, saved)


def make_meshes(config: GrpoRunConfig) -> tuple[Mesh, Mesh | None]:
    """The mesh to train on, and that of sampling where it is another, on the devices behind."""
    if jax.process_count() > 1:
        raise ValueError(
            f"there are {jax.process_count()} processes; the host would feed each the same rows, "
            "so reinforcement learning runs in one"
        )
    mesh = common.device_mesh(config.mesh)
    if config.rollout_mesh is None:
        common.warn_of_idle_devices(mesh.size)
        return mesh, None
    others = jax.devices()[mesh.size :]
    rollout_mesh = common.device_mesh(config.rollout_mesh, name="rollout_mesh", devices=others)
    common.warn_of_idle_devices(mesh.size + rollout_mesh.size)
    return mesh, rollout_mesh


# ---- Data.


def prompt_rows(
    path: str,
    processor: Processor,
    config: GrpoRunConfig,
    output: Path | None = None,
    name: str = "train",
) -> PromptRows:
    """The prompts of a file, checked as `data.check` says; says how many are too long.

    In `output`, that of the run, the result of the check is kept as that of `name`, "train" or
    "eval"; None keeps none.
    """
    names = {
        name for spec in config.reward_functions for name in signature(load_reward(spec)).parameters
    }
    before = None
    if output is not None and name == "train" and saved_steps(output):
        before = checked_rows(check_file(output, name))
    data = config.data
    rows = PromptRows(
        path,
        processor,
        max_prompt_length=data.max_prompt_length,
        prompt_column=data.prompt_column,
        system_prompt=data.system_prompt,
        # Held-out prompts end with their last whole batch.
        check="all" if name == "eval" else data.check,
        skip_bad_rows=data.skip_bad_rows,
        log=say,
        cache=None if output is None else check_file(output, name),
        key=check_key(config, path),
        names=names,
        before=before,
    )
    if rows.dropped:
        say(
            f"{path}: {rows.dropped} of {rows.looked_at} prompts are left out, longer "
            f"than data.max_prompt_length={config.data.max_prompt_length}"
        )
    _require_columns(config, rows.columns, path)
    return rows


def _require_columns(config: GrpoRunConfig, columns: Sequence[str], path: str) -> None:
    """Raises ValueError if a reward function asks for what no row has."""
    _, algorithm = make_algorithm(config)
    # The host offers the settings of the algorithm too.
    known = {"prompts", "completions", "mode", *CONTEXT, *columns, *vars(algorithm)}
    for spec in config.reward_functions:
        lacking = [
            parameter.name
            for parameter in signature(load_reward(spec)).parameters.values()
            if parameter.default is Parameter.empty
            and parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
            and parameter.name not in known
        ]
        if lacking:
            there = ", ".join(columns) if columns else "none"
            raise ValueError(
                f"reward_functions: {spec} asks for {', '.join(lacking)}, and no row of {path} has "
                f"such a column; the columns are: {there}"
            )


def resume(config: GrpoRunConfig, rows: PromptRows, steps_done: int, *, is_older: bool) -> None:
    """Says where a run goes on, unless its prompts are not those that it has trained on.

    `is_older`: nothing was kept with the checkpoints about the rows.
    """
    directory = checkpoint_directory(Path(config.output_dir))
    if is_older:
        refuse_older(config, rows, directory)
    rows.refuse_changed(train_batches(config, rows, steps_done), str(directory))
    common.say_resuming(config, steps_done, directory)


def refuse_older(config: GrpoRunConfig, rows: PromptRows, directory: Path) -> None:
    """Raises ValueError where an earlier version had taken the prompts in another order.

    It shuffled those that are short enough; now all are shuffled, and the others passed over.
    """
    if config.data.shuffle and len(rows.kept) < rows.num_rows:
        raise ValueError(
            f"{directory}: these checkpoints were written by an earlier version of this package, "
            "which shuffled prompts in another order where some are too long. Choose another "
            "output_dir, or finish the run with that version"
        )


def train_batches(config: GrpoRunConfig, rows: PromptRows, steps_done: int) -> PromptBatches:
    """Batches from where a run stands after `steps_done` optimizer steps."""
    # The host skips a batch for each step, also where several steps shared one.
    return PromptBatches(
        rows,
        config.batch_size,
        seed=config.seed if config.data.shuffle else None,
        skipped=steps_done * config.mini,
        start=steps_done // config.num_iterations * config.mini,
    )


def eval_batches(
    config: GrpoRunConfig, processor: Processor, output: Path | None = None
) -> PromptBatches | None:
    """Held-out prompts in batches of the size that one forward pass of training has."""
    if config.data.eval_path is None:
        return None
    rows = prompt_rows(config.data.eval_path, processor, config, output, "eval")
    whole = len(rows) // config.micro * config.micro
    if not whole:
        raise ValueError(
            f"data.eval_path: expected at least {config.micro} prompts, those of one forward "
            f"pass, found {len(rows)}"
        )
    if whole < len(rows):
        say(f"{config.data.eval_path}: {whole} of {len(rows)} prompts are used, in whole batches")
    return PromptBatches(rows, config.micro, seed=None, limit=whole)


def say_of_end(config: GrpoRunConfig, num_rows: int, steps: int) -> None:
    """Says where the epochs end first, and which prompts the last rollout step leaves or repeats.

    An epoch has `num_rows` prompts, and the run `steps` optimizer steps.
    """
    if num_rows < config.batch_size:
        say(
            f"batch_size={config.batch_size} is more than the {num_rows} prompts of "
            f"{config.data.path}: a rollout step takes some of them more than once."
        )
    if config.num_train_epochs is None:
        return
    common.say_of_epochs(config, steps)
    asked = num_rows * config.num_train_epochs
    rest = asked - steps // config.updates_per_batch * config.batch_size
    if 0 < rest < config.batch_size:
        say(
            f"{config.data.path}: the last {rest} of {asked} prompts ({config.num_train_epochs} "
            f"epochs) are left out, because they do not fill a batch_size of {config.batch_size}"
        )


def say_of_rows(config: GrpoRunConfig, policy: Gemma4Model) -> None:
    """Says how many completions share a row with their prompt, and how long rows are."""
    count, group = config.per_row(config.micro), config.num_generations
    if policy.config.wants_kernel:
        count = 1  # The log says why.
    text = f"completions_per_row: {count} of num_generations={group} share a row with their prompt"
    if count < group and config.completions_per_row is None and not policy.config.wants_kernel:
        text += (
            f"; train_micro_batch_size={config.mesh.fsdp} or a multiple of it would let all share"
            f" one on mesh.fsdp={config.mesh.fsdp}"
        )
    say(f"{text}.")
    lengths = config.data.max_prompt_length, config.max_completion_length
    asked, said = (" or ".join(map(str, allowed_lengths(limit))) for limit in lengths)
    say(
        f"A step computes {asked} tokens of prompts and {said} of completions, as many as its "
        "longest have; each combination compiles when a step first has it."
    )


# ---- Model and algorithm.


def prepare_models(
    config: GrpoRunConfig, base: Gemma4Model, log: Callable[[str], None] | None = None
) -> tuple[Gemma4Model, Gemma4Model | None]:
    """The policy, and for the KL penalty the model it starts from: the checkpoint's, `base`.

    With adapters the reference is the base, quantised if the policy's is, and the two share its
    arrays. Without, it keeps the checkpoint's own dtype, and the policy is its copy in float32.
    """
    if config.lora is None:
        policy = common.trainable(config, nnx.clone(base) if config.beta else base, log)
        reference = common.stacked(config, base) if config.beta else None
        return common.stacked(config, policy), reference
    policy = common.trainable(config, base, log)
    # Stacking makes a copy of each parameter and lets go of the original.
    del base
    policy = common.stacked(config, policy)
    return policy, reference_model(policy) if config.beta else None


def reward_functions(config: GrpoRunConfig) -> list[RewardFn]:
    """The reward functions that the settings name, weighted."""
    weights = config.reward_weights or itertools.repeat(1.0)
    functions = [
        load_reward(spec) if weight == 1 else weighted(load_reward(spec), weight)
        for spec, weight in zip(config.reward_functions, weights, strict=False)
    ]
    if config.reward_timeout is None:
        return functions
    return [limited(function, config.reward_timeout) for function in functions]
