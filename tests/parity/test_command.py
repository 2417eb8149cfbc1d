# SPDX-License-Identifier: Apache-2.0
"""`tunix-gemma4 parity DIRECTORY` on tiny directories."""

import shutil
import sys

import pytest
from safetensors.numpy import load_file, save_file

from tunix_gemma4.__main__ import main as command_line
from tunix_gemma4.testing import parity

pytestmark = pytest.mark.parity


def table(output):
    """(case, row) to verdict, in the order printed."""
    rows = [line.split() for line in output.splitlines() if line.endswith(("pass", "FAIL"))]
    return {(words[0], " ".join(words[1:-5])): words[-1] for words in rows}


def corrupted(directory, tmp_path, tensor):
    """A copy of `directory` in which one number of `tensor` is wrong."""
    copy = shutil.copytree(directory, tmp_path / "corrupted")
    tensors = load_file(copy / "model.safetensors")
    tensors[tensor][3, 5] += 0.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("preset", ["e2b", "26b_a4b"])
def test_a_sound_directory_passes_in_every_row(tiny_checkpoint, capsys, preset):
    assert parity.main([str(tiny_checkpoint(preset))]) == 0

    output = capsys.readouterr().out
    assert "own tokenizer and chat template" in output
    rows = table(output)
    names = [name for case, name in rows if case == "image"]
    layers = {"e2b": 6, "26b_a4b": 5}[preset]
    assert names == [
        "vision tower",
        "soft tokens",
        *(f"layer {index}" for index in range(layers - 1)),
        "final norm",
        "logits",
    ]
    assert ("text", "embeddings") in rows
    assert set(rows.values()) == {"pass"}


def test_a_directory_with_text_only_is_compared_in_text(tiny_checkpoint, capsys):
    assert parity.main([str(tiny_checkpoint("12b"))]) == 0
    assert {case for case, _ in table(capsys.readouterr().out)} == {"text"}


def test_a_corrupted_weight_fails_from_its_layer_on(tiny_dir, tmp_path, capsys):
    bad = corrupted(tiny_dir, tmp_path, "model.language_model.layers.2.mlp.up_proj.weight")

    code = parity.main([str(bad), "--against", str(tiny_dir), "--text-only"])

    output = capsys.readouterr().out
    assert code == 1
    verdicts = table(output)
    passed = [name for (_, name), verdict in verdicts.items() if verdict == "pass"]
    assert passed == ["embeddings", "layer 0", "layer 1"]
    assert "5 of 8 rows differ, first text: layer 2" in output


def test_a_corrupted_tower_fails_for_images_alone(tiny_dir, tmp_path, capsys):
    name = "model.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight"
    bad = corrupted(tiny_dir, tmp_path, name)

    assert parity.main([str(bad), "--against", str(tiny_dir)]) == 1

    output = capsys.readouterr().out
    assert {verdict for (case, _), verdict in table(output).items() if case == "text"} == {"pass"}
    assert "first image: vision tower" in output


def test_without_a_tokenizer_ids_are_random_and_rows_still_pass(tiny_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_dir / name, bare)

    assert parity.main([str(bare), "--length", "24"]) == 0

    output = capsys.readouterr().out
    assert "random ids, because" in output and "tokenizer.json" in output
    assert "text: 2 rows of 24, 0 images" in output
    assert "image: 2 rows of 24, 2 images" in output


def test_bfloat16_is_judged_by_its_own_noise(tiny_dir, capsys):
    assert parity.main([str(tiny_dir), "--dtype", "bfloat16"]) == 0
    assert "rows agree in bfloat16" in capsys.readouterr().out


def test_the_command_line_passes_options_on_in_any_order(tiny_dir, capsys):
    assert command_line(["parity", "--text-only", str(tiny_dir), "--length", "30"]) == 0
    assert {case for case, _ in table(capsys.readouterr().out)} == {"text"}


def test_without_torch_the_error_names_the_extra(tiny_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"pip install 'tunix-gemma4\[parity\]'"):
        parity.main([str(tiny_dir)])


def test_directories_of_two_models_are_refused_by_name(tiny_dir, tiny_checkpoint):
    other = tiny_checkpoint("31b")
    with pytest.raises(ValueError, match=r"found \(\d+, \d+\); is .*e2b another model than .*31b"):
        parity.main([str(tiny_dir), "--against", str(other), "--text-only"])
