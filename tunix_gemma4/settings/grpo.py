# SPDX-License-Identifier: Apache-2.0
"""The settings of reinforcement learning with GRPO, GSPO, Dr.GRPO or DAPO, in TRL's words.

config = load_grpo_config(["gsm8k", "e2b", "1gpu"], ["data.path=train.jsonl", "num_generations=16"])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from omegaconf import MISSING

from ..model.shared_prompt import completions_per_row
from ..rewards import load_reward
from .common import DataSettings, MeshConfig, TrainSettings, one_of
from .load_config import Recipes, load_config

LOSS_TYPES = ("grpo", "gspo", "dr_grpo", "dapo")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclasses.dataclass
class PromptConfig(DataSettings):
    """What is asked.

    Besides those of `DataSettings`:

    Attributes:
        path: a .jsonl, .json or .parquet file of rows with `prompt` (a string or messages) or
            `messages`, whose last answer is left out and becomes the column `answer`; images as in
            supervised data; further columns go to the reward functions.
        prompt_column: read the prompt from this column instead, such as "question".
        system_prompt: put before each conversation that has none of its own.
        max_prompt_length: tokens; longer prompts are dropped and counted, never cut. Every prompt
            is padded to this, so it should not be much longer than the longest.
    """

    prompt_column: str | None = None
    system_prompt: str | None = None
    max_prompt_length: int = 512


@dataclasses.dataclass
class GrpoRunConfig(TrainSettings):
    """Reinforcement learning. Batch sizes count prompts, each with `num_generations` completions.

    Besides those of `TrainSettings`:

    Attributes:
        data: see `PromptConfig`.
        reward_functions: names of `tunix_gemma4.rewards`, some with arguments, as in
            "soft_overlong(max_length=1200, buffer=300)", "package.module:function" or
            "path/to/file.py:function". Their rewards are added; see docs/how-to/write_reward.md.
        reward_weights: a factor for each; null: 1.
        reward_timeout: seconds that a reward function may take for the completions of a batch; the
            run ends when one takes longer. null: any time, with a warning after a minute.
        loss_type: "grpo", "gspo" (one importance ratio per sequence), "dr_grpo" (advantages
            without the standard deviation, sums over a fixed length) or "dapo" (mean over tokens,
            no KL penalty, a wider clip above).
        num_generations: completions of a prompt, which are compared with each other.
        num_iterations: optimizer steps on the same completions.
        beta: weight of the KL penalty against the starting model; 0 keeps no reference.
        kl_estimator: of the penalty and of `actor/kl`: "k3", r - 1 - log r with r the reference's
            probability over the policy's, as in the paper and in TRL; "k2", half the squared
            logarithm; "k1", the logarithm, the default of Tunix's own `GRPOConfig`
            (`kl_loss_mode="kl"`), whose gradient does not pull towards the reference.
        epsilon: how far a probability ratio may fall below 1. GSPO wants about 3e-4.
        epsilon_high: how far it may rise above 1; null: like `epsilon`, and 0.28 with "dapo".
        temperature: of sampling; the log-probabilities of training are taken at it too.
        top_p, top_k: restrict sampling; null: do not.
        max_completion_length: tokens of a completion; longer ones are cut.
        batch_size: prompts of one rollout step, sampled from one policy.
        mini_batch_size: prompts of one optimizer step; null: `batch_size`.
        train_micro_batch_size: prompts of one forward and backward pass; null: `mini_batch_size`.
        rollout_micro_batch_size: prompts sampled at once; null: `train_micro_batch_size`.
        compute_logps_micro_batch_size: prompts of one forward pass of the reference; null:
            `train_micro_batch_size`.
        completions_per_row: how many completions are computed in one row with their prompt, which
            then is computed once for them; a divisor of `num_generations`, and as many rows must be
            left on every part of `mesh.fsdp`. null: the most that fit; 1: each with its prompt.
        rollout_mesh: see `MeshConfig`; sample on other devices than those of `mesh`, micro-batch by
            micro-batch while those before are trained on (with "dapo", whose mean is over all
            tokens of an optimizer step, in turn); null: on those of `mesh`, in turn.
        log_completions: print a few completions with their rewards along with each line.
    """

    data: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    reward_functions: list[str] = MISSING
    reward_weights: list[float] | None = None
    reward_timeout: float | None = None
    loss_type: str = "grpo"
    num_generations: int = 8
    num_iterations: int = 1
    beta: float = 0.0
    kl_estimator: str = "k3"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    max_completion_length: int = 256
    batch_size: int = 8
    mini_batch_size: int | None = None
    train_micro_batch_size: int | None = None
    rollout_micro_batch_size: int | None = None
    compute_logps_micro_batch_size: int | None = None
    completions_per_row: int | None = None
    rollout_mesh: MeshConfig | None = None
    log_completions: bool = False
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "constant"
    logging_steps: int = 1

    @property
    def mini(self) -> int:
        """Prompts of one optimizer step."""
        return self.mini_batch_size or self.batch_size

    @property
    def micro(self) -> int:
        """Prompts of one forward and backward pass."""
        return self.train_micro_batch_size or self.mini

    def per_row(self, prompts: int, mesh: MeshConfig | None = None) -> int:
        """How many completions of so many prompts share a row; see `completions_per_row`."""
        group, fsdp = self.completions_per_row or self.num_generations, (mesh or self.mesh).fsdp
        return completions_per_row(prompts * self.num_generations, group, fsdp)

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps between one rollout step and the next."""
        return self.batch_size // self.mini * self.num_iterations

    def steps_of_epochs(self, num_rows: int, epochs: int) -> int:
        """Optimizer steps of whole rollout steps."""
        return max(num_rows * epochs // self.batch_size, 1) * self.updates_per_batch

    def validate(self) -> None:
        """Raises ValueError for settings that cannot be meant."""
        super().validate()
        one_of("loss_type", self.loss_type, LOSS_TYPES)
        one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        self._validate_numbers()
        self._validate_rewards()
        self._validate_sizes()

    def _validate_numbers(self) -> None:
        if self.epsilon_high is not None and self.epsilon_high < self.epsilon:
            raise ValueError(
                f"epsilon_high: expected at least epsilon={self.epsilon}, found {self.epsilon_high}"
            )
        if self.loss_type == "dapo" and self.beta:
            raise ValueError(f'beta: loss_type "dapo" has no KL penalty, found {self.beta}; set 0')
        if self.lora is not None and self.lora.quantize is not None and self.beta:
            # The reference would be the kernels before they were quantised: another policy.
            raise ValueError("beta: expected 0 with lora.quantize, whose reference would differ")

    def _validate_rewards(self) -> None:
        if not self.reward_functions:
            raise ValueError("reward_functions: expected at least one, found none")
        for spec in self.reward_functions:
            try:
                load_reward(spec)
            except ValueError as error:
                raise ValueError(f"reward_functions: {error}") from error
        if self.reward_weights is not None and (
            len(self.reward_weights) != len(self.reward_functions)
        ):
            raise ValueError(
                f"reward_weights: expected one for each of {len(self.reward_functions)} "
                f"reward_functions, found {len(self.reward_weights)}"
            )

    def _validate_sizes(self) -> None:
        """The sizes divide each other, so that every part of a step has the same shape."""
        self._divides("mini_batch_size", self.mini, "batch_size", self.batch_size)
        for name in _MICRO:
            self._divides(name, vars(self)[name] or self.micro, "mini_batch_size", self.mini)
        for name in ("max_steps", "eval_steps", "save_steps"):
            steps = vars(self)[name]
            if steps is not None and steps % self.updates_per_batch:
                raise ValueError(
                    f"{name}: expected a multiple of {self.updates_per_batch}, the optimizer steps "
                    "of one rollout step (batch_size / mini_batch_size * num_iterations), found "
                    f"{steps}"
                )
        meshes = dict.fromkeys(_MICRO, self.mesh)
        meshes["rollout_micro_batch_size"] = self.rollout_mesh or self.mesh
        for name, mesh in meshes.items():
            rows = (vars(self)[name] or self.micro) * self.num_generations
            if rows % mesh.fsdp:
                raise ValueError(
                    f"{name}: expected {name} * num_generations to be a multiple of "
                    f"fsdp={mesh.fsdp}, found {rows}"
                )

        per_row = self.completions_per_row
        if per_row is None:
            return
        self._divides("completions_per_row", per_row, "num_generations", self.num_generations)
        rows = self.micro * self.num_generations // per_row
        if rows % self.mesh.fsdp:
            fitting = self.per_row(self.micro)
            raise ValueError(
                "completions_per_row: expected train_micro_batch_size * num_generations / "
                f"completions_per_row to be a multiple of fsdp={self.mesh.fsdp}, found {rows}; "
                f"{fitting} is the most that fits"
            )

    def _divides(self, name: str, part: int, of: str, whole: int) -> None:
        if whole % part:
            raise ValueError(f"{name}: expected a divisor of {of}={whole}, found {part}")


_MICRO = ("train_micro_batch_size", "rollout_micro_batch_size", "compute_logps_micro_batch_size")


def load_grpo_config(recipes: Recipes, overrides: Sequence[str] = ()) -> GrpoRunConfig:
    """Reads recipes, by name or path; see `load_config`."""
    return load_config(GrpoRunConfig, recipes, overrides, command="grpo")
