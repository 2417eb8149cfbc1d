# SPDX-License-Identifier: Apache-2.0
"""The supervised recipe: what it leaves on disk, what it refuses, where it goes on."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.config import ModelConfig
from tunix_gemma4.lora import LoraConfig, load_adapter, merge_lora
from tunix_gemma4.plugin.optimizer import make_schedule
from tunix_gemma4.recipes import common, sft
from tunix_gemma4.recipes.run_directory import prepare_output
from tunix_gemma4.settings.common import MeshConfig
from tunix_gemma4.settings.sft import DataConfig, RunConfig

ROWS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A JSONL file of questions about images, and one without images."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    kinds = {"images": [], "text": []}
    for index in range(ROWS):
        Image.fromarray(draw.integers(0, 255, (8, 8), np.uint8)).save(folder / f"{index}.png")
        image = {"type": "image", "image": f"{index}.png"}
        words = {"type": "text", "text": "What digit is this?"}
        for kind, content in (("images", [image, words]), ("text", [words])):
            messages = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": str(index % 10)},
            ]
            kinds[kind].append(json.dumps({"messages": messages}))
    for kind, lines in kinds.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def settings(tiny_checkpoint, data, tmp_path):
    """`settings(**changes)`: a short run on the tiny model."""

    def make(**changes):
        source = DataConfig(
            path=str(data / "images.jsonl"),
            max_length=96,
            bucket_lengths=[96],
            max_soft_tokens=70,
            image_buckets=[0, 1],
        )
        defaults = {
            "model": str(tiny_checkpoint("demo")),
            "output_dir": str(tmp_path / "run"),
            "data": source,
            "batch_size": 4,
            "max_steps": 2,
            "save_steps": 1,
            "learning_rate": 1e-2,
            "remat": "none",
            "report_to": "none",
        }
        return RunConfig(**(defaults | changes))

    return make


def parameters(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same_parameters(found, expected):
    found, expected = parameters(found), parameters(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=str(path))


def test_lora_run_leaves_adapter_merged_model_checkpoints_and_curves(settings, data, tmp_path):
    config = settings(lora=LoraConfig(rank=4, alpha=8), merge=True, report_to="tensorboard")
    config.data.eval_path = str(data / "text.jsonl")
    result = sft.run(config)
    output = tmp_path / "run"
    assert {path.name for path in output.iterdir()} == {
        *("adapter", "model", "checkpoints", "tensorboard", "run_config.yaml"),
    }
    assert list((output / "tensorboard").iterdir())
    adapted = load_adapter(load_checkpoint(config.model, text_only=False), output / "adapter")
    assert_same_parameters(adapted, result.model)
    merged = load_checkpoint(output / "model", text_only=False)
    assert_same_parameters(merged, merge_lora(adapted))
    losses = result.trainer.history("loss", "eval")
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_full_run_trains_in_float32_and_saves_in_the_dtype_of_the_source(
    settings, tiny_checkpoint, tmp_path
):
    source = tmp_path / "bfloat16"
    shutil.copytree(tiny_checkpoint("demo"), source)
    described = json.loads((source / "config.json").read_text())
    described["dtype"] = described["text_config"]["dtype"] = "bfloat16"
    (source / "config.json").write_text(json.dumps(described))

    result = sft.run(settings(model=str(source), learning_rate=1e-3))
    moments = nnx.state(result.trainer.optimizer)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(moments) if leaf.ndim} == {"float32"}
    saved = tmp_path / "run" / "model"
    assert ModelConfig.from_hf(saved).param_dtype == "bfloat16"
    model = load_checkpoint(saved, text_only=False)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    assert (saved / "tokenizer.json").is_file()


def test_run_prints_what_is_learnt_and_where_it_was_saved(settings, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    sft.run(settings(lora=LoraConfig(rank=4), max_steps=1))
    printed, others = capsys.readouterr()
    assert "step/s" not in others and "it/s" not in others  # No bar of the host's.
    compiling = "Compiling the training step, once for each shape of batch: nothing more is said"
    assert printed.index(compiling) < printed.index("step 1/1  loss ")
    assert "SUPERVISED" in printed
    assert "'0<turn|>'" in printed
    assert "Trainable parameters: " in printed
    assert "step 1/1  loss " in printed
    assert printed.endswith(f"Saved: {tmp_path / 'run' / 'adapter'}\n")


def test_finished_run_is_not_overwritten(settings, tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run: it holds a finished run \(adapter/\)"):
        sft.run(settings())


def test_broken_off_run_goes_on_by_itself(settings, tmp_path, capsys):
    config = settings(lora=LoraConfig(rank=4))
    sft.run(config)
    shutil.rmtree(tmp_path / "run" / "adapter")
    config.max_steps = 3
    result = sft.run(config)
    assert "Resuming after step 2" in capsys.readouterr().out
    assert result.trainer.train_steps == 3
    assert len(result.trainer.history("loss")) == 1


@pytest.fixture
def broken_off(settings, tmp_path):
    """Settings of a run that left a checkpoint, which need not be a real one here."""
    config = settings()
    prepare_output(config, ())
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    return config


def test_checkpoints_are_not_mixed_with_a_run_of_other_settings(broken_off):
    broken_off.batch_size, broken_off.learning_rate = 2, 1.0
    with pytest.raises(ValueError, match=r"a run with another batch_size \(see .*yaml\)"):
        sft.run(broken_off)


def test_checkpoints_are_not_overwritten_without_resuming(broken_off):
    broken_off.resume_from_checkpoint = False
    with pytest.raises(ValueError, match="there are checkpoints, and resume_from_checkpoint"):
        sft.run(broken_off)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mesh": MeshConfig(fsdp=64), "batch_size": 64},
            "fsdp 64 x tp 1 is 64 devices, and there are 8",
        ),
        ({"mesh": MeshConfig(fsdp=8)}, "batch_size: expected a multiple of mesh.fsdp=8, found 4"),
        ({"max_steps": None, "num_train_epochs": None}, "both are null"),
        ({"text_only": True}, "text_only=False"),
        (
            {"lora": LoraConfig(targets="nothing_like_it")},
            r"lora\.targets='nothing_like_it' matches",
        ),
    ],
)
def test_mistake_is_answered_with_a_clear_error(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        sft.run(settings(**changes))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((12, 1), ""),
        ((13, 1), "batch_size=13 is more than the 12 rows to train on: .* other 1 are computed"),
        ((4, 4), "batch_size=4 x gradient_accumulation_steps=4 is 16 rows .* other 4 are computed"),
    ],
)
def test_batch_that_no_epoch_fills_is_mentioned(settings, capsys, sizes, said):
    config = settings(batch_size=sizes[0], gradient_accumulation_steps=sizes[1])
    train_ds, _ = sft.make_datasets(config, common.make_processor(config))
    train_ds.check()
    sft.say_of_empty_rows(config, train_ds)
    assert re.search(f"^{said}", found := capsys.readouterr().out) and bool(found) == bool(said)


def test_images_longer_than_the_window_are_mentioned(settings, tiny_checkpoint, capsys):
    config = settings(model=str(tiny_checkpoint("31b")))
    common.say_of_long_images(config, 8)
    assert capsys.readouterr().out == ""
    common.say_of_long_images(config, 70)
    assert "may become 70 tokens, more than the sliding window of 8" in capsys.readouterr().out
    common.say_of_long_images(settings(model=str(tiny_checkpoint("e2b"))), 70)
    assert capsys.readouterr().out == ""  # There an image is causal as text is.


def test_mesh_has_the_named_axes(settings):
    mesh = sft.make_mesh(settings(mesh=MeshConfig(fsdp=4, tp=2)))
    assert dict(mesh.shape) == {"fsdp": 4, "tp": 2}
    assert sft.make_mesh(settings()) is None


def test_run_on_a_mesh_saves_what_a_single_device_loads(settings, tmp_path):
    result = sft.run(settings(mesh=MeshConfig(fsdp=-1, tp=2), max_steps=1))
    # What all of eight devices came to is what the run says of itself.
    assert "mesh:\n  fsdp: 4\n  tp: 2\n" in (tmp_path / "run" / "run_config.yaml").read_text()
    model = load_checkpoint(tmp_path / "run" / "model", text_only=False)
    assert_same_parameters(model, result.model)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_steps": 7, "num_train_epochs": None}, 7),
        ({"max_steps": None, "num_train_epochs": 3}, 9),
        ({"max_steps": 7, "num_train_epochs": 2}, 6),
    ],
)
def test_learning_rate_ends_with_the_steps_or_the_epochs(settings, limits, expected):
    config = settings(gradient_accumulation_steps=2, **limits)
    assert config.total_steps(num_rows=20) == expected


@pytest.mark.parametrize("check", [None, False])
def test_learning_rate_is_planned_from_what_is_trained_on(settings, tmp_path, capsys, check):
    # Half of the rows are too long; of the others a rest is left in each of two buckets.
    lengths = [5, 30, 200, 200] * 5 + [200] * 2
    rows = [
        {"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]}
        for n in lengths
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = DataConfig(path=str(path), max_length=48, bucket_lengths=[24, 48], check=check)
    config = settings(data=data, max_steps=None, num_train_epochs=2, batch_size=2)
    train_ds, _ = sft.make_datasets(config, common.make_processor(config))
    sft.check_datasets(config, tmp_path, train_ds, None)
    steps = config.total_steps(train_ds.num_rows, train_ds.steps_per_epoch())
    sft.say_of_estimate(config, train_ds)
    assert ("data.check=all makes it exact" in capsys.readouterr().out) == (check is False)
    if check is None:
        assert steps == len(list(train_ds)) == 2 * 5
        schedule = make_schedule("cosine", learning_rate=1.0, warmup_steps=0, total_steps=steps)
        assert 0 < schedule(steps - 1) < 0.03 and schedule(steps) == 0


def test_epochs_end_the_run(settings, capsys):
    config = settings(max_steps=5, num_train_epochs=1, lora=LoraConfig(rank=4))
    assert sft.run(config).trainer.train_steps == 3
    assert "max_steps=5 is more than num_train_epochs=1 has, 3 steps," in capsys.readouterr().out


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8)], ids=["full", "lora"])
def test_scanned_layers_train_and_are_saved_as_single_ones(settings, tmp_path, lora):
    # Norms are not decayed, which stacking makes look like matrices.
    changes = {"lora": lora, "weight_decay": 0.1}
    found, expected = (
        sft.run(settings(scan_layers=scan, output_dir=str(tmp_path / str(scan)), **changes))
        for scan in (True, False)
    )
    losses = [result.trainer.history("loss") for result in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    found, expected = parameters(found.model), parameters(expected.model)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, atol=1e-4, err_msg=str(path))
    saved = {path.name for path in (tmp_path / "True").iterdir()}
    assert saved == {path.name for path in (tmp_path / "False").iterdir()}
