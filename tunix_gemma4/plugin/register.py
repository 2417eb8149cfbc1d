# SPDX-License-Identifier: Apache-2.0
"""Every wrapper on Tunix, in one table, and the switch.

Nothing of the host changes before `register()`; `unregister()` puts everything back.
"""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from collections.abc import Sequence

from . import automodel, checkpoints, cli, engines, health, lora, placement, train_step
from .hooks import Hook, Installed, on
from .rl import (
    gate,
    learner,
    logps,
    losses,
    metrics,
    preferences,
    report as rl_report,
    rewards,
    rollout,
    rollout_step,
)
from .sft import trainer
from .version import doubt, found

# Why each is there is said where it stands, in the first sentence.
HOOKS: tuple[Hook, ...] = (
    *on(
        "tunix.models.automodel:",
        ("get_model_module", automodel.wrap_get_model_module, "model_name module_type"),
        (
            "download_model",
            automodel.wrap_download_model,
            "model_id_or_path model_download_path model_source",
        ),
        (
            "AutoModel.from_pretrained",
            automodel.wrap_from_pretrained,
            "model_id mesh model_source model_path model_download_path kwargs",
        ),
    ),
    *on(
        "tunix.cli.config:HyperParameters.",
        ("_load_config_from_yaml", cli.wrap_load_config_from_yaml, "config_path"),
        ("_validate_tokenizer", cli.wrap_validate_tokenizer, ""),
        ("check_supported_workflow", cli.wrap_check_supported_workflow, ""),
    ),
    *on(
        "tunix.cli.utils.model:",
        ("create_model", cli.wrap_create_model, "model_config tokenizer_config mesh"),
        ("apply_lora_to_model", cli.wrap_apply_lora_to_model, "base_model mesh lora_config"),
    ),
    *on("qwix:", ("apply_lora_to_model", lora.wrap_apply_lora_to_model, "model provider")),
    *on(
        "tunix.generate.mappings:MappingConfig.",
        ("from_model", engines.wrap_from_model, "model backend overrides"),
    ),
    *on(
        "tunix.utils.mesh:",
        ("allocate_named_mesh_device_slices", cli.wrap_allocate, "mesh_requirements devices"),
    ),
    *on(
        "tunix.rl.common:",
        (
            "compute_per_token_logps",
            logps.wrap_compute_per_token_logps,
            "graphdef state prompt_tokens completion_tokens pad_id eos_id images stop_gradient "
            "return_logits|return_entropy segment_ids segment_positions temperature",
        ),
        ("compute_score", logps.wrap_score, "model prompt_tokens completion_tokens segment_ids"),
        (
            "get_per_token_logps",
            preferences.wrap_get_per_token_logps,
            "model input_tokens positions attn_mask logits_to_keep images",
        ),
    ),
    Hook(
        "tunix.rl.common:_model_accepts_segment_ids",
        gate.wrap_model_accepts_segment_ids,
        (),
        optional=True,
    ),
    Hook(
        "tunix.rl.algo_core:compute_entropy_from_logits",
        logps.wrap_compute_entropy_from_logits,
        ("logits",),
        optional=True,
    ),
    *on(
        "tunix.sft.dpo.dpo_trainer:",
        (
            "dpo_loss_fn",
            preferences.wrap_dpo_loss_fn,
            "model train_example algorithm beta lambda_orpo label_smoothing",
        ),
        (
            "compute_logps",
            preferences.wrap_compute_logps,
            "model input_ids positions attention_mask logits_to_keep completion_mask images",
        ),
        ("DPOTrainer._prepare_inputs", preferences.wrap_prepare_inputs, "training_input"),
    ),
    *on(
        "tunix.rl.rollout.vanilla_rollout:",
        ("VanillaRollout", rollout.wrap_vanilla_rollout, ""),
    ),
    *on(
        "tunix.rl.rl_cluster:RLCluster.",
        ("__init__", placement.wrap_cluster_init, "actor cluster_config"),
        ("_init_backbone_sharing_map", placement.wrap_backbone_sharing_map, "actor reference"),
        ("_load_model", placement.wrap_load_model, "model_or_path mesh data_type"),
        ("get_old_per_token_logps", rollout_step.wrap_old_logps, "prompt_tokens completion_tokens"),
        ("update_actor", rollout_step.wrap_update, "train_ds eval_ds skip_jit"),
        (
            "update_critic",
            rollout_step.wrap_update,
            "train_ds eval_ds skip_jit",
            "Likewise of a critic",
        ),
        ("buffer_metrics", metrics.wrap_cluster_buffer_metrics, "metrics mode"),
        ("close", rollout_step.wrap_close, ""),
    ),
    *on(
        "tunix.rl.rl_learner:RLLearner.",
        ("__init__", learner.wrap_init, "rl_cluster|rl_engine reward_fns metric_fns"),
        ("train", learner.wrap_train, "train_ds eval_ds"),
        ("_run_global_step", learner.wrap_run_global_step, "full_batch_size mini_batch_size"),
        (
            "_prepare_data",
            rollout_step.wrap_prepare_data,
            "iterator proceed_num_steps sample_repeat batch_repeat service_target_batch_size "
            "data_queue async_loading mode",
        ),
        ("_compute_rewards", learner.wrap_compute_rewards, "prompts completions mode step"),
    ),
    *on(
        "tunix.rl.reward_manager:SequenceRewardManager.",
        ("_compute_rewards", rewards.wrap_reward_manager, "prompts completions"),
    ),
    *on(
        "tunix.rl.function_registry:",
        ("get_advantage_estimator", rewards.wrap_get_advantage_estimator, "name"),
    ),
    *on(
        "tunix.rl.grpo.grpo_learner:GRPOLearner.",
        ("_generate_and_compute_advantage", learner.wrap_generate, "training_input mode"),
    ),
    *on(
        "tunix.rl.ppo.ppo_learner:",
        (
            "PPOLearner._generate_and_compute_advantage",
            learner.wrap_generate,
            "training_input mode",
            "Images reach rollout, log-probabilities and example (PPO)",
        ),
        ("jnp", losses.wrap_jnp, ""),
    ),
    *on(
        "tunix.rl.trainer:Trainer.",
        ("with_loss_fn", losses.wrap_with_loss_fn, "loss_fn has_aux"),
        ("_post_process_train_step", metrics.wrap_post_process_train_step, "aux"),
        ("_post_process_eval_step", metrics.wrap_post_process_eval_step, "aux"),
    ),
    *on(
        "tunix.sft.peft_trainer:PeftTrainer.",
        ("_shard_optimizer", placement.wrap_shard_optimizer, "mesh"),
        ("_train_step", metrics.wrap_train_step, "model optimizer inputs"),
        ("_buffer_metrics", metrics.wrap_norm, "metrics_buffer loss step additional_metrics"),
        ("jit_train_and_eval_step", train_step.wrap_jit_train_and_eval_step, "skip_jit"),
        ("close", health.wrap_close, ""),
    ),
    *on(
        "tunix.sft.checkpoint_manager:CheckpointManager.",
        ("save", health.wrap_save, "step model optimizer save_only_lora_params force"),
    ),
)

# What these override is checked with the hooks.
EXTENDED = (
    trainer.Gemma4Trainer,
    trainer.PositionedData,
    checkpoints.CheckpointManager,
    rollout.Rollout,
    rl_report.Report,
)

_INSTALLED = Installed()


def register() -> None:
    """Makes Tunix find and train this Gemma 4. A second call changes nothing.

    Raises:
        RuntimeError: on a Tunix whose functions are not those that are wrapped or overridden,
            naming them, or that does not come by them when it looks for a model. Nothing is
            wrapped then.
    """
    if _INSTALLED:
        return
    _INSTALLED.install(HOOKS)
    doubtful = doubt(found())
    if doubtful is not None:
        warnings.warn(doubtful, stacklevel=2)
    try:
        automodel.probe()
    except Exception:
        _INSTALLED.restore()
        raise


def unregister() -> None:
    """Puts Tunix back as it was."""
    _INSTALLED.restore()


def status() -> str:
    """What is wrapped at the moment, a line each."""
    hooks = _INSTALLED.hooks()
    if not hooks:
        return "tunix_gemma4 is not registered"
    return "\n".join(f"{hook.target}: {hook.why}" for hook in hooks)


def run(target: str, arguments: Sequence[str]) -> None:
    """Runs a module or a script as `python -m MODULE` or `python SCRIPT` would, registered.

    The target is a module's dotted name or a script's path; the program finds `arguments` in
    `sys.argv` behind its own name. What it raises, `SystemExit` included, is not caught.
    """
    register()
    sys.argv = [target, *arguments]
    is_script = target.endswith(".py") or os.sep in target
    # The interpreter put the place of this command first; the program expects its own.
    sys.path.insert(0, os.path.dirname(os.path.abspath(target)) if is_script else os.getcwd())
    if is_script:
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
