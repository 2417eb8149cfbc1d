# SPDX-License-Identifier: Apache-2.0
"""Thoughts, tools, prompts that are templated already: which tokens come, and which are learnt."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from shown_tokens import prefix, runs

from tunix_gemma4.data.conversation import (
    each_turn,
    read_conversation,
    read_preference_pair,
    read_prompt,
)
from tunix_gemma4.data.preferences import read_preference
from tunix_gemma4.data.processor import Processor

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
THOUGHT = "<|channel>thought\nT\n<channel|>"
EMPTY = "<|channel>thought\n<channel|>"
PROMPT = "<bos><|turn>user\nQ<turn|>\n<|turn>model\n"
CALL = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "lookup", "arguments": {"x": "a<turn|>", "n": 3}}}],
}
CALLED = '<|tool_call>call:lookup{n:3,x:<|"|>a<turn|><|"|>}<tool_call|><|tool_response>'
RESULT = {"role": "tool", "content": "R<turn|>"}
ANSWERED = 'response:lookup{value:<|"|>R<turn|><|"|>}<tool_response|>'
TOOLS = [{"name": "lookup", "description": "D", "parameters": {"type": "object"}}]
DECLARED = (
    '<|tool>declaration:lookup{description:<|"|>D<|"|>,parameters:{type:<|"|>OBJECT<|"|>}}<tool|>'
)


@pytest.fixture(scope="module", params=["e2b", "31b"])
def processor(request, tiny_checkpoint):
    """One of each generation of templates: without and with the empty thought."""
    return Processor.from_pretrained(tiny_checkpoint(request.param), 70)


@pytest.fixture(scope="module")
def small(tiny_dir):
    return Processor.from_pretrained(tiny_dir)


def learnt(processor, row):
    return [text for text, mask in runs(processor, processor.encode(row)) if mask]


@pytest.fixture
def with_template(tiny_dir, tmp_path):
    """A processor whose template has one text replaced by another."""

    def build(*changes, **settings):
        directory = tmp_path / "directory"
        shutil.copytree(tiny_dir, directory, dirs_exist_ok=True)
        path = directory / "chat_template.jinja"
        text = path.read_text("utf-8")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path.write_text(text, "utf-8")
        return Processor.from_pretrained(directory, **settings)

    return build


# ---- Thoughts.

THOUGHTS = {
    "reasoning_content": ANSWER | {"reasoning_content": "T"},
    "reasoning": ANSWER | {"reasoning": "\nT\n"},
    "thinking": ANSWER | {"thinking": "T"},
    "channel": ANSWER | {"content": f"{THOUGHT}A"},
    "part": ANSWER | {"content": [{"type": "thinking", "thinking": "T"}, "A"]},
    "mistral": ANSWER
    | {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "T"}]}, "A"]},
    "part of text": ANSWER | {"content": [{"type": "thinking", "text": "T"}, "A"]},
    "reasoning part": ANSWER | {"content": [{"type": "reasoning", "content": "T"}, "A"]},
    "both": ANSWER | {"content": f"{THOUGHT}A", "reasoning": "T"},
}


@pytest.mark.parametrize("message", THOUGHTS.values(), ids=THOUGHTS)
def test_last_turn_is_learnt_with_its_thought_and_earlier_ones_without(processor, message):
    empty = prefix(processor)
    example = processor.encode([USER, message, USER, message])
    assert runs(processor, example) == [
        (PROMPT + empty, 0),
        ("A<turn|>", 1),
        ("\n" + PROMPT.removeprefix("<bos>"), 0),
        (f"{THOUGHT}A<turn|>", 1),
        ("\n", 0),
    ]
    assert example.thoughts_left_out == 1
    pair = read_preference_pair({"prompt": "Q", "chosen": message, "rejected": "B"})
    assert learnt(processor, pair["chosen"]) == [f"{THOUGHT}A<turn|>"]


def test_thoughts_none_and_each_turn(tiny_dir):
    row = [USER, ANSWER | {"reasoning": "T"}, USER, ANSWER, USER, ANSWER | {"thinking": "T"}]
    none = Processor.from_pretrained(tiny_dir, thoughts="none")
    assert learnt(none, row) == ["A<turn|>"] * 3
    assert none.encode(row).thoughts_left_out == 2
    assert len(none.encode_all(row)) == 1
    each = Processor.from_pretrained(tiny_dir, thoughts="each_turn")
    row[3] = row[3] | {"weight": 0}
    one, other = each.encode_all(row)
    assert runs(each, one) == [(PROMPT, 0), (f"{THOUGHT}A<turn|>", 1), ("\n", 0)]
    assert [text for text, mask in runs(each, other) if mask] == [f"{THOUGHT}A<turn|>"]
    assert len(other.tokens) > 2 * len(one.tokens)
    with pytest.raises(ValueError, match="thoughts: expected one of .*'each_turn'.*, found 'all'"):
        Processor.from_pretrained(tiny_dir, thoughts="all")


def test_images_of_each_turn_are_those_before_it(tiny_dir):
    each = Processor.from_pretrained(tiny_dir, thoughts="each_turn")
    shown = USER | {"content": [{"type": "image", "image": np.zeros((9, 9), np.uint8)}, "Q"]}
    counts = [len(example.images) for example in each.encode_all([shown, ANSWER, shown, ANSWER])]
    assert counts == [1, 2]


def test_a_template_that_drops_part_of_an_answer_is_refused(small, with_template):
    said = "A<|channel>thought\nT\n<channel|>B"
    with pytest.raises(ValueError, match="turn 1 of the model: .* does not write 'A<|channel>"):
        small.encode([USER, ANSWER, USER, ANSWER | {"content": said}])
    short = with_template(
        ("render(message.content, role) + '<turn", "render(message.content, role)[:8] + '<turn")
    )
    assert learnt(short, [USER, ANSWER]) == ["A<turn|>"]
    with pytest.raises(ValueError, match="turn 0 of the model: .* does not write 'not learnt'"):
        short.encode([USER, ANSWER | {"content": "not learnt"}])


# ---- Tools.


def test_a_call_is_learnt_and_what_the_tool_answers_is_not(processor):
    row = {"tools": TOOLS, "messages": [USER, CALL, RESULT, ANSWER]}
    empty = prefix(processor)
    system = f"<bos><|turn>system\n{DECLARED}<turn|>\n"
    expected = [
        (system + PROMPT.removeprefix("<bos>") + empty, 0),
        (CALLED, 1),
        (ANSWERED, 0),
        ("A<turn|>", 1),
        ("\n", 0),
    ]
    assert runs(processor, processor.encode(row)) == expected
    thinking = {"tools": TOOLS, "messages": [USER, CALL | {"reasoning": "T"}, RESULT, ANSWER]}
    found = runs(processor, processor.encode(thinking))
    assert found[:2] == [(expected[0][0].removesuffix(empty), 0), (THOUGHT + CALLED, 1)]
    late = {"tools": TOOLS, "messages": [USER, CALL, RESULT, ANSWER | {"reasoning": "T"}]}
    assert learnt(processor, late) == [CALLED, f"{THOUGHT}A<turn|>"]
    assert learnt(processor, {"tools": TOOLS, "messages": [USER, CALL]}) == [CALLED]
    end = processor.encode({"messages": [USER, CALL]}).tokens[-1]
    assert end in processor.stop_ids


def test_the_model_does_not_learn_to_open_the_answer_of_a_second_tool(processor, small):
    """Of two answers only the token that ends the calls is the model's."""
    calls = [CALL["tool_calls"][0] | {"id": name} for name in "12"]
    results = [RESULT | {"tool_call_id": name} for name in "12"]
    row = [USER, {"role": "assistant", "tool_calls": calls}, *results, ANSWER]
    expected = [CALLED.removesuffix("<|tool_response>") + CALLED, "A<turn|>"]
    assert learnt(processor, row) == expected
    two_rounds = [*row, USER, CALL, RESULT, CALL, RESULT, ANSWER]
    assert learnt(small, two_rounds) == [*expected, CALLED, CALLED, "A<turn|>"]


def test_nulls_of_tables_are_absent_in_calls_at_every_depth(small):
    nested = {"a": None, "b": {"c": None, "d": [{"e": None, "f": 1}, None]}}
    for arguments, written in (
        (nested, "b:{d:[{f:1},null]}"),
        (json.dumps(nested), "a:null,b:{c:null,d:[{e:null,f:1},null]}"),
        ("", ""),
    ):
        called = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
        assert f"call:f{{{written}}}<tool_call|>" in learnt(small, [USER, called])[0]
        if arguments:
            said = {"role": "tool_call", "content": json.dumps(called["tool_calls"][0])}
            own = "a:null,b:{c:null,d:[{e:null,f:1},null]}"
            assert f"call:f{{{own}}}" in learnt(small, [USER, said])[0]


def test_a_prompt_goes_on_behind_what_the_tool_answered(small):
    row = {"tools": TOOLS, "messages": [USER, CALL | {"reasoning": "T"}, RESULT]}
    example = small.encode(read_prompt(row), add_generation_prompt=True)
    text = small.decode(example.tokens, skip_special_tokens=False)
    assert text.endswith(f"<|turn>model\n{THOUGHT}{CALLED}{ANSWERED}")
    assert DECLARED in text


def test_switches_of_one_turn_agree(small):
    row = [USER, CALL, RESULT, ANSWER | {"weight": 0}]
    for read in (small.encode, lambda row: each_turn(read_conversation(row))):
        with pytest.raises(
            ValueError, match="message 3: it goes on with the turn of a tool's call"
        ):
            read(row)


INSIDE = (
    ("{%- if message.role == 'tool' and state.open -%}", "{%- if false -%}"),
    (
        "{%- set answered = loop.nextitem is defined and loop.nextitem.role == 'tool' -%}",
        "{%- set state.open = false -%}{%- set answered = message.tool_responses -%}"
        "{%- for response in answered or [] -%}{{- result({'name': response.name, "
        "'content': response.response}) -}}{%- endfor -%}",
    ),
    ("        {{- render(message.content, 'model') -}}\n", ""),
    (
        "{{- ('' if answered else '<|tool_response>') if called else '<turn|>\\n' -}}",
        "{{- message.content + '<turn|>\\n' -}}",
    ),
)


def test_the_first_template_takes_results_in_the_message_of_the_call(with_template):
    processor = with_template(*INSIDE)
    example = processor.encode({"tools": TOOLS, "messages": [USER, CALL, RESULT, ANSWER]})
    assert runs(processor, example)[1:] == [(CALLED, 1), (ANSWERED, 0), ("A<turn|>", 1), ("\n", 0)]


def test_a_text_beside_a_call_keeps_its_place_or_is_refused(small, with_template):
    row = [USER, CALL | {"content": "See:"}, RESULT]
    assert learnt(small, row) == [f"See:{CALLED}"]
    old = "        {{- render(message.content, 'model') -}}\n"
    behind = with_template(
        (old, "        {{- '' if called else render(message.content, 'model') -}}\n"),
        ("{{- result(message) -}}", "{{- result(message) + messages[1].content + '<turn|>' -}}"),
    )
    with pytest.raises(ValueError, match="turn 0 .*writes 'See:', which stands beside a call, beh"):
        behind.encode(row)


@pytest.mark.parametrize(
    ("change", "row", "message"),
    [
        (("{{- '<|tool>declaration:' + function.name -}}", ""), {"tools": TOOLS}, "no definitions"),
        (("{{- result(message) -}}", ""), {}, "message 2: .* not write what the tool answered"),
        (("'<|tool_call>call:' + call.function.name", "'<|tool_call>call:'"), {}, "turn 0 of the"),
    ],
)
def test_a_template_without_tools_is_refused(with_template, change, row, message):
    processor = with_template(change)
    with pytest.raises(ValueError, match=message):
        processor.encode({"messages": [USER, CALL, RESULT, ANSWER], **row})


# ---- Template arguments.


def test_enable_thinking_of_a_row_is_that_of_the_processor(processor, tiny_checkpoint):
    example = processor.encode({"prompt": "Q", "completion": "A", "enable_thinking": True})
    assert runs(processor, example) == [
        ("<bos><|turn>system\n<|think|>\n<turn|>\n" + PROMPT.removeprefix("<bos>"), 0),
        ("A<turn|>", 1),
        ("\n", 0),
    ]
    with pytest.raises(ValueError, match="the chat template has no argument 'max_pixels'"):
        processor.encode(
            {"prompt": "Q", "completion": "A", "chat_template_kwargs": {"max_pixels": 9}}
        )


# ---- <bos>.


@pytest.mark.parametrize("text", ["", "{{- bos_token -}}{{- bos_token -}}"])
def test_bos_comes_once_whatever_the_template(small, with_template, text):
    processor = with_template(("{{- bos_token -}}", text))
    for row in ([USER, ANSWER], {"prompt": PROMPT, "completion": "A"}):
        expected = small.encode(row)
        found = processor.encode(row)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)
    prompt = processor.encode([USER], add_generation_prompt=True)
    assert prompt.tokens.tolist().count(processor.tokenizer.bos_token_id) == 1


# ---- Prompts that follow the template already.


@pytest.mark.parametrize("start", ["", "<bos>", "<bos><bos>"])
def test_a_templated_prompt_gives_the_tokens_of_its_messages(small, start):
    row = {"prompt": start + PROMPT.removeprefix("<bos>")}
    prompt = small.encode([USER], add_generation_prompt=True)
    found = small.encode(row, add_generation_prompt=True)
    np.testing.assert_array_equal(found.tokens, prompt.tokens)
    np.testing.assert_array_equal(
        small.encode(read_prompt(row), add_generation_prompt=True).tokens, prompt.tokens
    )
    for completion in ("A", "A<turn|>\n"):
        example = small.encode(row | {"completion": completion})
        assert runs(small, example) == [(PROMPT, 0), ("A<turn|>", 1)]
    pair = read_preference_pair(row | {"chosen": "B", "rejected": "W"})
    assert [learnt(small, side) for side in pair.values()] == [["B<turn|>"], ["W<turn|>"]]
    for text in ("<|turn>user\nQ<turn|>\n", PROMPT + "A<turn|>\n", PROMPT + "<|turn>user\nmodel\n"):
        for encode in (
            lambda row: small.encode(row | {"completion": "A"}),
            lambda row: small.encode(row, add_generation_prompt=True),
            lambda row: small.encode(read_prompt(row), add_generation_prompt=True),
            lambda row: read_preference(row | {"chosen": "B", "rejected": "W"}, small),
        ):
            with pytest.raises(ValueError, match="does not end where an answer begins"):
                encode({"prompt": text})


def test_settings_that_a_templated_prompt_cannot_take_are_refused(tiny_dir, with_template):
    row = {"prompt": PROMPT, "completion": "A"}
    thinking = Processor.from_pretrained(tiny_dir, thinking=True)
    with pytest.raises(ValueError, match="already follows .* enable_thinking .*data.thinking"):
        thinking.encode(row)
    shown = "<bos><|turn>system\n<|think|>\n<turn|>\n" + PROMPT.removeprefix("<bos>")
    assert learnt(thinking, row | {"prompt": shown}) == ["A<turn|>"]
    other = with_template(
        ("{{- bos_token -}}", "{{- bos_token -}}{{- own or '' -}}"),
        chat_template_kwargs={"own": "x"},
    )
    with pytest.raises(ValueError, match="already follows .* own .*data.chat_template_kwargs"):
        other.encode(row)


def test_a_thought_that_a_prompt_opens_is_learnt_or_refused(tiny_dir, small):
    row = {"prompt": PROMPT + "<|channel>thought\n", "completion": "hm\n<channel|>A"}
    assert learnt(small, row) == ["hm\n<channel|>A<turn|>"]
    with pytest.raises(ValueError, match="the prompt ends in a thought, .*none"):
        Processor.from_pretrained(tiny_dir, thoughts="none").encode(row)


def test_a_templated_prompt_has_its_images_at_their_places(small):
    picture = np.zeros((20, 30, 3), np.uint8)
    row = {"prompt": PROMPT.replace("Q", "Q<|image|>"), "images": [picture]}
    shown = USER | {"content": ["Q", {"type": "image", "image": picture}]}
    expected = small.encode([shown, ANSWER])
    found = small.encode(row | {"completion": "A"})
    np.testing.assert_array_equal(found.tokens, expected.tokens[:-1])
    np.testing.assert_array_equal(found.images, expected.images)


# ---- Images that a model says.


def test_placeholders_in_an_answer_are_not_learnt(small):
    said = {"role": "assistant", "content": "a <image> here"}
    row = {"messages": [USER, said], "images": [np.zeros((9, 9), np.uint8)]}
    example = small.encode(row)
    names = [small.image_token_id, small.boi_token_id, small.eoi_token_id]
    assert np.isin(example.tokens, names).sum() == 66
    assert not example.loss_mask[np.isin(example.tokens, names)].any()
    assert "".join(learnt(small, row)) == "ahere<turn|>"


def test_an_image_may_be_an_object_that_holds_it(small, tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    expected = small.encode({"messages": [USER, ANSWER], "images": [path]})
    for given in (
        {"image": path},
        {"url": path},
        {"path": path, "bytes": None},
        {"bytes": (tmp_path / "a.png").read_bytes(), "path": "gone.png"},
        {"type": "image_url", "image_url": {"url": path}},
    ):
        found = small.encode({"messages": [USER, ANSWER], "images": [given, None], "image": ""})
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
    with pytest.raises(ValueError, match="image 0: expected an object with 'url', .*'size'"):
        small.encode({"messages": [USER, ANSWER], "images": [{"size": 3}]})


def test_budget_and_transparency_are_settings_of_the_processor(tiny_dir):
    assert Processor.from_pretrained(tiny_dir).max_soft_tokens == 70
    assert Processor.from_pretrained(tiny_dir, 280).max_soft_tokens == 280
    shown = USER | {"content": [{"type": "image", "image": np.zeros((64, 64, 4), np.uint8)}]}
    white, black = (
        Processor.from_pretrained(tiny_dir, transformers_alpha=alpha).encode([shown, ANSWER]).images
        for alpha in (False, True)
    )
    assert (white[0, :256, :48] == 1).all() and not black[0, :256, :48].any()


@pytest.mark.parametrize("end", ["", "<turn|>", "<turn|>\n", "<eos>", "<turn|>\n<eos> "])
def test_an_answers_own_end_of_turn_is_learnt_once(small, end):
    rows = [
        {"prompt": "Q", "completion": f"A{end}"},
        {"prompt": PROMPT, "completion": f"A{end}"},
        {"messages": [USER, {"role": "assistant", "content": f"A{end}"}]},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "text", "text": f"A{end}"}]},
            ]
        },
    ]
    pairs = [
        {"prompt": "Q", "chosen": f"A{end}", "rejected": "B"},
        {"prompt": PROMPT, "chosen": f"{PROMPT}A{end}", "rejected": f"{PROMPT}B{end}"},
        {"chosen": f"{PROMPT}A{end}", "rejected": f"{PROMPT}B{end}"},
    ]
    rows += [read_preference_pair(pair)["chosen"] for pair in pairs]
    assert [learnt(small, row) for row in rows] == [["A<turn|>"]] * len(rows)
    asked = {"messages": [USER, {"role": "assistant", "content": f"A{end}"}]}
    assert read_prompt(asked).columns["answer"] == "A"


def test_turns_of_the_template_within_a_text_are_named(small):
    for row in (
        {"prompt": PROMPT, "completion": f"{PROMPT}A"},
        {"prompt": PROMPT, "completion": "A<turn|><|turn>user\nx"},
        {"prompt": f"Explain {PROMPT}", "completion": "A"},
    ):
        with pytest.raises(ValueError, match=r"it holds '<\|turn>user'"):
            small.encode(row)
    other = PROMPT.replace("Q", "R")
    with pytest.raises(ValueError, match="begins with another prompt than 'prompt'"):
        read_preference_pair({"prompt": PROMPT, "chosen": f"{other}A", "rejected": "B"})
    with pytest.raises(ValueError, match="<bos> behind its beginning"):
        small.encode({"prompt": PROMPT.replace("Q", "<bos>Q"), "completion": "A"})
    spaced = small.encode({"prompt": f"\n{PROMPT}", "completion": "A"})
    assert runs(small, spaced) == [(PROMPT, 0), ("A<turn|>", 1)]
