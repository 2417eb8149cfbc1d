# SPDX-License-Identifier: Apache-2.0
"""A run whose numbers are no longer finite says so, stops, and writes none of them."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small_models import draw_tokens, random_model
from tunix.sft import peft_trainer

from tunix_gemma4 import register, unregister
from tunix_gemma4.checkpoint import save_checkpoint
from tunix_gemma4.data.processor import Batch
from tunix_gemma4.lora import LoraConfig, apply_lora, save_adapter
from tunix_gemma4.losses import next_token_loss
from tunix_gemma4.plugin.health import NonFiniteError, state_is_finite
from tunix_gemma4.plugin.optimizer import make_optimizer, skipped_steps
from tunix_gemma4.plugin.sft.trainer import Gemma4Trainer, model_input
from tunix_gemma4.plugin.training_config import make_training_config
from tunix_gemma4.settings.sft import RunConfig

BAD = 999.0  # A batch with this denominator has a loss of NaN.


def draw_batches(config, count, bad=()):
    """Batches of two rows; those of `bad` have a loss that is not finite."""
    tokens, padding = map(np.asarray, draw_tokens(config, "tttttttt", "tttttt.."))
    return [
        Batch(
            tokens=tokens,
            loss_mask=np.asarray(padding, np.int32),
            padding_mask=padding,
            loss_denominator=np.full(2, BAD if number in bad else 14.0, np.float32),
            rows=np.array([number, -1], np.int32),
        )
        for number in range(count)
    ]


@functools.wraps(next_token_loss)
def sometimes_nan(*inputs, **named):
    """NaN for a `BAD` batch, as a constant: its own gradient would be 0."""
    denominator = named.get("loss_denominator", inputs[-1])
    return jnp.where(denominator[0] == BAD, jnp.nan, next_token_loss(*inputs, **named))


def make_trainer(directory, optimizer, *, lora=True, micro=1, save_steps=1, kind=Gemma4Trainer):
    model = random_model("demo", text_only=True)
    model = apply_lora(model, LoraConfig(rank=2)) if lora else model
    settings = RunConfig(
        output_dir=str(directory),
        report_to="none",
        save_steps=save_steps,
        gradient_accumulation_steps=micro,
    )
    config = make_training_config(settings)
    trainer = kind(model, optimizer, config)
    return trainer.with_loss_fn(sometimes_nan).with_gen_model_input_fn(model_input)


def saved_steps(directory):
    return sorted(int(path.name) for path in directory.glob("checkpoints/[0-9]*"))


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_the_first_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, kind):
    if kind == "stock":
        register()
    try:
        trainer = make_trainer(
            tmp_path,
            make_optimizer(optax.constant_schedule(1e-3)),
            kind=Gemma4Trainer if kind == "ours" else peft_trainer.PeftTrainer,
        )
        with pytest.raises(NonFiniteError, match=r"^step 3: the loss \(nan\) is not") as told:
            trainer.train(draw_batches(trainer.model.config, 8, bad=[2]))
        assert "of rows 2 of the data" in str(told.value)
        assert "gradient norm" in str(told.value) and "learning rate 0.001" in str(told.value)
        trainer.checkpoint_manager._checkpoint_manager.wait_until_finished()
        assert saved_steps(tmp_path) == [1, 2]
        # It keeps saying so: nobody who closes the trainer afterwards saves it.
        with pytest.raises(NonFiniteError, match="^step 3"):
            trainer.close()
        assert saved_steps(tmp_path) == [1, 2]
    finally:
        unregister()
    if kind == "ours":  # The same run may go on without that step, and without clipping.
        optimizer = make_optimizer(
            optax.constant_schedule(1e-3), on_nonfinite="skip", max_grad_norm=0
        )
        trainer = make_trainer(tmp_path, optimizer)
        assert trainer.train_steps == 2
        trainer.train(draw_batches(trainer.model.config, 5, bad=[2]))
        assert trainer.history("skipped_steps") == [1, 1, 1]
        assert saved_steps(tmp_path)[-1] == 5


@pytest.mark.parametrize("lora", [True, False])
def test_a_rate_that_spoils_the_state_stops_the_run(tmp_path, lora):
    # The loss of the step is finite; what it makes of the parameters is not.
    optimizer = make_optimizer(optax.constant_schedule(1e38), max_grad_norm=None)
    optimizer = optax.chain(optimizer, optax.scale(1e30))
    trainer = make_trainer(tmp_path, optimizer, lora=lora)
    assert trainer.state_is_finite()
    with pytest.raises(NonFiniteError, match="^step 1: what it has trained .* is not finite"):
        trainer.train(draw_batches(trainer.model.config, 3))
    assert not trainer.state_is_finite()
    assert saved_steps(tmp_path) == []


def test_an_infinite_weight_of_the_base_is_named(tmp_path):
    trainer = make_trainer(tmp_path, make_optimizer(optax.constant_schedule(1e-3)))
    kernel = trainer.model.language_model.layers[0].mlp.down_proj.kernel
    kernel[...] = kernel[...].at[0, 0].set(jnp.inf)
    batches = draw_batches(trainer.model.config, 1)
    message = r"^evaluation after step 0: .* of rows 0 of .*own weights.*0\.mlp\.down_proj\.kernel"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train(batches, batches)
    with pytest.raises(NonFiniteError, match=r"^step 1: .*own weights.*0\.mlp\.down_proj\.kernel"):
        trainer.train(batches)
    assert saved_steps(tmp_path) == []


def parameters(trainer):
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(trainer.model, nnx.LoRAParam))]


@pytest.mark.parametrize("micro", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_skipped_step_changes_nothing_and_the_next_trains_on(tmp_path, micro, caplog):
    def trained(directory, numbers, bad=()):
        optimizer = make_optimizer(
            optax.constant_schedule(1e-3), on_nonfinite="skip", max_skipped_steps=1
        )
        trainer = make_trainer(directory, optimizer, micro=micro)
        trainer.train(draw_batches(trainer.model.config, numbers, bad))
        return trainer

    # The second step is left out whole, whichever of its micro-batches was at fault.
    with caplog.at_level(logging.WARNING):
        skipped = trained(tmp_path / "a", 3 * micro, bad=[micro])
    assert "step 2" in caplog.text and "changes nothing" in caplog.text
    assert skipped.history("skipped_steps") == [0, 1, 1]
    plain = trained(tmp_path / "b", 2 * micro)
    for ours, theirs in zip(parameters(skipped), parameters(plain), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert state_is_finite(skipped) and saved_steps(tmp_path / "a") == [1, 2, 3]
    assert int(skipped_steps(skipped.optimizer)) == 1
    with pytest.raises(NonFiniteError, match="2 steps were skipped, more than max_skipped_steps"):
        trained(tmp_path / "c", 6 * micro, bad=[0, 3 * micro])


def test_neither_an_adapter_nor_a_model_that_is_not_finite_is_written(tmp_path):
    model = random_model("demo", text_only=True)
    adapted = apply_lora(model, LoraConfig(rank=2))
    matrix = adapted.language_model.layers[0].mlp.up_proj.kernel_lora_a
    matrix[...] = matrix[...].at[0, 0].set(jnp.nan)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj\.lora_A"):
        save_adapter(adapted, tmp_path / "adapter")
    kernel = model.language_model.layers[1].mlp.up_proj.kernel
    kernel[...] = kernel[...].at[0, 0].set(-jnp.inf)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        save_checkpoint(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
