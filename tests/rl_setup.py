# SPDX-License-Identifier: Apache-2.0
"""Small clusters, data and rewards for the tests of reinforcement learning."""

from __future__ import annotations

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from PIL import Image
from tunix.rl import rl_cluster
from tunix.rl.rollout.base_rollout import RolloutConfig

from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.data.processor import Processor
from tunix_gemma4.lora import LoraConfig, apply_lora
from tunix_gemma4.plugin.rl.learner import set_processor
from tunix_gemma4.rewards import completion_text

Role = rl_cluster.Role
STEPS = 5


def mesh_of(devices, fsdp=1, tp=1):
    return Mesh(np.array(devices).reshape(fsdp, tp), ("fsdp", "tp"))


def one_device():
    return mesh_of(jax.devices()[:1])


def make_cluster(
    directory,
    *,
    lora=False,
    reference=False,
    mesh=None,
    rollout_mesh=None,
    text_only=False,
    micro=None,
    steps=STEPS,
    mini_batch_size=None,
    max_prompt_length=192,
    max_tokens=4,
    learning_rate=1e-2,
    optimizer=None,
    eval_every=1000,
    **rollout,
):
    """A cluster of the tiny checkpoint; the reference shares the arrays of an adapted actor."""
    mesh = one_device() if mesh is None else mesh
    base = load_checkpoint(directory, mesh, text_only)
    quantize = lora if isinstance(lora, str) else None
    adapters = LoraConfig(rank=4, alpha=8, targets="all", quantize=quantize)
    actor = apply_lora(base, adapters) if lora else base
    if reference and not lora:
        base = load_checkpoint(directory, mesh, text_only)
    roles = {Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: rollout_mesh or mesh}
    config = rl_cluster.ClusterConfig(
        role_to_mesh=roles,
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optimizer or optax.adamw(learning_rate),
            eval_every_n_steps=eval_every,
            max_steps=steps,
            mini_batch_size=mini_batch_size,
            train_micro_batch_size=micro,
        ),
        rollout_config=RolloutConfig(
            max_prompt_length=max_prompt_length,
            max_tokens_to_generate=max_tokens,
            kv_cache_size=max_prompt_length + max_tokens,
            **{"temperature": 0.8} | rollout,
        ),
    )
    processor = Processor.from_pretrained(directory, max_soft_tokens=70)
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=base if reference else None,
        tokenizer=processor.tokenizer,
        cluster_config=config,
    )
    set_processor(cluster, processor)
    return cluster


def draw_picture(seed, width=8, height=8):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question(text, images=0):
    parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def mixed_batch(seed=0):
    """Four prompts with one, no, two and one images, of sizes that differ with `seed`."""
    sizes = [(8 + 8 * (seed % 2), 8), (8, 16), (16, 8), (24, 8 + 8 * (seed % 3))]
    first, second, third, fourth = (
        draw_picture(10 * seed + number, *size) for number, size in enumerate(sizes)
    )
    return {
        "prompts": [question("what", 1), question("hello"), question("two", 2), question("so", 1)],
        "images": [first, None, [second, third], [fourth]],
        "answer": ["a", "b", "c", "d"],
    }


def text_batch(seed=0):
    words = np.random.default_rng(seed).permutation(["one", "two", "red", "sky", "cat", "dog"])
    return {"prompts": [question(str(word)) for word in words[:4]]}


def low_ids(prompts, completions, **columns):
    """A reward that any policy can raise: the share of letters early in the alphabet."""
    return [
        sum(letter.lower() < "m" for letter in completion) / max(len(completion), 1)
        for completion in map(completion_text, completions)
    ]


def history(cluster, name, prefix="actor"):
    return np.array(cluster.actor_trainer.metrics_logger.get_metric_history(prefix, name, "train"))
