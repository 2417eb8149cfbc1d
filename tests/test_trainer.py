# SPDX-License-Identifier: Apache-2.0
"""Training through Tunix: what is trained, that every arrangement computes the same, metrics."""

import itertools
import re
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from small_models import draw_images, draw_tokens, random_model
from tunix.sft import peft_trainer

from tunix_gemma4.checkpoint import names as weights
from tunix_gemma4.data import make_dataset
from tunix_gemma4.data.processor import Batch, Processor
from tunix_gemma4.lora import LoraConfig, apply_lora
from tunix_gemma4.losses import next_token_loss
from tunix_gemma4.plugin.optimizer import make_optimizer, make_schedule, record_step
from tunix_gemma4.plugin.progress import Progress
from tunix_gemma4.plugin.sft.trainer import Gemma4Trainer, TrainingConfig, model_input
from tunix_gemma4.plugin.training_config import make_training_config
from tunix_gemma4.settings.sft import RunConfig
from tunix_gemma4.sharding import shard_model

ROWS = 8
STEPS = 3
RATE = 1e-3


def draw_batches(config, *, steps=STEPS, micro_batches=1, rows=ROWS, new_rows=True):
    """Batches of rows with and without an image, some padded, of unequal supervision.

    The rows of a step do not depend on `micro_batches`; `new_rows=False` repeats the first ones.
    """
    result = []
    for step in range(steps) if new_rows else [0] * steps:
        drawn = ["(iiii)tttttttt" if row % 2 else "tttttttttttt.." for row in range(rows)]
        tokens, padding = draw_tokens(config, *drawn, seed=step)
        shapes = [[(2, 2)] if row % 2 else [] for row in range(rows)]
        images = draw_images(config, *shapes, seed=step, count=1)
        columns = np.arange(tokens.shape[1])
        first = 13 - np.random.default_rng(step).integers(1, 6, rows)
        mask = (columns >= first[:, None]) * np.asarray(padding)
        total = mask.sum()
        for part in np.split(np.arange(rows), micro_batches):
            result.append(
                Batch(
                    tokens=np.asarray(tokens)[part],
                    loss_mask=mask[part].astype(np.int32),
                    padding_mask=np.asarray(padding)[part],
                    images=np.asarray(images)[part],
                    loss_denominator=np.full(len(part), total / micro_batches, np.float32),
                )
            )
    return result


def told(output_dir, **settings):
    return RunConfig(output_dir=str(output_dir), report_to="none", **settings)


def buffers(model):
    return {
        name: weights.buffer_array(buffer).tobytes()
        for name, buffer in weights.named_buffers(model).items()
    }


@pytest.mark.parametrize("preset", ["e2b", "31b"])
def test_stock_trainer_trains_every_parameter_and_no_buffer(preset):
    model = random_model(preset)
    before = buffers(model)
    weights_before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    config = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=20)
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-3, weight_decay=0.1), config)
    trainer.with_loss_fn(next_token_loss).with_gen_model_input_fn(model_input)
    trainer.train(draw_batches(model.config, steps=20, rows=2))
    assert trainer.train_steps == 20
    assert before and buffers(model) == before
    changed = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), weights_before, nnx.state(model, nnx.Param)
    )
    assert all(jax.tree.leaves(changed))


MODES = {
    "full": None,
    "lora": LoraConfig(rank=4, alpha=16, targets="all"),
    "nf4": LoraConfig(rank=4, alpha=16, targets="all", quantize="nf4"),
    "int8": LoraConfig(rank=4, alpha=16, targets="all", quantize="int8"),
}
REMATS = ("none", "block", "decoder")
PRODUCT = list(itertools.product(MODES, (1, 2), REMATS, (False, True)))
# Every value of one option meets every value of every other.
COVER = [
    (mode, 1 + (i + j) % 2, remat, (i // 2 + j) % 2 == 1)
    for (i, mode), (j, remat) in itertools.product(enumerate(MODES), enumerate(REMATS))
]


def test_cover_is_pairwise():
    for first, second in itertools.combinations(range(4), 2):
        pairs = {(case[first], case[second]) for case in PRODUCT}
        assert {(case[first], case[second]) for case in COVER} == pairs


def shardings(node):
    """Where each array of a model or an optimizer lies, by path."""
    return {path: leaf[...].sharding for path, leaf in nnx.to_flat_state(nnx.state(node))}


class Watched(Gemma4Trainer):
    """Keeps the gradient of the first step."""

    first_gradient = None

    def _post_process_train_step(self, aux):
        super()._post_process_train_step(aux)
        steps = self.config.get_with_default("gradient_accumulation_steps", 1)
        if self.iter_steps + 1 == steps:
            trace = optax.tree.get(self.optimizer.opt_state, "trace")
            self.first_gradient = jax.tree.map(np.array, jax.tree.leaves(trace))


def train(mode, micro_batches, remat, on_mesh):
    """A trainer that has made `STEPS` steps of plain gradient descent.

    Adam would blow rounding up: it divides by the size of a gradient, however small.
    """
    model = random_model("demo", remat_config=remat)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tp"))
    if on_mesh:
        shard_model(model, mesh)
    if MODES[mode] is not None:
        model = apply_lora(model, MODES[mode])
    # A trace without decay holds the whole step's gradient.
    watch = (record_step(optax.constant_schedule(RATE)), optax.trace(decay=0.0))
    optimizer = optax.chain(*watch, optax.sgd(RATE))
    config = TrainingConfig(
        eval_every_n_steps=100,
        gradient_accumulation_steps=micro_batches if micro_batches > 1 else None,
    )
    trainer = Watched(model, optimizer, config, log=lambda line: None)
    before = shardings(model)
    trainer.train(draw_batches(model.config, micro_batches=micro_batches, new_rows=False))
    assert shardings(model) == before
    assert trainer._jitted_train_step_fn.func.jitted_fn._cache_size() == 1
    return trainer


@pytest.fixture(scope="module")
def plain():
    """`plain(mode)`: trained on one device, each step one batch, without remat."""
    trained = {}

    def get(mode):
        if mode not in trained:
            trained[mode] = train(mode, 1, "none", False)
        return trained[mode]

    return get


@pytest.mark.parametrize(
    ("mode", "micro_batches", "remat", "on_mesh"),
    [
        pytest.param(*case, marks=[] if case in COVER else pytest.mark.slow)
        for case in PRODUCT
        if case[1:] != (1, "none", False)
    ],
)
def test_every_arrangement_trains_alike(mode, micro_batches, remat, on_mesh, plain):
    expected, found = plain(mode), train(mode, micro_batches, remat, on_mesh)
    losses = expected.history("loss")
    assert losses[-1] < losses[0] - 1e-3
    np.testing.assert_allclose(found.history("loss"), losses, rtol=1e-5)
    np.testing.assert_allclose(found.history("grad_norm"), expected.history("grad_norm"), rtol=1e-4)
    assert found.history("supervised_tokens") == expected.history("supervised_tokens")
    # Micro-batches and remat keep to the promised 1e-5. On a mesh the sums of the whole model run
    # in another order, for which its general tolerance is 1e-4.
    tolerance = 1e-4 if on_mesh else 1e-5
    assert any(leaf.any() for leaf in expected.first_gradient)
    for ours, theirs in zip(found.first_gradient, expected.first_gradient, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_restored_arrays_lie_where_they_did_on_a_mesh_without_all_axes(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    model = shard_model(random_model("demo"), mesh)
    config = make_training_config(
        RunConfig(output_dir=str(tmp_path), max_steps=1, report_to="none")
    )
    first = Gemma4Trainer(model, optax.adamw(1e-3), config, log=lambda line: None)
    first.train(draw_batches(model.config, steps=1))
    model = shard_model(random_model("demo"), mesh)
    second = Gemma4Trainer(model, optax.adamw(1e-3), config)
    assert second.train_steps == 1
    for restored, trained in ((second.model, first.model), (second.optimizer, first.optimizer)):
        leaves = jax.tree.leaves(nnx.state(restored, (nnx.Param, nnx.optimizer.OptState)))
        others = jax.tree.leaves(nnx.state(trained, (nnx.Param, nnx.optimizer.OptState)))
        for ours, theirs in zip(leaves, others, strict=True):
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
            np.testing.assert_array_equal(ours, theirs)


def test_parameters_stay_on_their_shards_whatever_the_step_prefers():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tp"))
    model = shard_model(random_model("demo"), mesh)

    def spread(updates, params):
        # What XLA sometimes chooses for the norms, made certain.
        wish = NamedSharding(mesh, PartitionSpec("fsdp"))
        return jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, wish) if leaf.ndim == 1 else leaf,
            updates,
        )

    optimizer = optax.chain(optax.stateless(spread), optax.adam(1e-3))
    config = TrainingConfig(eval_every_n_steps=100)
    trainer = Gemma4Trainer(model, optimizer, config, log=lambda line: None)
    before = shardings(model), shardings(trainer.optimizer)
    trainer.train(draw_batches(model.config))
    assert (shardings(model), shardings(trainer.optimizer)) == before
    assert trainer._jitted_train_step_fn.func.jitted_fn._cache_size() == 1


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_step_takes_the_values_that_model_and_optimizer_have_then(lora):
    model = random_model("demo")
    model = model if lora is None else apply_lora(model, lora)
    trainer = Gemma4Trainer(model, optax.adam(RATE), TrainingConfig(eval_every_n_steps=100))
    step, _ = trainer.jit_train_and_eval_step()
    (batch,) = draw_batches(model.config, steps=1)
    start = jax.tree.map(np.array, (nnx.state(model), nnx.state(trainer.optimizer)))
    first, second = (float(step(batch)[0]) for _ in range(2))
    assert second < first
    nnx.update(model, start[0])
    nnx.update(trainer.optimizer, start[1])
    assert [float(step(batch)[0]) for _ in range(2)] == [first, second]
    nnx.update(model, start[0])
    frozen = nnx.state(model, nnx.Not(nnx.LoRAParam))
    nnx.update(model, jax.tree.map(lambda x: np.array(x) * np.asarray(1.5, x.dtype), frozen))
    assert float(step(batch)[0]) != first


def test_a_terminal_shows_the_same_lines_and_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    model = random_model("demo")
    lines = []
    config = TrainingConfig(eval_every_n_steps=2, max_steps=3)
    trainer = Gemma4Trainer(
        model, optax.sgd(1e-2), config, logging_steps=2, log=lines.append, progress=Progress(3, 2)
    )
    trainer.train(draw_batches(model.config, steps=3), draw_batches(model.config, steps=1))
    shown = capsys.readouterr()
    assert not shown.err and not shown.out
    kinds = [line.split()[0] for line in lines]
    assert kinds == ["eval", "eval", "step", "step", "eval"]
    losses = trainer.history("loss")
    for line, step in zip((line for line in lines if line[0] == "s"), (2, 3), strict=True):
        # The value of this step, no mean.
        assert line.startswith(f"step {step}/3  loss {losses[step - 1]:.4f}  ")
        assert f"epoch {step / 2:.2f}" in line
        assert ("left 0:0" in line) == (step == 2)


def test_progress_is_told_as_far_as_it_is_known(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(1000, 50.0, estimated=True)
    assert progress.rest(0) == ["epoch 0.00"]
    for step in (1, 2, 3):  # The first, which compiles, says nothing about the others.
        now[0] += 500 if step == 1 else 7.5
        progress.ended(step)
    assert (progress.place(3), progress.rest(3)) == ("step 3/~1000", ["epoch 0.06", "left 2:04:38"])
    assert progress.rest(1000) == ["epoch 20.00"]
    assert (Progress().place(3), Progress().rest(3)) == ("step 3", [])


@pytest.fixture(scope="module")
def adam():
    """A trainer with the usual optimizer, its lines, and what it was trained on."""
    model = random_model("demo")
    lines = []
    schedule = make_schedule("linear", learning_rate=1e-3, warmup_steps=2, total_steps=6)
    config = TrainingConfig(eval_every_n_steps=2, max_steps=4, gradient_accumulation_steps=2)
    trainer = Gemma4Trainer(
        model, make_optimizer(schedule), config, logging_steps=3, log=lines.append
    )
    batches = draw_batches(model.config, steps=5, micro_batches=2, rows=4)
    trainer.train(batches, batches[-2:])
    return trainer, lines, batches


def test_metrics_are_those_of_whole_steps(adam):
    trainer, _, batches = adam
    supervised = [int(batch.loss_mask.sum()) for batch in batches]
    assert trainer.history("supervised_tokens") == [
        supervised[i] + supervised[i + 1] for i in (0, 2, 4, 6)
    ]
    rates = [1e-3 / 3, 1e-3 * 2 / 3, 1e-3, 0.75e-3]
    np.testing.assert_allclose(trainer.history("learning_rate"), rates, rtol=1e-5)
    for name in ("grad_norm", "step_time_s", "tokens_per_second"):
        assert len(trainer.history(name)) == 4
        assert min(trainer.history(name)) > 0


def test_lines_of_text_come_every_logging_steps_and_at_the_end(adam):
    _, lines, _ = adam
    numbers = r"loss \d+\.\d+  lr \S+  grad norm \S+  supervised \d+  tokens/s \d+  s/step \S+"
    steps = [line for line in lines if not line.startswith("eval")]
    assert [re.match(rf"step (\d)/4  {numbers}", line)[1] for line in steps] == ["3", "4"]


def test_evaluation_comes_before_every_few_steps_and_once_at_the_end(adam):
    _, lines, _ = adam
    found = [line.split()[2] for line in lines if line.startswith("eval")]
    assert found == ["0", "2", "4"]


def test_evaluation_weights_batches_by_their_supervised_tokens():
    model = random_model("demo")
    (whole,) = draw_batches(model.config, steps=1)
    parts = [
        jax.tree.map(lambda leaf, part=part: leaf[part], whole).replace(loss_denominator=None)
        for part in (slice(0, 2), slice(2, 8))
    ]
    loss = nnx.jit(lambda model, part: next_token_loss(model, **model_input(part)))
    means = [float(loss(model, part)) for part in parts]
    counts = [part.loss_mask.sum() for part in parts]
    expected = np.dot(means, counts) / sum(counts)
    assert abs(np.mean(means) - expected) > 1e-3 * expected
    trainer = Gemma4Trainer(model, optax.sgd(0.0), TrainingConfig(eval_every_n_steps=1))
    trainer.train([], parts)
    np.testing.assert_allclose(trainer.history("loss", "eval"), [expected], rtol=1e-5)


def test_batch_that_does_not_divide_the_mesh_is_refused():
    model = random_model("demo")
    shard_model(model, Mesh(np.array(jax.devices()[:4]).reshape(4, 1), ("fsdp", "tp")))
    trainer = Gemma4Trainer(model, optax.sgd(0.1), TrainingConfig(eval_every_n_steps=100))
    with pytest.raises(ValueError, match="batch of 6 rows: expected a multiple of 4, .*fsdp"):
        trainer.train(draw_batches(model.config, rows=6))


def test_accumulation_that_the_data_was_not_made_for_is_refused(tiny_checkpoint):
    directory = tiny_checkpoint("demo")
    processor = Processor.from_pretrained(directory, max_soft_tokens=70)
    row = {"messages": [{"role": role, "content": "?"} for role in ("user", "assistant")]}
    dataset = make_dataset(
        [row] * 8, processor, batch_size=2, max_length=64, gradient_accumulation_steps=2
    )
    config = TrainingConfig(eval_every_n_steps=100, gradient_accumulation_steps=4)
    trainer = Gemma4Trainer(random_model("demo"), optax.sgd(0.1), config)
    with pytest.raises(ValueError, match="forms steps of 2 micro-batches .* config of 4"):
        trainer.train(dataset)


def test_checkpoint_without_a_position_is_refused(tiny_checkpoint, tmp_path):
    model = random_model("demo")
    config = make_training_config(
        RunConfig(output_dir=str(tmp_path), max_steps=1, report_to="none")
    )
    Gemma4Trainer(model, optax.sgd(0.1), config).train(draw_batches(model.config, steps=1))
    processor = Processor.from_pretrained(tiny_checkpoint("demo"), max_soft_tokens=70)
    row = {"messages": [{"role": role, "content": "?"} for role in ("user", "assistant")]}
    dataset = make_dataset([row] * 8, processor, batch_size=2, max_length=64)
    config = make_training_config(
        RunConfig(output_dir=str(tmp_path), max_steps=2, report_to="none")
    )
    with pytest.raises(ValueError, match="checkpoint of step 1 .* has no data position"):
        Gemma4Trainer(model, optax.sgd(0.1), config).train(dataset)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedule_warms_up_from_above_zero_and_ends_as_its_name_says(kind):
    schedule = make_schedule(kind, learning_rate=1.0, warmup_steps=4, total_steps=14)
    assert [round(float(schedule(step)), 6) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert float(schedule(14)) == pytest.approx(1.0 if kind == "constant" else 0.0, abs=1e-6)


def test_only_matrices_are_decayed():
    optimizer = make_optimizer(optax.constant_schedule(0.1), weight_decay=0.5)
    params = {"kernel": np.ones((2, 2), np.float32), "norm": np.ones(2, np.float32)}
    gradients = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"], 0.0)


@pytest.mark.parametrize("stock", [False, True])
def test_jax_set_mesh_trains_as_with_mesh_does(stock, plain):
    # The stock trainer reads `with mesh:` alone, so it does not split the batch; the model does.
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tp"))
    with jax.set_mesh(mesh):
        model = apply_lora(shard_model(random_model("demo"), mesh), MODES["lora"])
        config = TrainingConfig(eval_every_n_steps=100)
        make = peft_trainer.PeftTrainer if stock else Gemma4Trainer
        trainer = make(model, optax.sgd(RATE), config)
        trainer.with_loss_fn(next_token_loss).with_gen_model_input_fn(model_input)
        trainer.train(draw_batches(model.config, new_rows=False))
    logger = trainer.metrics_logger
    losses = logger.get_metric_history(trainer.metrics_prefix, "loss", "train")
    np.testing.assert_allclose(losses, plain("lora").history("loss"), rtol=1e-5)
