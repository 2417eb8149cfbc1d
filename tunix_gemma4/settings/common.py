# SPDX-License-Identifier: Apache-2.0
"""What the settings of every recipe have in common."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from omegaconf import MISSING

from ..config.domains import require_fields
from ..config.parts import ATTENTION_IMPLEMENTATIONS, RematConfig
from ..data.road import rows_to_check
from ..lora.adapters import LoraConfig

AUTO = "auto"  # The user's own cache directory.
SCHEDULES = ("constant", "linear", "cosine")
ON_NONFINITE = ("stop", "skip")


@dataclasses.dataclass
class MeshConfig:
    """How many devices take part: fsdp * tp.

    Attributes:
        fsdp: parts into which rows of a batch, and parameters, are split. The rows of a forward
            pass must be a multiple. -1: as many as the devices that are left make, with `tp` and
            without those of another mesh.
        tp: parts into which heads, MLPs and vocabulary are split.
    """

    fsdp: int = 1
    tp: int = 1

    def on_devices(self, count: int, name: str = "mesh") -> Self:
        """The same with a number in place of -1; raises ValueError where there is none.

        Args:
            count: devices that are left for it.
            name: of the setting, for messages.
        """
        if self.fsdp != -1:
            return self
        if count <= 0 or count % self.tp:
            found = "no device is left" if count <= 0 else f"{count} are left"
            raise ValueError(
                f"{name}.fsdp: -1 takes all devices that are left, in parts of "
                f"{name}.tp={self.tp}, and {found}"
            )
        return dataclasses.replace(self, fsdp=count // self.tp)


@dataclasses.dataclass
class DataSettings:
    """What the rows of every run have.

    Attributes:
        path: a .jsonl, .json or .parquet file of rows.
        eval_path: the like, held out; null evaluates nothing.
        max_soft_tokens: most tokens an image becomes: 70, 140, 280, 560 or 1120; null: what the
            checkpoint's processor_config.json says, or 280.
        transformers_alpha: drop the transparency of images, as transformers does, instead of
            laying them on white.
        thinking: tell the model to think before it answers; the chat template's `enable_thinking`.
        chat_template_kwargs: other arguments of the chat template; a row's own go before them.
        shuffle: a new order each epoch.
        check: which rows are read before the first step, so that what is wrong is said then, with a
            summary: "all", a number of rows spread over the file (and of every other row its form
            and the files of its images), or false; null: all of fewer than 20,000, otherwise 2,000.
            The result is kept with the checkpoints. Steps, and so the learning rate, are planned
            from it: exactly where all rows were checked. Held-out prompts are all checked.
        skip_bad_rows: leave out rows that cannot be read, and count them, in place of an error.
    """

    path: str = MISSING
    eval_path: str | None = None
    max_soft_tokens: int | None = None
    transformers_alpha: bool = False
    thinking: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    shuffle: bool = True
    # Not compared: a run that is resumed may change them.
    check: Any = dataclasses.field(default=None, compare=False)
    skip_bad_rows: bool = dataclasses.field(default=False, compare=False)


@dataclasses.dataclass
class TrainSettings:
    """What every run has.

    Attributes:
        model: checkpoint directory, as Hugging Face writes it, with a chat template (an -it one).
        output_dir: receives adapter/ or model/, checkpoints/, tensorboard/ and run_config.yaml.
        data: the rows; of each recipe its own.
        lora: see `tunix_gemma4.LoraConfig`; null trains every parameter.
        mesh: see `MeshConfig`.
        text_only: leave the vision tower out, which saves its memory where there are no images.
        dtype: of activations, "bfloat16" or "float32"; null: the checkpoint's own. With full
            fine-tuning the parameters are float32 whatever this is, because bfloat16 would lose
            small updates, and are saved in the checkpoint's own dtype.
        remat: what the backward pass computes again: "none", "block" (attention) or "decoder"
            (every layer), which takes a third more time and by far the least memory.
        attention_implementation: "auto", "xla", "splash" (a kernel for TPU) or "triton" (one for
            GPUs, forward); see docs/explanation/attention.md.
        scan_layers: run the decoder as a loop over blocks of layers, so that equal layers are
            compiled once; see `tunix_gemma4.stack_layers`. Adapters must then be the same in
            every block.
        merge: with LoRA, also save model/, the adapter merged into the base.
        max_steps: optimizer steps; null: until the epochs end.
        num_train_epochs: passes over the data; null: until `max_steps`. Given both, what comes
            first ends the run, and where that is the epochs it is said.
        learning_rate: the highest. 2e-4 suits supervised LoRA; full fine-tuning wants about 1e-5.
        lr_scheduler_type: "constant", "linear" or "cosine", the latter two down to zero.
        warmup_steps: steps until the highest rate.
        weight_decay: AdamW's, on matrices only; 0 as is usual in fine-tuning.
        adam_beta1, adam_beta2, adam_epsilon: AdamW's; the usual values.
        max_grad_norm: gradients are scaled down to this norm; 0 or null: never.
        on_nonfinite: what a loss, a gradient or a state that is NaN or infinite does: "stop" ends
            the run with its step and the likely cause, and saves nothing of it; "skip" lets the
            step change nothing, counts it and goes on. A resumed run may have another, so one that
            was stopped can go on without that step.
        max_skipped_steps: with "skip", the run ends when more steps than these were skipped.
        logging_steps: steps between lines of text.
        eval_steps: steps between evaluations; there is one before the first.
        save_steps: steps between checkpoints; there is one after the last.
        save_total_limit: checkpoints that are kept, the newest.
        keep_steps: steps whose checkpoints are kept besides; each a multiple of `save_steps`.
        resume_from_checkpoint: go on from the latest checkpoint in `output_dir`, if there is one;
            see docs/how-to/resume.md.
        allow_changes: resume although settings or files that the checkpoints depend on are others
            now, as after the correction of a reward function; says which. Not where the place in
            the data or the shape of what is trained depends on them:
            docs/how-to/resume.md#what-must-be-the-same.
        report_to: "tensorboard" (files; their viewer is `pip install tensorboard`), "wandb" (extra
            `wandb`) or "none".
        seed: of the data's order, of what is sampled and of the adapter's initial values.
        compilation_cache_dir: keeps compiled programs for the next start; null: keeps none. "auto"
            is tunix_gemma4/compilation in `$XDG_CACHE_HOME` or ~/.cache. What
            `JAX_COMPILATION_CACHE_DIR` names is used instead. See docs/how-to/compile_time.md.
    """

    model: str = MISSING
    output_dir: str = MISSING
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    lora: LoraConfig | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    text_only: bool = False
    dtype: str | None = None
    remat: str = "decoder"
    attention_implementation: str = "auto"
    scan_layers: bool = False
    merge: bool = False
    max_steps: int | None = None
    num_train_epochs: int | None = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    on_nonfinite: str = "stop"
    max_skipped_steps: int = 10
    logging_steps: int = 10
    eval_steps: int = 100
    save_steps: int = 100
    save_total_limit: int = 3
    keep_steps: list[int] = dataclasses.field(default_factory=list)
    resume_from_checkpoint: bool = True
    allow_changes: bool = False
    report_to: str = "tensorboard"
    seed: int = 0
    compilation_cache_dir: str | None = AUTO

    def total_steps(self, num_rows: int, steps_per_epoch: int | None = None) -> int:
        """Optimizer steps until `max_steps` or the end of the epochs, whichever comes first.

        Args:
            num_rows: of the file.
            steps_per_epoch: where the data tells. Reckoned from `num_rows` there are more, by the
                rows that are left out, and fewer, by the rest of each bucket at an epoch's end.
        """
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.num_train_epochs is not None and steps_per_epoch is not None:
            limits.append(steps_per_epoch * self.num_train_epochs)
        elif self.num_train_epochs is not None:
            limits.append(self.steps_of_epochs(num_rows, self.num_train_epochs))
        return min(limits)

    def steps_of_epochs(self, num_rows: int, epochs: int) -> int:
        """Optimizer steps that a recipe takes with so many rows."""
        raise NotImplementedError(f"{type(self).__name__} is no recipe's: give max_steps alone")

    def on_devices(self, count: int) -> Self:
        """The same, on so many devices, with a number in place of `fsdp: -1`.

        Raises ValueError where there is none.
        """
        meshes = {"mesh": self.mesh, "rollout_mesh": getattr(self, "rollout_mesh", None)}
        meshes = {name: mesh for name, mesh in meshes.items() if mesh is not None}
        open_ones = [name for name, mesh in meshes.items() if mesh.fsdp == -1]
        if not open_ones:
            return self
        name = open_ones[0]
        if len(open_ones) > 1:
            raise ValueError("mesh.fsdp, rollout_mesh.fsdp: expected -1 for one of them, not both")
        mesh = meshes.pop(name)
        left = count - sum(other.fsdp * other.tp for other in meshes.values())
        changed = {name: mesh.on_devices(left, name)}
        result = dataclasses.replace(self, **changed)
        result.validate()
        return result

    def validate(self) -> None:
        """Raises ValueError for settings that cannot be meant."""
        if self.max_steps is None and self.num_train_epochs is None:
            raise ValueError("max_steps, num_train_epochs: both are null; give at least one")
        require_fields(self)
        rows_to_check(self.data.check, 1)
        places = {"model": self.model, "output_dir": self.output_dir, "data.path": self.data.path}
        for name, place in places.items():
            if not place.strip():
                raise ValueError(f"{name}: expected a path, found {place!r}")
        RematConfig.parse(self.remat, "remat")
        one_of("attention_implementation", self.attention_implementation, ATTENTION_IMPLEMENTATIONS)
        one_of("dtype", self.dtype, (None, "bfloat16", "float32"))
        one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        one_of("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        one_of("report_to", self.report_to, ("tensorboard", "wandb", "none"))
        never = [step for step in self.keep_steps if step % self.save_steps]
        if never:
            raise ValueError(
                f"keep_steps: expected multiples of save_steps={self.save_steps}, the steps that "
                f"are saved, found {never[0]}"
            )
        if self.merge and self.lora is None:
            raise ValueError("merge: true needs lora; without an adapter model/ is saved anyway")


def one_of(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    """Raises ValueError for another value."""
    if value not in allowed:
        listed = ", ".join("null" if choice is None else choice for choice in allowed)
        raise ValueError(f"{name}: expected one of {listed}, found {value!r}")
