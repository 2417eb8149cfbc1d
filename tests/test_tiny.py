# SPDX-License-Identifier: Apache-2.0
"""The tiny checkpoint directories that other tests stand on."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from tunix_gemma4.config import ModelConfig
from tunix_gemma4.testing.tiny import PRESETS, build_tiny_checkpoint, tiny_config
from tunix_gemma4.testing.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, WORDS

TEXTS = {
    "spaces": "  two  spaces\tand a tab ",
    "newlines": "\n\n\n a\r\nb\n",
    "accents": "é e\u0301 ß Ǆ",
    "scripts": "日本語 हिन्दी العربية",
    "emoji": "🙂👩‍👩‍👧🇪🇺",
    "gemma_space": "a▁b ▁ Ġ Ċ",
    "control": "\x00\x1b\x7f\ufeff",
    "special": "<|turn>user<turn|><|image|><bos><pad>",
    "unused": "<unused3>",
    "empty": "",
}


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_tokenizer_gives_back_what_it_took(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("word", WORDS)
def test_tokenizer_knows_each_of_its_words_as_one_token(tokenizer, word):
    assert len(tokenizer.encode(word, add_special_tokens=False)) == 1


def test_tokenizer_is_the_one_written_and_not_the_gemma_class(tokenizer):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    assert backend["pre_tokenizer"]["type"] == "ByteLevel"
    assert len(tokenizer) == VOCAB_SIZE


def test_special_tokens_have_the_places_of_gemma(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    assert ids == [0, 1, 2, 3, 4]
    assert tokenizer.encode("".join(SPECIAL_TOKENS), add_special_tokens=False) == (
        tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    )


def test_config_declares_the_media_tokens_of_the_tokenizer(tokenizer, tiny_dir):
    config = json.loads((tiny_dir / "config.json").read_text())
    names = {"image": "<|image|>", "boi": "<|image>", "eoi": "<image|>", "video": "<|video|>"}
    for name, token in names.items():
        assert config[f"{name}_token_id"] == tokenizer.convert_tokens_to_ids(token), name


def test_template_writes_the_turns_of_gemma(tokenizer):
    messages = [
        {"role": "system", "content": " Be brief. "},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}],
        },
        {"role": "assistant", "content": "<|channel>thought\nIt has whiskers.\n<channel|>A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\n<|image|>What is this?<turn|>\n"
        "<|turn>model\nA cat.<turn|>\n<|turn>user\nSure?<turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize("thinking", [False, True], ids=["thinking_off", "thinking_on"])
@pytest.mark.parametrize("preset", ["e2b", "31b"])
def test_template_generations_differ_in_the_empty_thought(tiny_checkpoint, preset, thinking):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint(preset))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    system = "<|turn>system\n<|think|>\n<turn|>\n" if thinking else ""
    empty = "<|channel>thought\n<channel|>" if preset == "31b" and not thinking else ""
    assert rendered == f"<bos>{system}<|turn>user\nHi<turn|>\n<|turn>model\n{empty}"


@pytest.mark.parametrize("preset", PRESETS)
def test_tiny_config_is_that_of_the_directory(tiny_checkpoint, preset):
    directory = tiny_checkpoint(preset)
    config = tiny_config(preset)
    assert config == ModelConfig.from_hf(directory, text_only=preset == "12b")
    assert config.has_vision == (preset != "12b")
    assert config.vocab_size == VOCAB_SIZE


def test_presets_exercise_what_the_released_sizes_do():
    layers = {preset: tiny_config(preset).layers for preset in PRESETS}
    for preset in ("e2b", "e4b"):
        assert {layer.kind for layer in layers[preset] if layer.shares_kv} == {"sliding", "full"}
    assert len({layer.mlp_dim for layer in layers["e2b"]}) == 2
    assert len({layer.mlp_dim for layer in layers["e4b"]}) == 1
    for preset in ("12b", "26b_a4b", "31b"):
        assert any(layer.k_eq_v for layer in layers[preset])
    assert all(layer.moe for layer in layers["26b_a4b"])


def test_same_seed_gives_the_same_file_and_another_seed_another(tmp_path):
    files = [
        build_tiny_checkpoint(tmp_path / name, seed=seed) / "model.safetensors"
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, same, other = (file.read_bytes() for file in files)
    assert first == same
    assert first != other


def test_every_tensor_differs_from_its_neutral_value_and_from_every_other(tiny_checkpoint):
    for preset in ("e2b", "26b_a4b"):
        tensors = load_file(tiny_checkpoint(preset) / "model.safetensors")
        seen = {}
        for name, value in tensors.items():
            assert not np.all(value == 1.0), name
            assert not np.all(value == 0.0), name
            twin = seen.setdefault(value.tobytes(), name)
            assert twin == name


def test_clip_bounds_are_ordered(tiny_checkpoint):
    tensors = load_file(tiny_checkpoint("e2b") / "model.safetensors")
    lower = [name for name in tensors if name.endswith(("input_min", "output_min"))]
    assert lower
    for name in lower:
        assert tensors[name] < tensors[name.replace("_min", "_max")]


def test_demo_starts_from_neutral_norms(tiny_checkpoint):
    tensors = load_file(tiny_checkpoint("demo") / "model.safetensors")
    norms = [name for name in tensors if "norm" in name or name.endswith("layer_scalar")]
    assert norms
    assert all(np.all(tensors[name] == 1.0) for name in norms)


def test_audio_adds_an_audio_tower_and_changes_nothing_else(tiny_checkpoint):
    plain = load_file(tiny_checkpoint("e2b") / "model.safetensors")
    audio = load_file(tiny_checkpoint("e2b", audio=True) / "model.safetensors")
    added = set(audio) - set(plain)
    assert added
    assert all(name.startswith(("model.audio_tower.", "model.embed_audio.")) for name in added)
    assert all(np.array_equal(audio[name], plain[name]) for name in plain)


def test_generation_config_stops_on_three_tokens(tokenizer, tiny_dir):
    stop = json.loads((tiny_dir / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stop) == ["<eos>", "<turn|>", "<|tool_response>"]


def test_unknown_preset_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"preset: expected one of e2b, .*, found 'e9b'"):
        build_tiny_checkpoint(tmp_path, preset="e9b")


def test_audio_is_refused_where_no_released_model_has_it(tmp_path):
    with pytest.raises(ValueError, match="only e2b and e4b have an audio tower, not '31b'"):
        build_tiny_checkpoint(tmp_path, preset="31b", audio=True)
