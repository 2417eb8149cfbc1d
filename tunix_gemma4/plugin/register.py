# SPDX-License-Identifier: Apache-2.0
"""Every wrapper on Tunix, in one table, and the switch.

Nothing of the host changes before `register()`; `unregister()` puts everything back.
"""

from __future__ import annotations

import warnings

from . import automodel, checkpoints, cli, health, qwix_lora, train_step
from . import engines as mappings
from . import placement as meshes
from .hooks import Hook, Installed
from .rl import learner, logps, micro_batches, orpo, ppo, rewards, rollout, rollout_step
from .rl import report as rl_report
from .sft import trainer
from .version import doubt, found

_LOGPS_ARGUMENTS = (
    *("graphdef", "state", "prompt_tokens", "completion_tokens", "pad_id", "eos_id", "images"),
    *(
        "stop_gradient",
        "return_logits|return_entropy",
        "segment_ids",
        "segment_positions",
        "temperature",
    ),
)

_PREPARE_ARGUMENTS = (
    *("iterator", "proceed_num_steps", "sample_repeat", "batch_repeat"),
    *("service_target_batch_size", "data_queue", "async_loading", "mode"),
)

HOOKS: tuple[Hook, ...] = (
    Hook(
        "tunix.models.automodel:get_model_module",
        automodel.wrap_get_model_module,
        ("model_name", "module_type"),
        "names of Gemma 4 lead to this model",
    ),
    Hook(
        "tunix.models.automodel:download_model",
        automodel.wrap_download_model,
        ("model_id_or_path", "model_download_path", "model_source"),
        "local directories need no hub, and the hub no download path",
    ),
    Hook(
        "tunix.models.automodel:AutoModel.from_pretrained",
        automodel.wrap_from_pretrained,
        ("model_id", "mesh", "model_source", "model_path", "model_download_path", "kwargs"),
        "directories of any name are known by their config.json, which also gives the sizes",
    ),
    Hook(
        "tunix.cli.config:HyperParameters._load_config_from_yaml",
        cli.wrap_load_config_from_yaml,
        ("config_path",),
        "base_config.yaml, which the wheel lacks",
    ),
    Hook(
        "tunix.cli.config:HyperParameters._validate_tokenizer",
        cli.wrap_validate_tokenizer,
        (),
        "without a path the tokenizer is the model's own",
    ),
    Hook(
        "tunix.cli.config:HyperParameters.check_supported_workflow",
        cli.wrap_check_supported_workflow,
        (),
        "the command lines take Gemma 4 from the hub and from directories",
    ),
    Hook(
        "tunix.cli.utils.model:create_model",
        cli.wrap_create_model,
        ("model_config", "tokenizer_config", "mesh"),
        "text_only and dtype of the model_config section reach the model",
    ),
    Hook(
        "tunix.cli.utils.model:apply_lora_to_model",
        cli.wrap_apply_lora_to_model,
        ("base_model", "mesh", "lora_config"),
        "the lora_config section reaches our projections, or is refused",
    ),
    Hook(
        "qwix:apply_lora_to_model",
        qwix_lora.wrap_apply_lora_to_model,
        ("model", "provider"),
        "Tunix's names of projections reach ours; a pattern that reaches nothing is refused",
    ),
    Hook(
        "tunix.generate.mappings:MappingConfig.from_model",
        mappings.wrap_from_model,
        ("model", "backend", "overrides"),
        "weights reach vLLM in its shapes, with adapters merged; SGLang's limits are said",
    ),
    Hook(
        "tunix.utils.mesh:allocate_named_mesh_device_slices",
        cli.wrap_allocate_named_mesh_device_slices,
        ("mesh_requirements", "devices"),
        "grpo_main runs on devices without coordinates too: GPUs and CPUs",
    ),
    Hook(
        "tunix.rl.common:compute_per_token_logps",
        logps.wrap_compute_per_token_logps,
        _LOGPS_ARGUMENTS,
        "log-probabilities without a [B, T, V] array, with the images in work, gated segment_ids",
    ),
    Hook(
        "tunix.rl.common:_model_accepts_segment_ids",
        logps.wrap_model_accepts_segment_ids,
        (),
        "one answer for all: newer hosts have a gate of their own, 0.1.7 none under this name",
        optional=True,
    ),
    Hook(
        "tunix.rl.algo_core:compute_entropy_from_logits",
        logps.wrap_compute_entropy_from_logits,
        ("logits",),
        "the entropy comes with the chunked log-probabilities",
        optional=True,
    ),
    Hook(
        "tunix.rl.common:compute_score",
        logps.wrap_compute_score,
        ("model", "prompt_tokens", "completion_tokens", "segment_ids"),
        "models without segment_ids can score; heads see the images in work",
    ),
    Hook(
        "tunix.rl.common:get_per_token_logps",
        logps.wrap_get_per_token_logps,
        ("model", "input_tokens", "positions", "attn_mask", "logits_to_keep", "images"),
        "DPO and ORPO without a [B, T, V] array",
    ),
    Hook(
        "tunix.sft.dpo.dpo_trainer:dpo_loss_fn",
        orpo.wrap_dpo_loss_fn,
        ("model", "train_example", "algorithm", "beta", "lambda_orpo", "label_smoothing"),
        "ORPO compares mean log-probabilities, and stays finite where an answer is sure",
    ),
    Hook(
        "tunix.rl.rollout.vanilla_rollout:VanillaRollout",
        rollout.wrap_vanilla_rollout,
        (),
        "rollouts see images, stop on the whole stop list and draw anew in each step",
    ),
    Hook(
        "tunix.rl.rl_cluster:RLCluster.__init__",
        meshes.wrap_cluster_init,
        ("actor", "cluster_config"),
        "jax.set_mesh with another mesh than a role's is refused by name",
    ),
    Hook(
        "tunix.rl.rl_cluster:RLCluster._init_backbone_sharing_map",
        meshes.wrap_init_backbone_sharing_map,
        ("actor", "reference"),
        "a plain reference beside a quantised policy is a model of its own",
    ),
    Hook(
        "tunix.rl.rl_cluster:RLCluster._load_model",
        meshes.wrap_load_model,
        ("model_or_path", "mesh", "data_type"),
        "models go onto any mesh by our rules: heads are never cut, missing axes are dropped",
    ),
    Hook(
        "tunix.sft.peft_trainer:PeftTrainer._shard_optimizer",
        meshes.wrap_shard_optimizer,
        ("mesh",),
        "the optimizer's state lies where its parameters lie",
    ),
    Hook(
        "tunix.rl.rl_learner:RLLearner.__init__",
        learner.wrap_init,
        ("rl_cluster|rl_engine", "reward_fns", "metric_fns"),
        "a reward that goes wrong stops the run and names the sample",
    ),
    Hook(
        "tunix.rl.rl_learner:RLLearner.train",
        learner.wrap_train,
        ("train_ds", "eval_ds"),
        "prompts and images of any form are read before the host moves them about",
    ),
    Hook(
        "tunix.rl.rl_learner:RLLearner._compute_rewards",
        learner.wrap_compute_rewards,
        ("prompts", "completions", "mode", "step"),
        "reward functions get the data set's own columns",
    ),
    Hook(
        "tunix.rl.reward_manager:SequenceRewardManager._compute_rewards",
        rewards.wrap_reward_manager,
        ("prompts", "completions"),
        "a reward function may abstain",
    ),
    Hook(
        "tunix.rl.function_registry:get_advantage_estimator",
        rewards.wrap_get_advantage_estimator,
        ("name",),
        "completions that no reward function judged have advantage 0 and leave the others alone",
    ),
    Hook(
        "tunix.rl.grpo.grpo_learner:GRPOLearner._generate_and_compute_advantage",
        learner.wrap_generate_and_compute_advantage,
        ("training_input", "mode"),
        "images reach rollout, log-probabilities and example (GRPO, GSPO, Dr.GRPO, DAPO)",
    ),
    Hook(
        "tunix.rl.ppo.ppo_learner:PPOLearner._generate_and_compute_advantage",
        learner.wrap_generate_and_compute_advantage,
        ("training_input", "mode"),
        "images reach rollout, log-probabilities and example (PPO)",
    ),
    Hook(
        "tunix.rl.ppo.ppo_learner:jnp",
        ppo.wrap_jnp,
        (),
        "fractional rewards of PPO arrive whole, of every model",
    ),
    Hook(
        "tunix.rl.rl_learner:RLLearner._run_global_step",
        learner.wrap_run_global_step,
        ("full_batch_size", "mini_batch_size"),
        "the time of a step and of its rollout among the metrics",
    ),
    Hook(
        "tunix.rl.rl_learner:RLLearner._prepare_data",
        rollout_step.wrap_prepare_data,
        _PREPARE_ARGUMENTS,
        "a rollout step is sampled from one policy, and its micro-batches add up to it",
    ),
    Hook(
        "tunix.rl.rl_cluster:RLCluster.get_old_per_token_logps",
        rollout_step.wrap_get_old_per_token_logps,
        ("prompt_tokens", "completion_tokens"),
        "off-policy updates hold the policy against that which sampled, by the sampler's numbers",
    ),
    Hook(
        "tunix.rl.rl_cluster:RLCluster.update_actor",
        rollout_step.wrap_update,
        ("train_ds", "eval_ds", "skip_jit"),
        "the loss of held-out prompts is computed once, over all of them",
    ),
    Hook(
        "tunix.rl.rl_cluster:RLCluster.update_critic",
        rollout_step.wrap_update,
        ("train_ds", "eval_ds", "skip_jit"),
        "likewise of a critic",
    ),
    Hook(
        "tunix.rl.rl_cluster:RLCluster.buffer_metrics",
        micro_batches.wrap_cluster_buffer_metrics,
        ("metrics", "mode"),
        "a mean over a piece of what is sampled counts by its rows",
    ),
    Hook(
        "tunix.rl.rl_cluster:RLCluster.close",
        rollout_step.wrap_close,
        (),
        "the policy that training leaves is evaluated",
    ),
    Hook(
        "tunix.sft.peft_trainer:PeftTrainer._train_step",
        micro_batches.wrap_train_step,
        ("model", "optimizer", "inputs"),
        "the norm of the gradient that the optimizer gets, not a mean over micro-batches",
    ),
    Hook(
        "tunix.sft.peft_trainer:PeftTrainer._buffer_metrics",
        micro_batches.wrap_buffer_metrics,
        ("metrics_buffer", "loss", "step", "additional_metrics"),
        "the same norm among the metrics",
    ),
    Hook(
        "tunix.rl.trainer:Trainer._post_process_train_step",
        micro_batches.wrap_post_process_train_step,
        ("aux",),
        "metrics that are means over tokens do not depend on micro-batches",
    ),
    Hook(
        "tunix.rl.trainer:Trainer._post_process_eval_step",
        micro_batches.wrap_post_process_eval_step,
        ("aux",),
        "the same of evaluation",
    ),
    Hook(
        "tunix.sft.peft_trainer:PeftTrainer.jit_train_and_eval_step",
        train_step.wrap_jit_train_and_eval_step,
        ("skip_jit",),
        "a training step holds frozen parameters once",
    ),
    Hook(
        "tunix.sft.peft_trainer:PeftTrainer.close",
        health.wrap_close,
        (),
        "a run whose last steps were not finite does not end well",
    ),
    Hook(
        "tunix.sft.checkpoint_manager:CheckpointManager.save",
        health.wrap_save,
        ("step", "model", "optimizer", "save_only_lora_params", "force"),
        "no checkpoint holds NaN or infinity",
    ),
    Hook(
        "tunix.rl.trainer:Trainer.with_loss_fn",
        learner.wrap_with_loss_fn,
        ("loss_fn", "has_aux"),
        "the loss sees the images of its example and measures rollout agreement",
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
