# SPDX-License-Identifier: Apache-2.0
"""Tunix's DPO trainer, both of its algorithms, on text and images, with adapters and without."""

import contextlib

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from rl_setup import draw_picture, question
from tunix.rl import common
from tunix.sft.dpo import dpo_trainer

import tunix_gemma4
from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.data.preferences import collate, read_preference
from tunix_gemma4.data.processor import Processor
from tunix_gemma4.lora import LoraConfig, apply_lora

STEPS = 6
LENGTHS = {"max_prompt_length": 96, "max_response_length": 12}
LORA = LoraConfig(rank=4, alpha=8, targets="all")


@pytest.fixture(scope="module", autouse=True)
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


@pytest.fixture(scope="module")
def directory(tiny_checkpoint):
    return tiny_checkpoint("demo")


@pytest.fixture(scope="module")
def processor(directory):
    return Processor.from_pretrained(directory, max_soft_tokens=70)


def make_batch(processor, *, pictures=None):
    """Two preferences; with `pictures`, seeds, each prompt shows one."""
    rows = [
        {"prompt": question("what", 1), "chosen": "red", "rejected": "a sea"},
        {"prompt": question("how many", 1), "chosen": "four of them", "rejected": "2"},
    ]
    for index, row in enumerate(rows):
        if pictures is None:
            row["prompt"] = question("what" if index else "how many")
        else:
            row["images"] = [draw_picture(pictures[index], 16, 16)]
    read = [read_preference(row, processor) for row in rows]
    return collate(read, processor, **LENGTHS)


def make_trainer(model, reference=None, **settings):
    config = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=100, max_steps=STEPS, **{"beta": 0.1, "lambda_orpo": 0.5} | settings
    )
    return dpo_trainer.DPOTrainer(model, reference, optax.adam(3e-3), config)


def metric(trainer, name):
    return np.array(trainer.metrics_logger.get_metric_history("", name, "train"))


def loss_of(trainer, batch):
    """What the trainer's loss function makes of one batch."""
    inputs = trainer.gen_model_input_fn(trainer._prepare_inputs(batch))
    return float(dpo_trainer.dpo_loss_fn(trainer.model, **inputs)[0])


def assert_learns(trainer, batch):
    trainer.train([batch] * STEPS)
    assert trainer.train_steps == STEPS
    assert trainer._jitted_train_step_fn.func.jitted_fn._cache_size() == 1
    losses, margins = metric(trainer, "loss"), metric(trainer, "rewards/margin")
    assert len(losses) == len(margins) == STEPS
    assert np.isfinite(losses).all() and (np.diff(losses) < 0).all()
    assert (np.diff(margins) > 0).all()
    return losses, margins


def arrays(model):
    return jax.device_get(nnx.state(model, nnx.Param))


def test_dpo_with_adapters_sees_images_and_leaves_the_reference_alone(directory, processor):
    reference = load_checkpoint(directory, text_only=False)
    before = arrays(reference)
    trainer = make_trainer(apply_lora(reference, LORA), reference)
    batch = make_batch(processor, pictures=(1, 2))
    assert batch["images"].shape[:2] == (2, 1)
    losses, margins = assert_learns(trainer, batch)
    # At first the policy is its reference, whatever the images are.
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)
    assert abs(margins[0]) < 1e-5 and margins[-1] > 0.3
    assert metric(trainer, "rewards/accuracy")[-1] == 1
    jax.tree.map(np.testing.assert_array_equal, arrays(reference), before)
    others = make_batch(processor, pictures=(3, 4))
    trained, other = loss_of(trainer, batch), loss_of(trainer, others)
    assert trained < losses[0] and abs(trained - other) > 1e-3


def test_orpo_trains_every_weight_on_images(directory, processor):
    model = load_checkpoint(directory, text_only=False)
    before = arrays(model)
    trainer = make_trainer(model, algorithm="orpo")
    batch = make_batch(processor, pictures=(1, 2))
    others = make_batch(processor, pictures=(3, 4))
    first, other = loss_of(trainer, batch), loss_of(trainer, others)
    assert abs(first - other) > 1e-3
    losses, _ = assert_learns(trainer, batch)
    np.testing.assert_allclose(losses[0], first, rtol=1e-5)
    odds = metric(trainer, "odds_ratio")
    assert odds[-1] > odds[0]
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), arrays(model), before)
    tower = jax.tree.leaves(nnx.to_pure_dict(moved["vision_tower"]))
    assert tower and np.mean(tower) > 0.9
    assert np.mean(jax.tree.leaves(moved)) > 0.9


def test_orpo_with_adapters_trains_them_alone(directory, processor):
    model = apply_lora(load_checkpoint(directory, text_only=False), LORA)
    frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
    before = jax.device_get(nnx.state(model, frozen))
    losses, _ = assert_learns(
        make_trainer(model, algorithm="orpo"), make_batch(processor, pictures=(1, 2))
    )
    assert losses[0] - losses[-1] > 1e-3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(nnx.state(model, frozen)), before)


def test_dpo_on_text_trains_every_weight_against_a_model_of_its_own(directory, processor):
    model, reference = load_checkpoint(directory), load_checkpoint(directory)
    before = arrays(reference)
    trainer = make_trainer(model, reference)
    losses, margins = assert_learns(trainer, make_batch(processor))
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, arrays(reference), before)


def test_orpo_on_a_mesh_learns_alike(directory, processor):
    batch, losses = make_batch(processor), []
    for mesh in (None, Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("fsdp", "tp"))):
        model = apply_lora(load_checkpoint(directory, mesh), LORA)
        trainer = make_trainer(model, algorithm="orpo")
        with mesh or contextlib.nullcontext():
            losses.append(assert_learns(trainer, batch)[0])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_the_chunked_log_probabilities_are_the_hosts_own(directory, processor):
    model = load_checkpoint(directory, text_only=False)
    example = make_trainer(model)._prepare_inputs(make_batch(processor, pictures=(1, 2)))
    asked = {
        "input_tokens": example.input_ids,
        "positions": example.positions,
        "attn_mask": example.attention_mask,
        "logits_to_keep": example.logits_to_keep,
        "images": example.images,
    }
    ours = common.get_per_token_logps(model, **asked)
    hooked = common.get_per_token_logps
    tunix_gemma4.unregister()
    assert common.get_per_token_logps is not hooked
    stock = common.get_per_token_logps(model, **asked)
    tunix_gemma4.register()
    assert ours.shape == stock.shape == (4, 12)
    mask = np.asarray(example.completion_mask)
    np.testing.assert_allclose(ours * mask, stock * mask, rtol=0, atol=1e-5)
