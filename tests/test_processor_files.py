# SPDX-License-Identifier: Apache-2.0
"""Damaged tokenizer files are named, and code that a directory brings is never run."""

import json
import shutil

import pytest

from tunix_gemma4.data.processor import Processor


@pytest.fixture
def directory(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint("demo"), tmp_path / "model")


def change(path, **fields):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", '{"version": "1.0", "model"', r"tokenizer\.json: not valid JSON"),
        ("tokenizer.json", "{}", r"model: the tokenizer cannot be loaded \("),
        ("tokenizer_config.json", "[", r"tokenizer_config\.json: not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object"),
        ("special_tokens_map.json", "\x00", r"special_tokens_map\.json: not valid JSON"),
        ("generation_config.json", '{"eos', r"generation_config\.json: not valid JSON"),
        ("generation_config.json", '{"eos_token_id": "1"}', r"json: eos_token_id is '1', expected"),
        ("generation_config.json", '{"eos_token_id": [1, true]}', "expected an id or a list"),
        ("generation_config.json", '{"eos_token_id": []}', "expected an id or a list"),
        ("generation_config.json", '{"eos_token_id": [1, 1000000000]}', "1000000000 is beyond"),
        ("tokenizer_config.json", None, r"tokenizer_config\.json: .*, there is no such file"),
        ("tokenizer_config.json", '{"bos_token": "<bos>"}', r"json: .*, found no eos_token;"),
        ("processor_config.json", "{", r"processor_config\.json: not valid JSON"),
        ("processor_config.json", '{"image_processor": 3}', "image_processor: expected a JSON"),
        ("chat_template.jinja", "{% for %}", "chat template"),
    ],
)
def test_damaged_file_is_named(name, text, message, directory):
    (directory / name).unlink(missing_ok=True)
    if text is not None:
        (directory / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Processor.from_pretrained(directory)


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_directory_is_never_run_nor_asked_about(known, directory, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked on the terminal"))
    (directory / "own.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\nclass Own: pass\n")
    names = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
    names |= {"AutoProcessor": "own.Own", "AutoModelForCausalLM": "own.Own"}
    change(directory / "config.json", auto_map=names)
    change(directory / "processor_config.json", auto_map=names)
    own = {} if known else {"tokenizer_class": "Own"}
    change(directory / "tokenizer_config.json", auto_map=names, **own)
    if known:
        Processor.from_pretrained(directory)
    else:
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: auto_map asks for code"):
            Processor.from_pretrained(directory)
    assert not (directory / "ran").exists()
