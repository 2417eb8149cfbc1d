# SPDX-License-Identifier: Apache-2.0
"""A corpus of malformed inputs, generated: each is one error that names the file and the field.

No model is built, and what lay beside the input is as it was.
"""

import json
import math
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from tunix_gemma4.__main__ import main
from tunix_gemma4.checkpoint.files import read_directory
from tunix_gemma4.config import ModelConfig
from tunix_gemma4.data import make_dataset
from tunix_gemma4.data.preferences import PreferenceBatches
from tunix_gemma4.data.processor import Processor
from tunix_gemma4.data.prompts import PromptRows
from tunix_gemma4.lora.peft import check_adapter
from tunix_gemma4.settings.grpo import load_grpo_config
from tunix_gemma4.settings.sft import load_run_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_named(folder, run, *names) -> None:
    """`run` raises a ValueError of our own words that says all of `names`; `folder` stays."""
    before = contents(folder)
    with pytest.raises(ValueError) as caught:
        run()
    text = str(caught.value)
    assert type(caught.value).__name__ in ("ValueError", "RowError"), repr(caught.value)
    assert not [name for name in names if str(name) not in text], text
    assert len(text) < 3000
    assert "Traceback" not in text
    assert contents(folder) == before


def cases(*groups):
    """Parameters with names of their own: the parts, and a number where that is not enough."""
    seen, found = Counter(), []
    for group in groups:
        for case in group:
            name = "-".join(str(part)[:24] for part in case if not callable(part))
            name = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
            seen[name] += 1
            found.append(pytest.param(*case, id=f"{name}-{seen[name]}"))
    return found


# ---- config.json

NO_WHOLE = ("8", 2.5, True, -1, 2**40, [8], None)
NO_NUMBER = ("1", True, -1.0, 0, math.nan, math.inf, [], None)
TEXT_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "sliding_window", "num_kv_shared_layers"),
    *("hidden_size_per_layer_input", "vocab_size_per_layer_input", "max_position_embeddings"),
    *("pad_token_id", "bos_token_id"),
)
VISION_COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("pooling_kernel_size", "patch_size", "position_embedding_size"),
)
TEXT_OTHERS = {
    "rms_norm_eps": NO_NUMBER,
    "final_logit_softcapping": ("30", True, -1, 0, math.nan, []),
    "eos_token_id": ("1", [], [1, "2"], 1.5, -1, {}),
    "attention_k_eq_v": (None, "true", 1, []),
    "enable_moe_block": ("no", 0, {}),
    "layer_types": ("full_attention", {}, [], [1], [["full_attention"]], ["chunked"] * 6, 5),
    "rope_parameters": ([], "default", {}, {"full_attention": 5}, 1.0),
    "use_bidirectional_attention": ("all", True, 5, []),
    "attention_bias": (True, "no"),
    "attention_dropout": (0.1, "0.1"),
    "hidden_activation": ("silu", None, 5),
    "per_layer_config": ([], "x", {"9": {}}, {"-1": {}}, {"a": {}}, {"2": 5}, {"2": {"x": 1}}),
    "quantization_config": ({"quant_method": "gptq"},),
}
TOP_OTHERS = {
    "model_type": (None, "gemma3", "gemma4_text", 5, []),
    "text_config": ([], "x", 5, None),
    "vision_config": ([], "x", 5),
    "dtype": ("int8", "float99", "float8_e4m3fn", "float64", 5, ["bfloat16"], {}),
    "image_token_id": ("<|image|>", -1, 2.5, [5]),
    "tie_word_embeddings": ("false", 5, []),
    "quantization_config": ({"quant_method": "bitsandbytes"}, {"quant_algo": "NVFP4"}),
    "quantization": ({"bits": 4},),
}
ROPE = {
    "rope_theta": ("1e4", None, -1.0, 0, math.nan, math.inf, True),
    "rope_type": ("yarn", None, 5),
    "factor": (0, "2", math.nan),
    "partial_rotary_factor": (0, 2.0, "0.25"),
}
NO_JSON = (b"", b"{", b"[]", b"5", b'"x"', b"null", b"\xff\xfe{\x00}", b"\0" * 9, b"[" * 5000)


def field_cases(table, *where):
    for field, values in table.items():
        for value in values:
            yield (*where, field, value)


@pytest.fixture(scope="module")
def config(tiny_dir):
    return json.loads((tiny_dir / "config.json").read_text())


@pytest.mark.parametrize(
    ("section", "field", "value"),
    cases(
        field_cases(dict.fromkeys(TEXT_COUNTS, NO_WHOLE), "text_config"),
        field_cases(dict.fromkeys(VISION_COUNTS, NO_WHOLE), "vision_config"),
        field_cases(TEXT_OTHERS, "text_config"),
        field_cases({"rms_norm_eps": NO_NUMBER, "standardize": ("no", 1)}, "vision_config"),
        field_cases(TOP_OTHERS, ""),
        field_cases(ROPE, "rope"),
    ),
)
def test_a_value_of_config_json(tmp_path, config, section, field, value):
    changed = json.loads(json.dumps(config))
    target = changed.get(section, changed)
    if section == "rope":
        target = changed["text_config"]["rope_parameters"]["full_attention"]
    target[field] = value
    file = tmp_path / "config.json"
    file.write_text(json.dumps(changed))
    assert_named(tmp_path, lambda: ModelConfig.from_hf(tmp_path), file, field)


@pytest.mark.parametrize(("content",), cases((x,) for x in NO_JSON))
def test_a_config_json_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert_named(tmp_path, lambda: ModelConfig.from_hf(tmp_path), tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "read"), [("config.json", ModelConfig.from_hf), ("adapter_config.json", check_adapter)]
)
def test_a_key_that_stands_twice(tmp_path, name, read):
    (tmp_path / name).write_text('{"r": 1, "of": {"lora_alpha": 1, "lora_alpha": 9}}')
    message = f"{name}: the key 'lora_alpha' stands in one object twice$"
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


# ---- safetensors and their index


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


FORBIDDEN = {
    "overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "same place": {"a": entry(0, 8), "b": entry(0, 8), "c": entry(8, 16)},
    "shifted": {"a": entry(8, 16)},
    "reversed": {"a": entry(8, 0)},
    "negative": {"a": entry(-8, 0), "b": entry(0, 16, (4,))},
    "hole": {"a": entry(0, 4, (1,)), "b": entry(8, 16)},
    "stray bytes behind": {"a": entry(0, 8)},
    "beyond the end": {"a": entry(0, 24, (6,))},
    "too short for its shape": {"a": entry(0, 16, (5,))},
    "too long for its shape": {"a": entry(0, 16, (3,))},
    "width": {"a": entry(0, 16, (4,), "BF16")},
    "unknown dtype": {"a": entry(0, 16, (4,), "FP32")},
    "dtype of a number": {"a": entry(0, 16, (4,), 32)},
    "negative shape": {"a": entry(0, 16, (-4,))},
    "shape of a number": {"a": entry(0, 16, 4)},
    "overflow": {"a": entry(0, 16, (2**62, 4, 2**62))},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "three offsets": {"a": entry(0, 16, (4,)) | {"data_offsets": [0, 8, 16]}},
    "null": {"a": None},
    "fractions": {"a": entry(0.0, 16.0, (4,))},
    "metadata of a number": {"__metadata__": {"a": 1}, "b": entry(0, 16, (4,))},
    "a list": [entry(0, 16, (4,))],
}
CUTS = (0, 1, 7, 8, 9, 100, 5000, -1, -4)


@pytest.fixture(params=["base", "adapter"])
def weights_file(request, tmp_path, tiny_dir):
    """A file of tensors, and what reads it: a checkpoint's or an adapter's."""
    if request.param == "base":
        shutil.copy(tiny_dir / SINGLE, tmp_path)
        return tmp_path / SINGLE, lambda: read_directory(tmp_path)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    file = tmp_path / "adapter_model.safetensors"
    shutil.copy(tiny_dir / SINGLE, file)
    return file, lambda: check_adapter(tmp_path)


def write_tensors(file, header, size=16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_header_that_the_format_forbids(tmp_path, weights_file, name):
    file, read = weights_file
    write_tensors(file, FORBIDDEN[name])
    assert_named(tmp_path, read, file)


@pytest.mark.parametrize("place", ["the same", "another"])
def test_a_name_that_stands_twice(tmp_path, weights_file, place):
    file, read = weights_file
    one = json.dumps(entry(0, 16, (4,)))
    other = one if place == "the same" else json.dumps(entry(16, 32, (4,)))
    write_tensors(file, f'{{"a": {one}, "a": {other}}}'.encode(), 16 if one == other else 32)
    assert_named(tmp_path, read, file)


@pytest.mark.parametrize("cut", CUTS)
def test_a_file_that_is_cut_off(tmp_path, weights_file, cut):
    file, read = weights_file
    file.write_bytes(file.read_bytes()[:cut])
    assert_named(tmp_path, read, file)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\0" + data,
        lambda data: b"PK\x03\x04" + data,
        lambda data: data + b"\0",
        lambda data: struct.pack("<Q", 2**62) + data[8:],
        lambda data: struct.pack("<Q", 200_000_000) + data[8:],
        lambda data: struct.pack("<q", -1) + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        lambda data: b"<!DOCTYPE html><html>not found</html>",
    ],
)
def test_bytes_that_are_another_file(tmp_path, weights_file, change):
    file, read = weights_file
    file.write_bytes(change(file.read_bytes()))
    assert_named(tmp_path, read, file)


INDICES = (
    *({}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "x"}),
    *({"weight_map": {"a": 5}}, {"weight_map": {"a": None}}, {"weight_map": {"a": ["x"]}}),
    {"weight_map": {"a": "../outside.safetensors"}},
    {"weight_map": {"a": "/etc/passwd"}},
    {"weight_map": {"a": "model.bin"}},
    {"weight_map": {"a": ""}},
    {"weight_map": {"a": "gone.safetensors"}},
    {"weight_map": {"a": "part.safetensors", "b": "part.safetensors"}},
    {"weight_map": {"b": "part.safetensors"}},
)


@pytest.mark.parametrize(("index",), cases((x,) for x in (*INDICES, *NO_JSON)))
def test_an_index(tmp_path, index):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "part.safetensors")
    raw = index if isinstance(index, bytes) else json.dumps(index).encode()
    (tmp_path / INDEX).write_bytes(raw)
    assert_named(tmp_path, lambda: read_directory(tmp_path), INDEX)


# ---- Adapters

ADAPTER = {
    "peft_type": (None, "LOHA", 5, []),
    "r": ("4", 0, -1, 2.5, None, True, [], math.nan),
    "lora_alpha": ("4", 0, -1.0, None, True, [], math.nan, math.inf),
    "modules_to_save": (["lm_head"], ["model.embed_tokens"], ["norm"], "x", 5),
    "bias": ("all", 5),
    "use_dora": (True,),
    "use_rslora": ("yes", 5),
    "rank_pattern": ({"q_proj": 8},),
    "alpha_pattern": ({"q_proj": 8},),
    "init_lora_weights": ("pissa", "olora", 5, []),
    "target_parameters": (["experts.down_proj"],),
    "trainable_token_indices": ([1, 2],),
    "a_setting_of_tomorrow": (1, "x"),
}
PREFIX = "base_model.model.model.language_model.layers.0"
TENSOR_NAMES = {
    "router": f"{PREFIX}.router.proj.lora_A.weight",
    "audio": "base_model.model.model.audio_tower.layers.0.self_attn.q_proj.linear.lora_A.weight",
    "the audio tower": "base_model.model.model.embed_audio.embedding_projection.lora_A.weight",
    "experts": f"{PREFIX}.experts.gate_up_proj.lora_A.weight",
    "head": "base_model.model.lm_head.weight",
    "the embedding": "base_model.model.lm_head.lora_A.weight",
    "embedding": "base_model.model.model.language_model.embed_tokens.lora_embedding_A",
}


def write_adapter(folder, settings, *names):
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    tensors = {name: np.zeros((2, 2), np.float32) for name in names}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(("field", "value"), cases(field_cases(ADAPTER)))
def test_a_setting_of_an_adapter(tmp_path, field, value):
    write_adapter(tmp_path, {field: value})
    file = tmp_path / "adapter_config.json"
    assert_named(tmp_path, lambda: check_adapter(tmp_path), file, field)


@pytest.mark.parametrize(("content",), cases((x,) for x in NO_JSON))
def test_settings_of_an_adapter_that_are_none(tmp_path, content):
    write_adapter(tmp_path, {})
    (tmp_path / "adapter_config.json").write_bytes(content)
    assert_named(tmp_path, lambda: check_adapter(tmp_path), tmp_path / "adapter_config.json")


@pytest.mark.parametrize("what", TENSOR_NAMES)
def test_tensors_of_an_adapter_that_nothing_carries(tmp_path, what):
    write_adapter(tmp_path, {}, TENSOR_NAMES[what])
    file = tmp_path / "adapter_model.safetensors"
    assert_named(tmp_path, lambda: check_adapter(tmp_path), file, what)


# ---- Tokenizer, template, stop list, pictures

TOKENIZER = {
    "tokenizer.json": (
        *(*NO_JSON, b"{}", b'{"model": null}', b'{"model": {"type": "BPE", "vocab": 5}}'),
        *(b'{"version": "1.0", "model": {"type": "Nothing"}}', b'{"model": {"vocab": {"a": "b"}}}'),
    ),
    "tokenizer_config.json": NO_JSON,
    "generation_config.json": (
        *(*NO_JSON, b'{"eos_token_id": "<eos>"}', b'{"eos_token_id": [1, "2"]}'),
        *(b'{"eos_token_id": []}', b'{"eos_token_id": 1.5}', b'{"eos_token_id": true}'),
        *(b'{"eos_token_id": -1}', b'{"eos_token_id": {"a": 1}}', b'{"eos_token_id": [[1]]}'),
    ),
    "processor_config.json": (
        *(*NO_JSON, b'{"image_processor": 5}', b'{"image_processor": {"max_soft_tokens": "70"}}'),
        *(b'{"image_processor": {"max_soft_tokens": 71}}', b'{"image_processor": []}'),
        *(b'{"image_processor": {"max_soft_tokens": true}}', b'{"max_soft_tokens": [70]}'),
    ),
    "chat_template.jinja": (
        b"{{",
        b"{% for x in %}",
        b"",
        b"\xff\xfe",
        b"{{ messages | nothing }}",
    ),
}


@pytest.fixture(scope="module")
def small(tiny_dir, tmp_path_factory):
    """The tiny directory without its weights."""
    folder = tmp_path_factory.mktemp("small")
    return shutil.copytree(
        tiny_dir, folder / "tiny", ignore=shutil.ignore_patterns("*.safetensors")
    )


@pytest.mark.parametrize(
    ("name", "content"), cases((name, x) for name, many in TOKENIZER.items() for x in many)
)
def test_a_file_of_the_processor(tmp_path, small, name, content):
    directory = shutil.copytree(small, tmp_path / "tiny")
    (directory / name).write_bytes(content)
    named = "chat template" if "template" in name and content[:1] != b"\xff" else name.split(".")[0]
    assert_named(tmp_path, lambda: Processor.from_pretrained(directory), directory, named)


# ---- Rows


def messages(*content, role="assistant"):
    asked = {"role": "user", "content": content[0]}
    return {"messages": [asked, *({"role": role, "content": one} for one in content[1:])]}


def with_part(**part):
    return messages([part, {"type": "text", "text": "What is it?"}], "A cat.")


def call(**changes):
    one = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}} | changes
    asked = {"role": "user", "content": "a"}
    return {"messages": [asked, {"role": "assistant", "tool_calls": [one]}]}


ROWS = {
    "row": (5, "text", [], None, {}, {"text": "a"}, {"id": 1}),
    "messages": (
        *({"messages": value} for value in (None, "", [], {}, 5, [5], ["a"], [None], [{}], [[]])),
        {"messages": [{"role": "user"}]},
        {"messages": [{"content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        *(messages("a", "b", role=role) for role in ("robot", "", None, 5, [], ["assistant"])),
        *(messages(value, "b") for value in (5, {}, [5], ["a", 5], [{}], [[]], True)),
        *(messages("a", value) for value in (5, [5], [{}], {"a": 1}, True)),
        *(messages("a", "b") | {"messages": messages("a", "b")["messages"] * 2 + [x]} for x in "a"),
    ),
    "content": (
        *(with_part(type=kind) for kind in ("robot", None, 5, [], "text", "image")),
        *(with_part(type="image", image=value) for value in (5, True, [], {}, "", "gone.png")),
        *(with_part(type="image_url", image_url=value) for value in (5, {}, "", [], {"url": 5})),
        with_part(type="image_url", image_url={"url": "https://example.com/a.png"}),
        with_part(type="image", image="data:image/png;base64,!!!"),
        with_part(type="image", image="data:image/png;base64,aGVsbG8="),
        with_part(type="image", image="data:text/plain,hello"),
        with_part(type="image", image="n" * 5000),
        with_part(type="image", image="bad.png"),
        with_part(type="image", image="folder"),
        with_part(type="image", image="a\0b.png"),
        with_part(type="text", text=5),
        with_part(type="video", video="a.mp4"),
        with_part(type="audio", audio="a.wav"),
    ),
    "images": (
        messages("<image>a", "b") | {"images": []},
        *(messages("<image>a", "b") | {"images": value} for value in (5, {}, [5], ["gone.png"])),
        messages("a<image><image>", "b") | {"images": ["fine.png"]},
        messages("<image>a", "b") | {"images": ["fine.png", "fine.png"]},
        messages("<image>a", "b") | {"images": ["fine.png"], "image": "fine.png"},
    ),
    "tool": (
        *(messages("a", "b") | {"tools": value} for value in (5, "x", [5], [{}], ["f"])),
        *(call(function=value) for value in (None, 5, {}, "f", {"name": 5}, [])),
        call(function={"name": "f", "arguments": "{"}),
        call(function={"name": "f", "arguments": 5}),
        {"messages": [*messages("a", "b")["messages"], {"role": "tool", "content": "c"}]},
    ),
    "weight": tuple(
        {"messages": [messages("a")["messages"][0], {"role": "assistant", "content": "b", **more}]}
        for more in ({"weight": "x"}, {"weight": 0.5}, {"weight": []})
    ),
    "completion": (
        {"prompt": "a"},
        {"completion": "a"},
        {"prompt": 5, "completion": "a"},
        {"prompt": "a", "completion": 5},
        {"prompt": "a", "completion": []},
        {"prompt": "a", "completion": ""},
    ),
    "text": (messages("a\ud800", "b"), messages("a", "b\udfff")),
}


def rows_of(*kinds):
    return ((kind, row) for kind in kinds for row in ROWS[kind])


@pytest.fixture(scope="module")
def processor(small):
    return Processor.from_pretrained(small)


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "folder").mkdir()
    return tmp_path


def supervised(file, processor):
    dataset = make_dataset(file, processor, batch_size=1, max_length=600, num_epochs=1)
    dataset.check()
    return list(dataset)


def prompts(file, processor):
    rows = PromptRows(file, processor)
    return [rows[index] for index in range(len(rows))]


def preferences(file, processor):
    lengths = {"max_prompt_length": 600, "max_response_length": 600}
    return list(PreferenceBatches(file, processor, batch_size=1, **lengths))


@pytest.mark.parametrize(("kind", "row"), cases(rows_of(*ROWS)))
def test_a_supervised_row(folder, processor, kind, row):
    lines = (json.dumps(messages("a", "b")), json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    run = lambda: supervised(folder / "rows.jsonl", processor)  # noqa: E731
    assert_named(folder, run, "row 1 of rows.jsonl")


PROMPTS = (
    *(5, [], {}, {"prompt": 5}, {"prompt": []}, {"prompt": None}, {"prompt": [5]}),
    *({"prompt": [{"role": "robot", "content": "a"}]}, {"prompt": [{"role": "user"}]}),
    *({"messages": []}, {"messages": [{"role": "assistant", "content": "a"}]}),
    {"prompt": "a <image>", "images": []},
    {"prompt": "a", "images": "gone.png"},
    {"prompt": "a\ud800"},
)


@pytest.mark.parametrize(("row",), cases((row,) for row in PROMPTS))
def test_a_prompt(folder, processor, row):
    lines = (json.dumps({"prompt": "a"}), json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    run = lambda: prompts(folder / "rows.jsonl", processor)  # noqa: E731
    assert_named(folder, run, "row 1 of rows.jsonl")


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
PAIRS = (
    *(5, [], {}, {"prompt": "a"}, PAIR | {"chosen": 5}, PAIR | {"rejected": None}),
    *(PAIR | {"chosen": []}, PAIR | {"chosen": [5]}, PAIR | {"rejected": {}}, PAIR | {"prompt": 5}),
    *({"prompt": "a", "chosen": "b"}, {"prompt": "a", "rejected": "b"}, PAIR | {"chosen": [{}]}),
    PAIR | {"chosen": [{"role": "user", "content": "b"}]},
    PAIR | {"images": ["gone.png"]},
    PAIR | {"chosen": "b\ud800"},
)


@pytest.mark.parametrize(("row",), cases((row,) for row in PAIRS))
def test_a_preference(folder, processor, row):
    lines = (json.dumps(PAIR), json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    run = lambda: preferences(folder / "rows.jsonl", processor)  # noqa: E731
    assert_named(folder, run, "row 1 of rows.jsonl")


FINE = json.dumps(messages("a", "b")).encode()
FILES = (
    *(("rows.jsonl", content) for content in (b"", b"\n \n", b"{", b"nothing", FINE[:-3])),
    *(("rows.jsonl", content) for content in (b"\xff\xfe{}", b"\0" * 50, b"[" * 5000)),
    *(("rows.jsonl", FINE + b"\n" + content) for content in (b"{", b"\xff", FINE + FINE)),
    *(("rows.json", content) for content in (b"", b"{}", b"[]", b"5", b"[" * 5000, b"\xff", FINE)),
    *(("rows.json", content) for content in (b"[" + FINE, b"[" + FINE + b",]")),
    *(("rows.parquet", content) for content in (b"", b"PAR1", b"PAR1" + bytes(50) + b"PAR1", FINE)),
    *((name, FINE) for name in ("rows.csv", "rows", "rows.txt", "rows.jsonl.gz")),
)


@pytest.mark.parametrize(("name", "content"), cases(FILES))
@pytest.mark.parametrize("road", [supervised, prompts, preferences])
def test_a_file_of_rows(folder, processor, road, name, content):
    (folder / name).write_bytes(content)
    assert_named(folder, lambda: road(folder / name, processor), name)


@pytest.mark.parametrize("name", ["gone.jsonl", "folder"])
def test_a_file_of_rows_that_is_none(folder, processor, name):
    assert_named(folder, lambda: supervised(folder / name, processor), name)


# ---- Settings

SETTINGS = {
    "model": ([], {}, None),
    "max_steps": (0, -1, 2.5, "many", [], math.nan),
    "num_train_epochs": (0, -1, "x"),
    "learning_rate": (-1, math.nan, math.inf, "fast", [], None),
    "warmup_steps": (-5, 2.5, "x"),
    "weight_decay": (-1, math.nan),
    "adam_beta1": (1, -0.1, math.nan, "x"),
    "adam_beta2": (1.5, math.nan),
    "adam_epsilon": (0, -1, math.nan),
    "max_grad_norm": (-1, math.nan, "x"),
    "lr_scheduler_type": ("wavy", 5, []),
    "dtype": ("int8", 5),
    "remat": ("some", 5, None),
    "attention_implementation": ("sdpa", None),
    "report_to": ("mail", None),
    "seed": (-1, 2.5, "x", None),
    "scan_layers": ("perhaps", {}, []),
    "save_total_limit": (0, -1, "x"),
    "logging_steps": (0, "x"),
    "mesh": ({"fsdp": 0}, {"fsdp": "x"}, {"rows": 1}, 5, []),
    "lora": ({"rank": 0}, {"rank": "x"}, {"alpha": math.nan}, {"alpha": 0}, {"r": 4}, 5, "x"),
    "batch_size": (0, -1, "x", None),
    "data": ({"max_length": 0}, {"max_length": "x"}, {"path": []}, {"shuffle": "x"}, 5, {"x": 1}),
    "a_setting_of_tomorrow": (1, None, {}),
}
SUPERVISED = {
    "gradient_accumulation_steps": (0, "x"),
    "data": ({"thoughts": "all"}, {"check": "some"}, {"check": -1}, {"image_buckets": [-1]}),
}
REWARDED = {
    "num_generations": (1, "x"),
    "beta": (-1, math.nan, "x"),
    "kl_estimator": ("k4", None),
    "epsilon": (0, math.nan),
    "temperature": (0, -1, math.nan),
    "top_p": (0, 1.5, math.nan),
    "top_k": (0, "x"),
    "loss_type": ("ppo", None),
    "reward_functions": ([], ["nothing_like_it"], 5, None, ["no.such.module:f"]),
    "reward_weights": ([math.nan], [1.0, 2.0], ["x"], []),
    "max_completion_length": (0, "x"),
}
YAML = (
    "",
    "[]",
    "5",
    "- a\n- b",
    "a: b: c",
    "{",
    "model: [",
    "\tx: 1",
    "model: !!python/object:x {}",
)


def read_settings(folder, load, changes):
    whole = {"model": "m", "output_dir": "out", "data": {"path": "rows.jsonl"}}
    if load is load_grpo_config:
        whole["reward_functions"] = ["numeric_answer"]
    section = changes.get("data")
    whole |= changes | ({"data": whole["data"] | section} if isinstance(section, dict) else {})
    (folder / "run.yaml").write_text(json.dumps(whole).replace("NaN", ".nan"))
    return lambda: load(folder / "run.yaml")


@pytest.mark.parametrize(
    ("load", "field", "value"),
    cases(
        ((load_run_config, *case) for case in field_cases(SETTINGS | SUPERVISED)),
        ((load_grpo_config, *case) for case in field_cases(REWARDED)),
    ),
)
def test_a_setting(tmp_path, load, field, value):
    run = read_settings(tmp_path, load, {field: value})
    assert_named(tmp_path, run, "run.yaml", field)


@pytest.mark.parametrize(("content",), cases((x,) for x in YAML))
@pytest.mark.parametrize("load", [load_run_config, load_grpo_config])
def test_settings_that_are_none(tmp_path, load, content):
    (tmp_path / "run.yaml").write_text(content)
    assert_named(tmp_path, lambda: load(tmp_path / "run.yaml"), "run.yaml")


@pytest.mark.parametrize("override", ["batch_size", "batch_size=", "a.b.c=1", "lora.rank=x"])
def test_an_override(tmp_path, override):
    read_settings(tmp_path, load_run_config, {})
    run = lambda: load_run_config(tmp_path / "run.yaml", [override])  # noqa: E731
    assert_named(tmp_path, run, override[:1])


# ---- Through the command line


BROKEN = {
    "rows": ("rows.jsonl", b'{"messages": 5}', "row 0 of rows.jsonl"),
    "settings": ("run.yaml", b"learning_rate: fast", "run.yaml: learning_rate"),
    "config": ("tiny/config.json", b"[]", "config.json: expected a JSON object"),
    "tokenizer": ("tiny/tokenizer.json", b"{", "tokenizer.json: not valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_command_says_it_in_one_line_and_keeps_earlier_output(tmp_path, small, capsys, name):
    shutil.copytree(small, tmp_path / "tiny")
    output = tmp_path / "out"
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints" / "notes.txt").write_text("mine")
    (tmp_path / "rows.jsonl").write_bytes(FINE)
    given = {"model": f"{tmp_path}/tiny", "output_dir": str(output)}
    given |= {"data": {"path": f"{tmp_path}/rows.jsonl"}, "report_to": "none"}
    (tmp_path / "run.yaml").write_text(json.dumps(given))
    file, content, message = BROKEN[name]
    (tmp_path / file).write_bytes(content)
    before = contents(tmp_path)
    assert main(["sft", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("tunix-gemma4 sft: ")
    assert "Traceback" not in said
    assert before.items() <= contents(tmp_path).items()
