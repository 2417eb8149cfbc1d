# SPDX-License-Identifier: Apache-2.0
"""The recipe of reinforcement learning: what it prints and leaves, and where it goes on."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tunix_gemma4.checkpoint import load_checkpoint
from tunix_gemma4.data.processor import Processor
from tunix_gemma4.lora import LoraConfig, load_adapter
from tunix_gemma4.plugin.rl.cluster import cluster_config, make_algorithm
from tunix_gemma4.recipes import common, grpo
from tunix_gemma4.recipes.run_directory import write_settings
from tunix_gemma4.settings.common import MeshConfig
from tunix_gemma4.settings.grpo import LOSS_TYPES, GrpoRunConfig, PromptConfig

STEPS = 5
# A tiny model draws letters at random, so that this has a spread within each group.
REWARDS = """
def early_letters(prompts, completions, answer):
    assert len(prompts) == len(completions) == len(answer)
    assert set(answer) <= set("0123456789")
    texts = [message["content"] for (message,) in completions]
    early = [sum(letter.lower() < "m" for letter in said) for said in texts]
    return [count / max(len(said), 1) for count, said in zip(early, texts)]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """text.jsonl, and images.jsonl of which every second row has an image; and rewards.py."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    lines = {"text": [], "images": []}
    for index in range(9):
        Image.fromarray(draw.integers(0, 255, (8, 8), np.uint8)).save(folder / f"{index}.png")
        lines["text"].append({"prompt": f"What is {index}?", "answer": str(index)})
        parts = [{"type": "image", "image": f"{index}.png"}] if index % 2 else []
        messages = [
            {"role": "user", "content": [*parts, {"type": "text", "text": "What digit is this?"}]},
            {"role": "assistant", "content": str(index)},
        ]
        lines["images"].append({"messages": messages})
    lines["text"].append({"prompt": "What is a very long prompt? " * 9, "answer": "9"})
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def settings_for(directory, data, output, **changes):
    source = changes.pop("source", "text")
    defaults = {
        "model": str(directory),
        "output_dir": str(output),
        "data": PromptConfig(
            path=str(data / f"{source}.jsonl"), max_prompt_length=96, max_soft_tokens=70
        ),
        "reward_functions": [f"{data / 'rewards.py'}:early_letters"],
        "num_generations": 4,
        "max_completion_length": 6,
        "batch_size": 4,
        "max_steps": STEPS,
        "num_train_epochs": None,
        "learning_rate": 1e-2,
        "remat": "none",
        "report_to": "none",
    }
    return GrpoRunConfig(**(defaults | changes))


@pytest.fixture
def settings(tiny_checkpoint, data, tmp_path):
    """`settings(**changes)`: a short run on the tiny model."""
    return lambda **changes: settings_for(
        tiny_checkpoint("demo"), data, tmp_path / "run", **changes
    )


def adapters(model):
    state = nnx.state(model, nnx.LoRAParam)
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


@dataclasses.dataclass
class Trained:
    """A run of five steps with adapters."""

    config: GrpoRunConfig
    result: grpo.Result
    output: Path
    printed: str


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    config = settings_for(
        *(tiny_checkpoint("demo"), data, output),
        lora=LoraConfig(rank=4, alpha=8),
        train_micro_batch_size=2,
        beta=0.02,
        scan_layers=True,
        save_steps=3,
        save_total_limit=9,
        eval_steps=4,
        log_completions=True,
        report_to="tensorboard",
    )
    config.data.eval_path = str(data / "text.jsonl")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = grpo.run(config)
    return Trained(config, result, output, printed.getvalue())


def test_run_leaves_adapter_checkpoints_and_curves(trained):
    assert {path.name for path in trained.output.iterdir()} == {
        *("adapter", "checkpoints", "tensorboard", "run_config.yaml"),
    }
    assert list((trained.output / "tensorboard").iterdir())
    base = load_checkpoint(trained.config.model, text_only=False)
    reloaded = adapters(load_adapter(base, trained.output / "adapter"))
    found = adapters(trained.result.model)
    assert found.keys() == reloaded.keys()
    for path, array in reloaded.items():
        np.testing.assert_array_equal(found[path], array, err_msg=str(path))
    # B starts at zero, so it is what training made it.
    moved = [array.any() for path, array in found.items() if path[-1].endswith("lora_b")]
    assert all(moved) and moved


def test_metrics_of_every_step_are_kept(trained):
    result = trained.result
    assert result.steps == STEPS
    for name in (
        *("actor/loss", "actor/kl", "actor/entropy", "actor/pg_clipfrac", "actor/grad_norm"),
        *("rewards/score/mean", "rewards/score/std", "completions/mean_length"),
        "perf/step_time_sec",
    ):
        values = result.history(name)
        assert len(values) == STEPS and np.isfinite(values).all(), name
    assert min(result.history("rewards/score/std")) > 0
    assert max(result.history("actor/kl")[1:]) > 0
    assert max(result.history("actor/rollout_agreement/max")) < 1e-3
    # Before the first step, after the fourth, and in the end.
    assert len(result.history("rewards/score/mean", "eval")) == 3
    assert result.history("rewards/nothing") == []


def test_run_prints_the_first_prompt_the_lines_and_samples(trained):
    printed = trained.printed
    assert "1 of 10 prompts are left out, longer than data.max_prompt_length=96" in printed
    assert "8 of 9 prompts are used, in whole batches" in printed
    assert "'<bos><|turn>user\\nWhat is 0?<turn|>\\n<|turn>model\\n'" in printed
    assert re.search(r"^eval  step 0  reward 0\.\d+  length [\d.]+$", printed, re.MULTILINE)
    assert re.search(r"^eval  step 4  reward 0\.\d+", printed, re.MULTILINE)
    lines = re.findall(
        r"^step (\d)/5  reward [\d.]+  std .*  epoch [\d.]+.*  s/step [\d.]+$",
        printed,
        re.MULTILINE,
    )
    assert lines == list("12345")
    assert len(re.findall(r"  left \d+:\d\d  s/step", printed)) == 3  # Neither first nor last.
    rewards = [f"{reward:.4g}" for reward in trained.result.history("rewards/score/mean")]
    assert re.findall(r"^step \d/5  reward ([\d.]+)", printed, re.MULTILINE) == rewards
    assert printed.index("Compiling sampling, log-probabilities and") < printed.index(
        "eval  step 0"
    )
    samples = re.findall(r"^    prompt     '<bos>.*\n    completion '", printed, re.MULTILINE)
    assert len(samples) == 3 * STEPS
    assert printed.endswith(f"5 steps done. Saved: {trained.output / 'adapter'}\n")


def test_finished_run_is_not_overwritten(trained):
    with pytest.raises(ValueError, match=r"run: it holds a finished run \(adapter/\)"):
        grpo.run(trained.config)


def test_broken_off_run_goes_on_as_if_nothing_had_happened(trained, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(trained.output, output)
    shutil.rmtree(output / "adapter")

    def stop_it(trainer):
        signal.raise_signal(signal.SIGTERM)

    config = dataclasses.replace(trained.config, output_dir=str(output), log_completions=False)
    changed = dataclasses.replace(config, batch_size=8)
    with pytest.raises(ValueError, match="a run with another batch_size"):
        grpo.run(changed)
    changed = dataclasses.replace(config, num_generations=8, beta=0.5, reward_weights=[2.0])
    with pytest.raises(ValueError, match="another reward_weights, num_generations, beta"):
        grpo.run(changed)
    checkpoints = output / "checkpoints" / "actor"
    shutil.rmtree(checkpoints)
    # The host reports a step while the next one is under way.
    with pytest.raises(SystemExit, match=r"stopped by SIGTERM after step 2, which") as stopped:
        grpo.run(config, after_step=stop_it)
    assert stopped.value.code == 143
    result = grpo.run(config)
    assert f"Resuming after step 2 from {checkpoints}." in capsys.readouterr().out
    assert result.steps == STEPS
    for name in ("rewards/score/mean", "actor/loss"):
        assert result.history(name) == pytest.approx(trained.result.history(name)[2:], abs=1e-6)
    for path, array in adapters(trained.result.model).items():
        np.testing.assert_allclose(adapters(result.model)[path], array, atol=1e-5)


def test_place_in_the_prompts_is_not_reckoned_from_other_sizes(settings):
    config = settings()
    write_settings(Path(config.output_dir), config)
    (Path(config.output_dir) / "checkpoints" / "actor" / "1").mkdir(parents=True)
    config.num_iterations, config.max_steps, config.allow_changes = 2, 4, True
    with pytest.raises(ValueError, match="num_iterations was 1, is 2.* depends on num_iterations"):
        grpo.run(config)


def test_all_parameters_are_trained_on_images_and_saved_merged(settings, tmp_path):
    """Two optimizer steps a batch, no KL penalty, on two devices."""
    config = settings(
        source="images",
        loss_type="dapo",
        num_iterations=2,
        max_steps=2,
        save_steps=2,
        eval_steps=2,
        mesh=MeshConfig(fsdp=2),
    )
    result = grpo.run(config)
    saved = load_checkpoint(tmp_path / "run" / "model", text_only=False)
    before = load_checkpoint(config.model, text_only=False)
    for kind in ("language_model", "vision_tower"):
        states = [nnx.state(vars(model)[kind]) for model in (saved, before)]
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), *states)
        assert np.mean(jax.tree.leaves(changed)) > 0.9, kind
    assert result.history("actor/pg_clipfrac")[0] == 0 < result.history("actor/pg_clipfrac")[1]
    assert max(result.history("actor/rollout_agreement/max")) < 1e-3


def test_reward_that_goes_wrong_stops_the_run_and_names_the_sample(settings, data, tmp_path):
    (tmp_path / "bad.py").write_text(
        "def bad(prompts, completions, answer):\n"
        "    return [float('nan') if right == '3' else 0.0 for right in answer]\n"
    )
    config = settings(
        reward_functions=[f"{tmp_path / 'bad.py'}:bad"],
        reward_weights=[2.0],
        lora=LoraConfig(rank=2),
        max_completion_length=2,
    )
    with pytest.raises(RuntimeError, match=r"(?s)reward function bad.*finite.*What is 3\?"):
        grpo.run(config)


# ---- Settings become what the host reads.


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_each_loss_is_one_of_the_hosts(loss_type):
    beta = 0.0 if loss_type == "dapo" else 0.3
    settings = GrpoRunConfig(
        loss_type=loss_type, num_generations=6, num_iterations=2, beta=beta, epsilon=0.1
    )
    learner, config = make_algorithm(settings)
    expected = {
        "grpo": ("GRPOLearner", "grpo", "sequence-mean-token-mean", "grpo", 0.1),
        "gspo": ("GRPOLearner", "gspo-token", "sequence-mean-token-mean", "grpo", 0.1),
        "dr_grpo": ("DrGRPOLearner", "grpo", "sequence-mean-token-scale", "drgrpo", 0.1),
        "dapo": ("DAPOLearner", "grpo", "token-mean", "grpo", 0.28),
    }[loss_type]
    found = (learner.__name__, config.loss_algo, config.loss_agg_mode, config.advantage_estimator)
    assert (*found, config.epsilon_high) == expected
    assert (config.num_generations, config.num_iterations) == (6, 2)
    assert (config.beta, config.epsilon) == (beta, 0.1)
    settings = GrpoRunConfig(loss_type=loss_type, num_generations=2, epsilon_high=0.5)
    _, wider = make_algorithm(settings)
    assert wider.epsilon_high == 0.5


def test_sampling_follows_the_settings(settings):
    config = settings(temperature=0.7, top_p=0.9, top_k=20, seed=3)
    rollout = cluster_config(config, optimizer=None, mesh=None).rollout_config
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.seed) == (0.7, 0.9, 20, 3)
    assert (rollout.max_prompt_length, rollout.max_tokens_to_generate) == (96, 6)


def test_column_that_a_reward_asks_for_in_vain_is_named_before_anything_is_loaded(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(common, "load_base", None)
    (tmp_path / "asks.py").write_text(
        "def asks(completions, answer, beta, level, *, lenient=True, **others):\n    return None\n"
    )
    config = settings(reward_functions=[f"{tmp_path / 'asks.py'}:asks"])
    with pytest.raises(ValueError, match=r"asks asks for level, and no row .* columns are: answer"):
        grpo.run(config)


def test_rewards_are_weighted(settings):
    config = settings(reward_functions=["exact_answer"] * 2, reward_weights=[1.0, 0.5])
    given = {"prompts": ["?"], "completions": ["7"], "answer": ["7"]}
    assert [function(**given) for function in grpo.reward_functions(config)] == [[1.0], [0.5]]


def test_sampling_on_other_devices_takes_those_behind(settings):
    mesh, rollout_mesh = grpo.make_meshes(
        settings(mesh=MeshConfig(fsdp=2, tp=2), rollout_mesh=MeshConfig(fsdp=1, tp=4))
    )
    used = [device.id for part in (mesh, rollout_mesh) for device in part.devices.flat]
    assert sorted(used) == list(range(8))
    with pytest.raises(ValueError, match="rollout_mesh: fsdp 1 x tp 8 is 8 devices, and there ar"):
        grpo.make_meshes(settings(mesh=MeshConfig(fsdp=2), rollout_mesh=MeshConfig(tp=8)))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_steps": 7, "num_train_epochs": None}, 7),
        ({"max_steps": None, "num_train_epochs": 3}, 15),
        ({"max_steps": 7, "num_train_epochs": 2}, 7),
        ({"max_steps": None, "num_train_epochs": 1, "mini_batch_size": 2}, 10),
        ({"max_steps": None, "num_train_epochs": 1, "batch_size": 64}, 1),
    ],
)
def test_epochs_end_with_whole_rollout_steps(settings, limits, expected):
    assert settings(**limits).total_steps(num_rows=20) == expected


def test_prompts_of_the_end_that_fill_no_rollout_step_are_said(settings, capsys):
    config = settings(max_steps=None, num_train_epochs=1)
    for rows, said in (
        (8, ""),
        (7, f"last {7 % config.batch_size} of 7 prompts (1 epochs)"),
        (1, f"batch_size={config.batch_size} is more than the 1 prompts"),
    ):
        grpo.say_of_end(config, rows, config.total_steps(rows))
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)


def test_evaluation_needs_one_whole_batch(settings, data):
    config = settings(batch_size=16)
    config.data.eval_path = str(data / "text.jsonl")
    processor = Processor.from_pretrained(config.model, 70)
    with pytest.raises(ValueError, match="data.eval_path: expected at least 16 prompts.*found 9"):
        grpo.eval_batches(config, processor)
