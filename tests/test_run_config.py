# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: defaults, overrides and what a mistake is answered with."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from tunix_gemma4 import LoraConfig
from tunix_gemma4.recipes.common import model_config
from tunix_gemma4.settings.load_config import sections, to_yaml
from tunix_gemma4.settings.sft import RunConfig, load_run_config
from tunix_gemma4.testing.tiny import tiny_hf_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*/*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


MINIMAL = "model: m\noutput_dir: out\ndata: {path: train.jsonl}\n"


def test_overrides_take_precedence_over_the_file_and_the_file_over_defaults(write):
    path = write(MINIMAL + "learning_rate: 1e-3\nbatch_size: 4\n")
    config = load_run_config(path, ["batch_size=8", "data.max_length=1024", "lora.rank=8"])
    assert (config.learning_rate, config.batch_size) == (1e-3, 8)
    assert (config.data.max_length, config.data.max_soft_tokens) == (1024, None)
    assert (config.lora.rank, config.lora.alpha) == (8, 32.0)


def test_targets_are_a_name_or_an_expression_or_a_list(write):
    path = write(MINIMAL + "lora: {targets: [q_proj, v_proj], use_rslora: true}\n")
    config = load_run_config(path, [])
    assert config.lora == LoraConfig(targets=["q_proj", "v_proj"], use_rslora=True)
    assert load_run_config(write(to_yaml(config))) == config
    for given, expected in (
        ("[k_proj]", ("k_proj",)),
        ("q_proj|v_proj", "q_proj|v_proj"),
        (".*q_einsum", ".*q_einsum"),
        ("all", "all"),
    ):
        assert load_run_config(path, [f"lora.targets={given}"]).lora.targets == expected


def test_null_switches_lora_off(write):
    assert load_run_config(write(MINIMAL + "lora: {rank: 4}\n"), ["lora=null"]).lora is None


def test_settings_survive_being_written_and_read(write):
    texts = "['1e5', '12e03', '.5e3', 'yes', '1_000', '~', '.inf']"
    given = ["lora.quantize=nf4", "max_grad_norm=null"]
    given += [f"data.chat_template_kwargs={{a: {texts}, '1e5': 1.0e-5}}"]
    config = load_run_config(write(MINIMAL), given)
    assert load_run_config(write(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rat", "learning_rate"),
        ("lora.rnk", "lora.rank"),
        ("lora.r", "lora.rank"),
        ("lora.lora_alpha", "lora.alpha"),
        ("lora.target_modules", "lora.targets"),
        ("lora.module_path", "lora.targets"),
        ("data.max_len", "data.max_length"),
        ("max_length", "data.max_length"),
        ("per_device_train_batch_size", "batch_size"),
        ("lora_alpha", "lora.alpha"),
        ("rank", "lora.rank"),
        ("mesh.tensor", "mesh.tp"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(write, key, nearest):
    with pytest.raises(ValueError, match=rf"unknown key '{key}'; did you mean '{nearest}'\?"):
        load_run_config(write(MINIMAL), [f"{key}=1"])


def test_unknown_key_of_the_file_names_the_file(write):
    path = write(MINIMAL + "bach_size: 2\n")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*did you mean 'batch_size'"):
        load_run_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=many", 'batch_size: expected a whole number, found "many"'),
        ("lora.rank=1.5", r"lora\.rank: expected a whole number, found 1\.5"),
        ("learning_rate=[1]", r"learning_rate"),
        *(
            (
                f"lora={value}",
                rf"lora: .* found {found}; .* lora\.rank=\.\.\., .* lora=null for none",
            )
            for value, found in (
                ("8", "8"),
                ("false", "False"),
                ("none", "'none'"),
                ("all", "'all'"),
            )
        ),
        ("mesh=4", r"mesh: .* found 4; as KEY=VALUE: mesh\.fsdp=\.\.\., mesh\.tp=\.\.\.$"),
        ("lora.dropout=0.1", r"unknown key 'lora\.dropout'; adapters have no dropout"),
        ("lora.lora_dropout=0.1", r"unknown key 'lora\.lora_dropout'; adapters have no dropout"),
        ("lora.tile_size=30", r"lora\.tile_size: found 30 without quantize"),
        ("data.image_buckets=[]", r"the command line: data\.image_buckets: expected at least one"),
        ("batch_size=0", r"batch_size: expected at least 1, found 0"),
        ("mesh.tp=0", r"mesh\.tp: expected at least 1, found 0"),
        ("remat=all", r"the command line: remat: expected one of none"),
        ("attention_implementation=sdpa", r"attention_implementation: expected one of auto, xla"),
        ("dtype=float16", r"dtype: expected one of null, bfloat16, float32, found 'float16'"),
        ("lr_scheduler_type=step", r"lr_scheduler_type: expected one of constant, linear, cosine"),
        ("num_train_epochs=null", r"max_steps, num_train_epochs: both are null"),
        ("merge=true", r"merge: true needs lora"),
        ("batch_size", r"'batch_size': expected key=value"),
        ("lora..rank=3", r"'lora\.\.rank=3': expected key=value"),
        ("lora.rank=[1", r"'lora\.rank=\[1': its value is not readable as YAML"),
        ("data.foo=1", r"unknown key 'data\.foo'; known are data\.path, data\.eval_path"),
        ("model=''", r"model: expected a path, found ''"),
        ("data.path=''", r"data\.path: expected a path, found ''"),
        ("seed=99999999999999999999", r"seed: expected .*at most 4294967295, found 9999"),
        ("max_grad_norm=1e-50", r"at least 0, as float32 holds it without becoming 0, found 1e-50"),
        ("adam_beta1=0.999999999", r"below 1, as float32 holds it, found 0\.9+, which is 1 there"),
        (
            "learning_rate=1e39",
            r"at least 0, as float32 holds it, found 1e\+39, which is inf there",
        ),
        ("learning_rate=.inf", r"learning_rate: expected a finite number, at least 0, found inf"),
        (
            "lora.quantize=none",
            r"lora\.quantize: expected None .* one of nf4, int8, found 'none'",
        ),
        ("lora.targets='('", r"lora\.targets='\(': not a regular expression"),
        ("lora.targets=all-linear", r"lora\.targets: write 'all', .* found 'all-linear'"),
    ],
)
def test_wrong_value_is_named(write, override, message):
    with pytest.raises(ValueError, match=message):
        load_run_config(write(MINIMAL), [override])


def test_the_models_config_gets_what_the_settings_say(write):
    settings = ["attention_implementation=triton", "remat=block", "dtype=float32", "text_only=true"]
    config = load_run_config(write(MINIMAL), settings)
    found = model_config(config, tiny_hf_config("e2b"))
    assert (found.attention_implementation, found.remat.name) == ("triton", "BLOCK")
    assert (found.dtype, found.text_only) == (jnp.float32, True)


def test_what_must_be_given_is_named(write):
    with pytest.raises(ValueError, match=r"data\.path, model must be given, .* data\.path=\.\.\."):
        load_run_config(write("output_dir: out\n"))


def test_recipe_of_another_command_is_named():
    with pytest.raises(ValueError, match="gsm8k is a recipe of `grpo`, and this is `sft`"):
        load_run_config(["e2b", "gsm8k"])
    with pytest.raises(ValueError, match="gsm8k is a recipe of `grpo`, and this is `sft`"):
        load_run_config(["lora-text", "e2b", "gsm8k"])


def test_recipes_are_read_from_left_to_right_and_overrides_last(write):
    own = write("model: mine\nlora: {rank: 4}\nwith:\n  sft e4b: {seed: 7}\n  e2b: {seed: 8}\n")
    given = ["data.path=t.jsonl", "lora.alpha=8"]
    config = load_run_config(["lora-image", "e4b", own, "1gpu"], given)
    assert (config.model, config.data.max_length, config.seed) == ("mine", 2048, 7)
    assert vars(config.lora) | {"rank": 4, "alpha": 8.0} == vars(config.lora)
    assert (config.batch_size, config.gradient_accumulation_steps) == (1, 8)
    assert config.output_dir == "outputs/lora-image_e4b_run_1gpu"
    assert load_run_config([own, "lora-image", "e4b"], given).model == "google/gemma-4-E4B-it"


@pytest.mark.parametrize("given", ["e2b", "e4b v5e-8"])
def test_a_size_without_a_task_is_told_the_tasks(given):
    with pytest.raises(ValueError, match=f"{given}: expected a task .* full-image, lora-image"):
        load_run_config(given.split(), ["data.path=t.jsonl"])


def test_a_file_in_place_of_a_recipe_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / "lora-text.yaml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("WARNING", logger="absl"):
        assert load_run_config(["lora-text", "e2b"]).lora is None
    assert "lora-text.yaml is read, not the recipe" in caplog.text


@pytest.mark.parametrize("given", ["e2b lora-image", "1gpu lora-image", "lora-image v5e-8 e2b"])
def test_names_in_another_order_are_told_theirs(given):
    in_order = " ".join(sorted(given.split(), key=("lora-image", "e2b", "1gpu", "v5e-8").index))
    with pytest.raises(ValueError, match=f"{given}: expected a task, .* order: {in_order}$"):
        load_run_config(given.split(), ["data.path=t.jsonl"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 2", r"run\.yaml: unknown key 'bach_size'; did you mean 'batch_size'"),
        ("with: {e2b: {bach_size: 2}}", r"run\.yaml: with e2b: unknown key 'bach_size'"),
        ("with: {e2c: {seed: 2}}", r"run\.yaml: with e2c: there is no recipe 'e2c'; near is e2b"),
        ("with: {E2B: {seed: 2}}", r"run\.yaml: with E2B: there is no recipe 'E2B'; near is e2b$"),
        ("with: [e2b]", r"run\.yaml: with: expected keys and values, found \['e2b'\]"),
        ("with: false", r"run\.yaml: with: expected keys and values, found False"),
        ("with: {'': {seed: 2}}", r"run\.yaml: with: expected names of recipes, found ''"),
        ("with: {31b: [seed]}", r"with 31b: expected keys and values, or a text .* \['seed'\]"),
        ("with: {sft:}", r"with sft: expected keys and values, or a text .* found None"),
        (
            "with: {[e2b]: {seed: 2}}",
            r"run\.yaml: not readable as YAML: (.*\n)*found unhashable key",
        ),
        ("with: {sft e2b: not today}", r"run\.yaml: with sft e2b: not today"),
        ("with: {sft: {lora.rank: 8}}", r"with sft: .* sections nest in a file: `lora: {rank: "),
        ("lora.rank: 8", r"'lora\.rank'; sections nest in a file: `lora: {rank: \.\.\.}`"),
        ("batch_size: 3", r"run\.yaml: batch_size: expected a multiple of mesh\.fsdp=8, found 3"),
    ],
)
def test_a_mistake_is_named_with_the_one_of_several_files(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_run_config(["lora-image", "e2b", "v5e-8", write(text)], ["data.path=t.jsonl"])


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        (["lora-image", "e2b", "e4b"], r"e2b, e4b: expected one of sizes, found 2"),
        (["lora-image", "e2b", "sizes/e2b"], r"e2b, e2b: given twice"),
        (["lora-image", "E2B"], r"E2B: there is no such file .*; near is e2b\. "),
        (["Lora-Text", "e2b"], r"Lora-Text: there is no such file .*; near is lora-text\. "),
        (["lora-image", ""], r"expected a recipe or a YAML file, found \['lora-image', ''\]"),
        ([], r"expected a recipe or a YAML file, found \[\]"),
    ],
)
def test_words_that_are_no_recipes_are_answered(recipes, message):
    with pytest.raises(ValueError, match=message):
        load_run_config(recipes)


def test_missing_file_and_broken_yaml_are_named(write, tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml: there is no such file"):
        load_run_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="not readable as YAML"):
        load_run_config(write("a: [1"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_opens_with_what_it_is_and_is_one_by_path_too(path):
    opening = path.read_text().splitlines()[0]
    assert re.fullmatch(r"# [A-Z].{,84}\.", opening)
    kind, names = path.parent.name, {"sft": "lora-text", "sizes": "e2b"}
    if kind != "grpo":
        places = names if kind in names else (*names, kind)
        by_path, by_name = (
            [one if place == kind else names[place] for place in places]
            for one in (path, path.stem)
        )
        settings = ["data.path=t.jsonl"]
        assert load_run_config(by_path, settings) == load_run_config(by_name, settings)


def test_every_setting_is_documented():
    for section in (RunConfig, *sections(RunConfig).values()):
        documented = set()
        for kind in section.__mro__[:-1]:
            documented |= set(re.findall(r"\b\w+(?=[,:])", kind.__doc__))
        assert set(section.__dataclass_fields__) <= documented


@pytest.mark.parametrize(
    "text",
    [
        "Cost ${seed} dollars",
        "bash ${",
        r"\${x}",
        "1e3",
        "012",
        "yes",
        "2024",
        "a: b",
        "a #b",
        "*.x",
    ],
)
def test_a_text_is_what_stands_there(text, tmp_path):
    """No interpolation, and no number or switch that YAML 1.1 would have made of it."""
    path = tmp_path / "run.yaml"
    shown = json.dumps(text) if text in ("a: b", "a #b", "*.x") else text
    path.write_text(f"model: {shown}\noutput_dir: out\ndata: {{path: t.jsonl}}\n")
    config = load_run_config(path)
    assert config.model == text
    assert load_run_config(path, [f"output_dir={text}"]).output_dir == text
    path.write_text(to_yaml(config))
    assert load_run_config(path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=???", "output_dir: '???' stands for a value that is missing"),
        ("compilation_cache_dir=false", "compilation_cache_dir: expected a text, found false"),
        ("data.chat_template_kwargs=[a]", "chat_template_kwargs: expected keys and values"),
        ("keep_steps=5", "keep_steps: expected a list, found 5"),
        ("max_steps=1:30", 'max_steps: expected a whole number or null, found "1:30"'),
        ("mesh=null", "line: mesh: expected keys and values, found null"),
        ("lora.rank=null", "lora.rank: expected a whole number, found null"),
        ("seed=[1,2]", "seed: expected a whole number, found [1, 2]"),
        ("data.image_buckets=[a]", 'data.image_buckets: expected a list, found ["a"]'),
        ("optimizer=adamw", "unknown key 'optimizer'; known are"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_key(override, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\noutput_dir: out\ndata: {path: t.jsonl}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_run_config(path, [override])


def test_numbers_and_switches_are_read_as_in_yaml_1_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\noutput_dir: out\ndata: {path: t.jsonl}\nmax_steps: 010\n")
    config = load_run_config(path, ["learning_rate=1e-5", "text_only=yes", "seed=1_000"])
    assert (config.max_steps, config.learning_rate) == (10, 1e-5)
    assert (config.text_only, config.seed) == (True, 1000)
