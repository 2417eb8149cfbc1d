# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: dataclasses, read from YAML with dotted overrides.

config = load_run_config("e2b_lora_image.yaml", ["model=gemma-4-E2B-it", "lora.rank=32"])
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from ..config_parts import RematConfig
from ..host.optimizer import SCHEDULES

# What other trainers call our fields; difflib alone would not find these.
_SYNONYMS = {
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "model_name_or_path": "model",
    "dataset_name": "data.path",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "max_soft_tokens": "data.max_soft_tokens",
    "lora_r": "lora.rank",
    "r": "rank",
    "lora_alpha": "lora.alpha",
    "lora_target_modules": "lora.targets",
    "target_modules": "targets",
    "load_in_4bit": "lora.quantize",
    "load_in_8bit": "lora.quantize",
    "bf16": "dtype",
    "gradient_checkpointing": "remat",
    "lr": "learning_rate",
    "num_epochs": "num_train_epochs",
    "overwrite_output_dir": "output_dir",
}


@dataclasses.dataclass
class DataConfig:
    """What is learnt.

    Attributes:
        path: a .jsonl, .json or .parquet file of rows with `messages`.
        eval_path: the like, held out; null evaluates nothing.
        max_length: tokens; longer rows are dropped and counted, never cut.
        max_soft_tokens: most tokens an image becomes: 70, 140, 280, 560 or 1120. 280 is what the
            released checkpoints use by default.
        image_buckets: allowed numbers of images per row of a batch; each compiles once.
        bucket_lengths: allowed numbers of tokens per row; each compiles once. null: powers of two
            from 64, and `max_length`.
        shuffle: a new order each epoch.
    """

    path: str = MISSING
    eval_path: str | None = None
    max_length: int = 2048
    max_soft_tokens: int = 280
    image_buckets: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2, 4, 8])
    bucket_lengths: list[int] | None = None
    shuffle: bool = True


@dataclasses.dataclass
class LoraSettings:
    """A low-rank adapter; see `tunix_gemma4.LoraConfig`.

    Attributes:
        rank: columns of A and rows of B.
        alpha: the update is scaled by alpha / rank; twice the rank is the usual choice.
        targets: "language", "vision", "all", or a regular expression over module names.
        quantize: "nf4" or "int8" keeps the adapted kernels in 4 or 8 bits (QLoRA); null as they
            are.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = "language"
    quantize: str | None = None


@dataclasses.dataclass
class MeshConfig:
    """How many devices take part: fsdp * tp.

    Attributes:
        fsdp: parts into which rows of a batch, and parameters, are split. `batch_size` must be a
            multiple.
        tp: parts into which heads, MLPs and vocabulary are split.
    """

    fsdp: int = 1
    tp: int = 1


@dataclasses.dataclass
class RunConfig:
    """Supervised fine-tuning. A step is an optimizer step of `gradient_accumulation_steps` batches.

    Attributes:
        model: checkpoint directory, as Hugging Face writes it, with a chat template (an -it one).
        output_dir: receives adapter/ or model/, checkpoints/, tensorboard/ and run_config.yaml.
        data: see `DataConfig`.
        lora: see `LoraSettings`; null trains every parameter.
        mesh: see `MeshConfig`.
        text_only: leave the vision tower out, which saves its memory where there are no images.
        dtype: of activations, "bfloat16" or "float32"; null: the checkpoint's own. With full
            fine-tuning the parameters are float32 whatever this is, because bfloat16 would lose
            small updates, and are saved in the checkpoint's own dtype.
        remat: what the backward pass computes again: "none", "block" (attention) or "decoder"
            (every layer), which takes a third more time and by far the least memory.
        merge: with LoRA, also save model/, the adapter merged into the base.
        batch_size: rows of one forward pass, of all devices together.
        gradient_accumulation_steps: forward passes per step.
        max_steps: steps; null: until the epochs end.
        num_train_epochs: passes over the data; null: until `max_steps`. Given both, what comes
            first ends the run.
        learning_rate: the highest. 2e-4 suits LoRA; full fine-tuning wants about 1e-5.
        lr_scheduler_type: "constant", "linear" or "cosine", the latter two down to zero.
        warmup_steps: steps until the highest rate.
        weight_decay: AdamW's, on matrices only; 0 as is usual in fine-tuning.
        adam_beta1, adam_beta2, adam_epsilon: AdamW's; the usual values.
        max_grad_norm: gradients are scaled down to this norm; null: never.
        logging_steps: steps between lines of text.
        eval_steps: steps between evaluations; there is one before the first and after the last.
        save_steps: steps between checkpoints; there is one after the last.
        save_total_limit: checkpoints that are kept.
        resume_from_checkpoint: go on from the latest checkpoint in `output_dir`, if there is one.
        report_to: "tensorboard", "wandb" or "none".
        seed: of the data's order and of the adapter's initial values.
    """

    model: str = MISSING
    output_dir: str = MISSING
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoraSettings | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    text_only: bool = False
    dtype: str | None = None
    remat: str = "decoder"
    merge: bool = False
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
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
    logging_steps: int = 10
    eval_steps: int = 100
    save_steps: int = 100
    save_total_limit: int = 3
    resume_from_checkpoint: bool = True
    report_to: str = "tensorboard"
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError for settings that cannot be meant."""
        if self.max_steps is None and self.num_train_epochs is None:
            raise ValueError("max_steps, num_train_epochs: both are null; give at least one")
        RematConfig.parse(self.remat)
        choices = {
            "dtype": (None, "bfloat16", "float32"),
            "lr_scheduler_type": SCHEDULES,
            "report_to": ("tensorboard", "wandb", "none"),
        }
        for name, allowed in choices.items():
            value = vars(self)[name]
            if value not in allowed:
                listed = ", ".join("null" if choice is None else choice for choice in allowed)
                raise ValueError(f"{name}: expected one of {listed}, found {value!r}")
        counts = {name: vars(self)[name] for name in _COUNTS}
        counts |= {f"mesh.{name}": size for name, size in vars(self.mesh).items()}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")
        if self.merge and self.lora is None:
            raise ValueError("merge: true needs lora; without an adapter model/ is saved anyway")


_COUNTS = (
    *("batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit"),
)


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies overrides such as `data.max_length=1024`.

    Raises:
        ValueError: an unknown key, with the nearest known one; a value of the wrong type; a key
            without a value that needs one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file (current folder: {Path.cwd()})")
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r}: expected key=value, such as learning_rate=1e-4")
    config = OmegaConf.structured(RunConfig)
    try:
        given = OmegaConf.load(path)
    except Exception as error:  # YAML's own errors have no common class that omegaconf exports.
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(given, DictConfig):
        raise ValueError(f"{path}: expected keys and values, found a list")
    config = _merge(config, given, str(path))
    config = _merge(config, OmegaConf.from_dotlist(list(overrides)), "the command line")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(
            f"{path}: {', '.join(missing)} must be given, in the file or as {missing[0]}=..."
        )
    result = OmegaConf.to_object(config)
    result.validate()
    return result


def to_yaml(config: RunConfig) -> str:
    """All settings, as `load_run_config` reads them."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _merge(config: DictConfig, given: DictConfig, source: str) -> DictConfig:
    try:
        return OmegaConf.merge(config, given)
    except ConfigKeyError as error:
        raise ValueError(f"{source}: {_unknown(error.full_key)}") from error
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{source}: {key}{reason}") from error


def _unknown(key: str) -> str:
    """`key` is unknown; the nearest key that is known."""
    known = list(_keys(RunConfig))
    last = key.split(".")[-1]
    nearest = _SYNONYMS.get(key) or _SYNONYMS.get(last)
    if nearest is None or nearest not in known:
        # A key may be right but stand at the wrong level.
        at_other_level = [name for name in known if name.split(".")[-1] == last]
        close = at_other_level or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        nearest = close[0] if close else None
    hint = f"did you mean {nearest!r}?" if nearest else f"known are {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        section = _SECTIONS.get(field.name) if not prefix else None
        if section is None:
            yield prefix + field.name
        else:
            yield field.name
            yield from _keys(section, f"{field.name}.")


_SECTIONS = {"data": DataConfig, "lora": LoraSettings, "mesh": MeshConfig}
