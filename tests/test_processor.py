# SPDX-License-Identifier: Apache-2.0
"""Conversations to batches: exact tokens, exact masks, whatever the template and the text."""

import json
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from shown_tokens import prefix, runs

from tunix_gemma4.data.conversation import read_conversation
from tunix_gemma4.data.processor import Processor, image_slots
from tunix_gemma4.testing.tokenizer import SPECIAL_TOKENS

EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
SYSTEM = {"role": "system", "content": " Be brief. "}
QUESTION = {"role": "user", "content": "What digit is this?"}
ANSWER = {"role": "assistant", "content": " 7\n"}


def picture(height=30, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def user(*parts):
    return {"role": "user", "content": list(parts)}


def image(height=30, width=50, seed=0):
    return {"type": "image", "image": picture(height, width, seed)}


def text(content):
    return {"type": "text", "text": content}


@pytest.fixture(scope="module", params=["e2b", "31b"])
def processor(request, tiny_checkpoint):
    """One of each generation of templates: without and with the empty thought."""
    return Processor.from_pretrained(tiny_checkpoint(request.param), 70)


@pytest.fixture(scope="module")
def small(tiny_dir):
    return Processor.from_pretrained(tiny_dir, 70)


@pytest.fixture
def with_template(tiny_checkpoint, tmp_path):
    """A processor whose template is that of `preset` with one text replaced by another."""

    def build(old, new, *, preset="e2b"):
        directory = tmp_path / "directory"
        shutil.copytree(tiny_checkpoint(preset), directory)
        path = directory / "chat_template.jinja"
        before = path.read_text("utf-8")
        assert old in before
        path.write_text(before.replace(old, new), "utf-8")
        return Processor.from_pretrained(directory, 70)

    return build


def test_prefix_is_the_empty_thought_of_large_models_only(tiny_checkpoint):
    for preset in ("e2b", "e4b", "12b", "26b_a4b", "31b"):
        found = prefix(Processor.from_pretrained(tiny_checkpoint(preset), 70))
        assert found == (EMPTY_THOUGHT if preset in ("12b", "26b_a4b", "31b") else ""), preset


def test_worked_example_has_these_tokens(small):
    example = small.encode([SYSTEM, user(image(), text("What is this?")), ANSWER])
    names = small.tokenizer.convert_ids_to_tokens(example.tokens.tolist())
    soft = names.count("<|image|>")
    spelled = " ".join(names).replace(" <|image|>" * soft, " IMAGE")
    assert spelled == (
        "<bos> <|turn> system Ċ B e Ġ b r i e f . <turn|> Ċ <|turn> user Ċ <|image> IMAGE <image|> "
        "What Ġis Ġthis ? <turn|> Ċ <|turn> model Ċ 7 <turn|> Ċ"
    )


def test_only_answers_and_their_ends_are_supervised(processor):
    thought = "<|channel>thought\nIt has whiskers.\n<channel|>A cat."
    example = processor.encode(
        [
            SYSTEM,
            QUESTION,
            ANSWER,
            user(image(), text("And this?")),
            {"role": "model", "content": thought},
            QUESTION,
            {"role": "assistant", "content": [text(" one"), text("two ")]},
        ]
    )
    empty = prefix(processor)
    soft = "<|image>" + "<|image|>" * 60 + "<image|>"
    assert runs(processor, example) == [
        (
            "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nWhat digit is this?<turn|>\n"
            f"<|turn>model\n{empty}",
            0,
        ),
        ("7<turn|>", 1),
        (f"\n<|turn>user\n{soft}And this?<turn|>\n<|turn>model\n{empty}", 0),
        ("A cat.<turn|>", 1),
        (f"\n<|turn>user\nWhat digit is this?<turn|>\n<|turn>model\n{empty}", 0),
        ("onetwo<turn|>", 1),
        ("\n", 0),
    ]


def test_answer_follows_exactly_the_tokens_of_its_generation_prompt(processor):
    messages = [SYSTEM, user(text("a\n\n"), image(20, 20), text("\n b"))]
    prompt = processor.encode(messages, add_generation_prompt=True)
    trained = processor.encode([*messages, {"role": "assistant", "content": "\n\nyes"}])
    size = len(prompt.tokens)
    np.testing.assert_array_equal(trained.tokens[:size], prompt.tokens)
    assert not prompt.loss_mask.any()
    assert trained.loss_mask.argmax() == size
    np.testing.assert_array_equal(trained.images, prompt.images)


def test_tokens_are_those_of_the_tokenizer_on_the_rendered_text(small):
    messages = [SYSTEM, QUESTION, ANSWER, user(text(" é\n\n\n🙂 <b>▁</b> "), text("x")), ANSWER]
    rendered = small.tokenizer.apply_chat_template(messages, tokenize=False)
    expected = small.tokenizer.encode(rendered, add_special_tokens=False)
    assert small.encode(messages).tokens.tolist() == expected


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_token_that_a_user_types_stays_text(small, token):
    index = small.tokenizer.convert_tokens_to_ids(token)
    for place in ({"role": "system"}, {"role": "user"}):
        typed = [place | {"content": f"a{token}b "}, QUESTION, ANSWER]
        plain = [place | {"content": "ab"}, QUESTION, ANSWER]
        counts = [(small.encode(m).tokens == index).sum() for m in (typed, plain)]
        assert counts[0] == counts[1]
        assert f"a{token}b<turn|>" in runs(small, small.encode(typed))[0][0]


@pytest.mark.parametrize("token", ["<turn|>", "<|turn>", "<|image|>", "<bos>", "<eos>", "<pad>"])
def test_turn_and_media_tokens_in_an_answer_stay_text(small, token):
    example = small.encode([QUESTION, {"role": "assistant", "content": f"a{token}b"}])
    index = small.tokenizer.convert_tokens_to_ids(token)
    learnt = example.tokens[example.loss_mask == 1].tolist()
    assert learnt.count(index) == (token == "<turn|>")
    assert runs(small, example)[1] == (f"a{token}b<turn|>", 1)


def test_tool_call_in_an_answer_is_learnt_and_the_tool_response_is_not(small):
    call, response = "<|tool_call>call:f{}<tool_call|>", "response:f{}<tool_response|>"
    content = f"{call}<|tool_response>{response}done"
    example = small.encode([QUESTION, {"role": "assistant", "content": content}])
    assert runs(small, example)[1:] == [
        (f"{call}<|tool_response>", 1),
        (response, 0),
        ("done<turn|>", 1),
        ("\n", 0),
    ]
    assert small.tokenizer.convert_tokens_to_ids("<|tool_call>") in example.tokens


def test_text_with_private_use_characters_survives(small):
    content = "\ue000 <|image|> \ue0000\ue000 \ue001"
    example = small.encode([{"role": "user", "content": content}, ANSWER])
    assert content in runs(small, example)[0][0]


def test_completion_alone_is_supervised(processor):
    example = processor.encode({"prompt": [QUESTION, ANSWER, QUESTION], "completion": "eight"})
    assert [run for run, mask in runs(processor, example) if mask] == ["eight<turn|>"]


def test_placeholders_are_as_many_as_the_soft_tokens_of_each_image(small):
    sizes = [(64, 64), (10, 90), (90, 10), (3, 5)]
    example = small.encode([user(*(image(*size) for size in sizes), text("Compare.")), ANSWER])
    counts = [
        len(list(run))
        for is_soft, run in groupby(example.tokens == small.image_token_id)
        if is_soft
    ]
    valid = (example.images[..., -1] >= 0).sum(-1)
    np.testing.assert_array_equal(valid, 9 * np.array(counts))
    assert counts[0] == 64
    assert len(set(counts)) > 1


def test_batch_pads_on_the_right_for_training(small):
    rows = [[QUESTION, ANSWER], [user(image(), text("And this?")), ANSWER]]
    batch = small(rows, length=100)
    for row, conversation in enumerate(rows):
        example = small.encode(conversation)
        size = len(example.tokens)
        np.testing.assert_array_equal(batch.tokens[row, :size], example.tokens)
        np.testing.assert_array_equal(batch.loss_mask[row, :size], example.loss_mask)
        assert not batch.loss_mask[row, size:].any()
        assert (batch.tokens[row, size:] == small.pad_token_id).all()
        np.testing.assert_array_equal(batch.padding_mask[row], np.arange(100) < size)
    assert batch.tokens.dtype == batch.loss_mask.dtype == batch.padding_mask.dtype == np.int32
    assert batch.images.dtype == np.float32
    assert batch.images.shape == (2, 1, 630, 50)
    assert (batch.images[0, ..., -2:] == -1).all()
    assert batch.loss_denominator is None
    assert batch.token_type_ids is None


def test_batch_pads_on_the_left_for_generation(small):
    rows = [[QUESTION], [user(image(), text("And this?"))]]
    batch = small(rows, add_generation_prompt=True)
    assert (
        batch.tokens[:, -1].tolist()
        == [small.encode(rows[0], add_generation_prompt=True).tokens[-1]] * 2
    )
    short = len(small.encode(rows[0], add_generation_prompt=True).tokens)
    assert batch.padding_mask[0].sum() == short
    assert not batch.padding_mask[0, :-short].any()
    assert not batch.loss_mask.any()


def test_images_per_row_come_from_a_short_list(small):
    assert [image_slots(count) for count in range(10)] == [0, 1, 2, 4, 4, 8, 8, 8, 8, 16]
    batch = small([[user(image(), image(), image(), text("Compare.")), ANSWER]])
    assert batch.images.shape[1] == 4
    assert small([[QUESTION, ANSWER]]).images is None
    assert small([[QUESTION, ANSWER]], images=2).images.shape == (1, 2, 630, 50)


def test_token_types_mark_the_placeholders_when_asked_for(small):
    batch = small([[user(image(), text("What?")), ANSWER], [QUESTION, ANSWER]], token_type_ids=True)
    np.testing.assert_array_equal(batch.token_type_ids, batch.tokens == small.image_token_id)
    assert batch.token_type_ids.dtype == np.int32
    assert batch.token_type_ids[0].sum() == 60


def test_rows_with_thinking_have_the_switch_in_their_system_turn(tiny_checkpoint):
    processor = Processor.from_pretrained(tiny_checkpoint("31b"), 70, thinking=True)
    example = processor.encode([QUESTION], add_generation_prompt=True)
    assert processor.decode(example.tokens, skip_special_tokens=False) == (
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nWhat digit is this?<turn|>\n"
        "<|turn>model\n"
    )


def test_explain_shows_what_is_learnt(small):
    batch = small([[user(image(), text("What digit is this?")), ANSWER]], length=100)
    assert small.explain(batch) == "\n".join(
        [
            "row 0: 79 tokens, 2 of them supervised, 1 image",
            "  context     '<bos><|turn>user\\n<|image>[60 x <|image|>]<image|>"
            "What digit is this?<turn|>\\n<|turn>model\\n'",
            "  SUPERVISED  '7<turn|>'",
            "  context     '\\n'",
            "  padding     21 tokens",
        ]
    )


def test_public_tokenizer_still_knows_special_tokens_after_use(small):
    small.encode([{"role": "user", "content": "<|image|>"}, ANSWER])
    assert small.tokenizer.encode("<|image|>", add_special_tokens=False) == [small.image_token_id]


def test_decode_leaves_special_tokens_out_unless_asked(small):
    ids = small.encode([QUESTION, ANSWER]).tokens[-3:]
    assert small.decode(ids) == "7\n"
    assert small.decode(ids, skip_special_tokens=False) == "7<turn|>\n"


# ---- Other templates than the tiny one.


def test_launch_template_puts_newlines_around_images(with_template):
    processor = with_template("'<|' + part.type + '|>'", "'\\n\\n<|' + part.type + '|>\\n\\n'")
    example = processor.encode([user(image(), text("What?")), ANSWER])
    soft = "<|image>" + "<|image|>" * 60 + "<image|>"
    assert runs(processor, example)[0][0].startswith(f"<bos><|turn>user\n\n\n{soft}\n\nWhat?")
    assert runs(processor, example)[1] == ("7<turn|>", 1)


def test_empty_thought_that_the_template_writes_itself_is_not_learnt(with_template):
    old = "'<|turn>' + role + '\\n' + render"
    new = f"'<|turn>' + role + '\\n' + ({EMPTY_THOUGHT!r} if role == 'model' else '') + render"
    processor = with_template(old, new, preset="31b")
    example = processor.encode([QUESTION, ANSWER])
    assert runs(processor, example) == [
        (f"<bos><|turn>user\nWhat digit is this?<turn|>\n<|turn>model\n{EMPTY_THOUGHT}", 0),
        ("7<turn|>", 1),
        ("\n", 0),
    ]


@pytest.mark.parametrize("preset", ["e2b", "31b"])
def test_reasoning_that_the_template_writes_is_learnt(with_template, preset):
    old = "'<|turn>' + role + '\\n' + render"
    thought = "('<|channel>thought\\n' + message.reasoning + '\\n<channel|>')"
    new = f"'<|turn>' + role + '\\n' + ({thought} if message.reasoning else '') + render"
    processor = with_template(old, new, preset=preset)
    example = processor.encode([QUESTION, ANSWER | {"reasoning": "Looks like it."}])
    assert runs(processor, example)[1] == (
        "<|channel>thought\nLooks like it.\n<channel|>7<turn|>",
        1,
    )


def test_merged_assistant_messages_are_learnt_together_but_not_in_part(with_template):
    old = "{{- '<|turn>' + role + '\\n' + render(message.content, role) + '<turn|>\\n' -}}"
    again = "loop.previtem is defined and loop.previtem.role == message.role"
    follows = "loop.nextitem is defined and loop.nextitem.role == message.role"
    new = (
        f"{{{{- ('' if {again} else '<|turn>' + role + '\\n') + render(message.content, role) + "
        f"('' if {follows} else '<turn|>\\n') -}}}}"
    )
    processor = with_template(old, new)
    example = processor.encode([QUESTION, ANSWER, ANSWER])
    assert runs(processor, example)[1:] == [("7\n7<turn|>", 1), ("\n", 0)]
    with pytest.raises(ValueError, match="message 2: it follows an assistant message, and one"):
        processor.encode({"prompt": [QUESTION, ANSWER], "completion": [ANSWER]})


def test_template_of_another_family_is_refused(with_template):
    with pytest.raises(ValueError, match="the chat template is not Gemma 4's: expected turns of"):
        with_template("{{- bos_token -}}", "{{- 'x' if add_generation_prompt -}}")


# ---- The stop list.


@pytest.mark.parametrize(
    ("generation", "eos", "expected"),
    [
        ({"eos_token_id": [1, 9, 14]}, [1, 9], (1, 9, 14)),
        ({"eos_token_id": 1}, [1, 9], (1, 9)),  # A base model's, without the end of a turn.
        ({}, [1, 5], (1, 5, 9)),
        (None, 1, (1, 9)),
        (None, None, (1, 9)),
    ],
    ids=["list", "one", "no_entry", "no_file", "no_file_nor_entry"],
)
def test_stop_list_is_read_from_the_directory(tiny_dir, tmp_path, generation, eos, expected):
    directory = tmp_path / "directory"
    shutil.copytree(tiny_dir, directory)
    (directory / "generation_config.json").unlink()
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((directory / "config.json").read_text()) | {"eos_token_id": eos}
    (directory / "config.json").write_text(json.dumps(config))
    assert Processor.from_pretrained(directory, 70).stop_ids == expected


# ---- Errors.

REFUSED = {
    "image": ([user({"type": "image", "image": b"no"}), ANSWER], "image 0: the given bytes cannot"),
    "second_image": ([user(image(), {"type": "image", "image": "no"}), ANSWER], "image 1: there"),
    "long_image": ([user(image(1, 71)), ANSWER], "image 0: it is 71 pixels wide and 1 high"),
    "count": ({"messages": [user({"type": "image"}), ANSWER], "images": [1, 2]}, "2 images are"),
    "role": ([{"role": "boss", "content": "a"}, ANSWER], "message 0: there is no role 'boss'"),
    "empty": ([QUESTION, ANSWER | {"content": ""}], "message 1: the assistant turn is empty"),
    "thought_only": (
        [QUESTION, ANSWER | {"content": "<|channel>thought\na<channel|>"}],
        "an assistant turn holds nothing besides its thoughts",
    ),
    "surrogate": ([QUESTION, ANSWER | {"content": "a\ud800"}], r".*'a\\ud800.*half of a surrogate"),
    "no_answer": ([QUESTION], "there is no assistant message to learn"),
    "template": ([QUESTION, SYSTEM, ANSWER], "the chat template refuses the conversation: .*turn"),
}


@pytest.mark.parametrize(("conversation", "message"), REFUSED.values(), ids=REFUSED)
def test_error_names_the_example(small, conversation, message):
    with pytest.raises(ValueError, match=f"^example 1: {message}"):
        small([[QUESTION, ANSWER], conversation])


def test_image_is_refused_where_the_model_has_no_vision(tiny_checkpoint, tiny_dir, tmp_path):
    conversation = [user(image(), text("What?")), ANSWER]
    unified = Processor.from_pretrained(tiny_checkpoint("12b"), 70)
    with pytest.raises(ValueError, match="example 0: 1 images were given, but .*gemma4_unified"):
        unified([conversation])
    directory = tmp_path / "directory"
    shutil.copytree(tiny_dir, directory)
    config = json.loads((directory / "config.json").read_text()) | {"vision_config": None}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the checkpoint has no vision_config"):
        Processor.from_pretrained(directory, 70)([conversation])


def test_token_without_a_row_in_the_embedding_is_refused_when_the_directory_is_read(
    tiny_dir, tmp_path
):
    directory = shutil.copytree(tiny_dir, tmp_path / "grown")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 384, "content": "<new>"})
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'<new>' with id 384: there are 384 rows"):
        Processor.from_pretrained(directory)


def test_directory_without_a_chat_template_points_to_the_it_one(tiny_dir, tmp_path):
    directory = tmp_path / "gemma-4-E2B"
    shutil.copytree(tiny_dir, directory)
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="gemma-4-E2B: it has no chat template.*ends in -it"):
        Processor.from_pretrained(directory)


def test_directory_without_a_tokenizer_is_refused(tiny_dir, tmp_path):
    shutil.copy(tiny_dir / "config.json", tmp_path)
    with pytest.raises(ValueError, match="there is no tokenizer.json; copy the tokenizer files"):
        Processor.from_pretrained(tmp_path)


def test_tokenizer_of_another_checkpoint_is_refused(tiny_dir, tmp_path):
    directory = tmp_path / "directory"
    shutil.copytree(tiny_dir, directory)
    config = json.loads((directory / "config.json").read_text()) | {"image_token_id": 258880}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="image_token_id: config.json says 258880, and the token"):
        Processor.from_pretrained(directory, 70)


def test_one_conversation_instead_of_a_list_is_refused(small):
    for one in ([QUESTION, ANSWER], {"messages": [QUESTION, ANSWER]}):
        with pytest.raises(ValueError, match="expected a list of conversations, found one"):
            small(one)


def test_row_longer_than_the_batch_is_refused_and_not_cut(small):
    with pytest.raises(
        ValueError, match="example 1: it has 17 tokens and 0 images, the batch hold"
    ):
        small([[{"role": "user", "content": "a"}, ANSWER], [QUESTION, ANSWER]], length=16)
    with pytest.raises(ValueError, match="example 0: .* and 2 images, the batch holds .* and 1;"):
        small([[user(image(), image()), ANSWER]], images=1)


@pytest.mark.parametrize("prompt", [False, True], ids=["row", "prompt"])
def test_conversation_that_was_read_already_gives_the_same_tokens(small, prompt):
    row = {"prompt": [user(image(), text("What?"))], "completion": "7"}
    read = read_conversation(row, prompt_only=prompt)
    found, expected = (small.encode(given, add_generation_prompt=prompt) for given in (read, row))
    for name in ("tokens", "loss_mask", "images"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_answer_to_an_answered_conversation_is_refused(small):
    with pytest.raises(ValueError, match="example 0: .*leave its last assistant message out"):
        small([[QUESTION, ANSWER]], add_generation_prompt=True)


def test_processor_works_without_torch(tiny_dir):
    program = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from tunix_gemma4 import Processor
image = {{"type": "image", "image": np.zeros((9, 9), np.uint8)}}
row = [{{"role": "user", "content": [image]}}, {{"role": "assistant", "content": "0"}}]
assert Processor.from_pretrained({str(tiny_dir)!r}, 70)([row]).images.any()
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert run.returncode == 0, run.stderr
