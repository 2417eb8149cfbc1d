# SPDX-License-Identifier: Apache-2.0
"""Keys and marks of other tools' data: each line of docs/how-to/data.md, on every road."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tunix_gemma4.data import make_dataset
from tunix_gemma4.data.conversation import read_conversation, read_preference_pair, read_prompt
from tunix_gemma4.data.preferences import PreferenceBatches
from tunix_gemma4.data.processor import Processor
from tunix_gemma4.data.prompts import PromptRows
from tunix_gemma4.data.sources import Rows

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
TALK = [USER, ANSWER]
SYSTEM = {"role": "system", "content": "S"}
IMAGE = {"type": "image"}
NAN = float("nan")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
RESULT = {"role": "tool", "name": "f", "content": "R"}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
ROUND = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, ANSWER]


def text(content):
    return {"type": "text", "text": content}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def said(message, **keys):
    return [USER, message | keys]


# Rows of each tool's documentation, and the messages that all of them mean.
FORMS = {
    "trl messages": ({"messages": TALK}, TALK),
    "trl prompt, completion": ({"prompt": "Q", "completion": "A"}, TALK),
    "trl conversational prompt": ({"prompt": [USER], "completion": [ANSWER]}, TALK),
    "llama-factory alpaca": ({"instruction": "Q", "input": "", "output": "A"}, TALK),
    "llama-factory alpaca with input": (
        {"instruction": "Do", "input": "it", "output": "A"},
        [{"role": "user", "content": "Do\nit"}, ANSWER],
    ),
    "llama-factory history": (
        {"instruction": "Q", "output": "A", "history": [["Q", "A"]], "system": "S"},
        [SYSTEM, *TALK, *TALK],
    ),
    "llama-factory sharegpt": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        TALK,
    ),
    "llama-factory system": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
        | {"system": "S"},
        [SYSTEM, *TALK],
    ),
    "llama-factory function_call, observation": (
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": "1"}}'},
                {"from": "observation", "value": "R"},
                {"from": "gpt", "value": "A"},
            ]
        },
        ROUND,
    ),
    "ms-swift conversation": ({"conversation": [{"human": "Q", "assistant": "A"}]}, TALK),
    "ms-swift system in the first turn": (
        {"conversation": [{"system": "S", "human": "Q", "assistant": "A"}]},
        [SYSTEM, *TALK],
    ),
    "ms-swift query, response": (
        {"query": "Q", "response": "A", "history": [["Q", "A"]], "system": "S"},
        [SYSTEM, *TALK, *TALK],
    ),
    "ms-swift system_prompt": ({"system_prompt": "S", "messages": TALK}, [SYSTEM, *TALK]),
    "ms-swift tool_call, tool_response": (
        [
            USER,
            {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": "1"}}'},
            {"role": "tool_response", "content": "R"},
            ANSWER,
        ],
        ROUND,
    ),
    "a table of two forms": (
        {
            "messages": [],
            "prompt": NAN,
            "conversations": [
                {"from": "human", "value": "Q", "role": None, "content": None},
                {"from": "gpt", "value": "A", "role": "", "content": "", "weight": NAN},
            ],
            "system": "",
            "system_prompt": "S",
            "image": "",
            "images": [None],
        },
        [SYSTEM, *TALK],
    ),
    "anthropic system": ({"system": [text("S")], "messages": TALK}, [SYSTEM, *TALK]),
    "question, answer": ({"question": "Q", "answer": "A"}, TALK),
    "prompt, response": ({"prompt": "Q", "response": "A"}, TALK),
    "pygmalion": (
        {"conversations": [{"role": "user", "value": "Q"}, {"role": "model", "value": "A"}]},
        TALK,
    ),
    "openai developer": ([{"role": "developer", "content": "S"}, *TALK], [SYSTEM, *TALK]),
    "openai tool_calls": (
        [
            USER,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": '{"x": "1"}'}}
                ],
            },
            {"role": "tool", "content": "R"},
            ANSWER,
        ],
        ROUND,
    ),
    "openai function_call": (
        [
            USER,
            {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": "1"}'}},
            {"role": "function", "name": "f", "content": "R"},
            ANSWER,
        ],
        ROUND,
    ),
    "anthropic tool_use, tool_result": (
        [
            USER,
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "name": "f", "input": {"x": "1"}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "content": "R"}]},
            ANSWER,
        ],
        ROUND,
    ),
    "gemma tool_responses": (
        [
            USER,
            ROUND[1] | {"tool_responses": [{"name": "f", "response": "R"}]},
            ANSWER,
        ],
        ROUND,
    ),
    "assistant messages that follow each other": (
        [USER, ANSWER, ANSWER],
        [USER, ANSWER | {"content": "A\nA"}],
    ),
    "openai reasoning_content": (
        said(ANSWER, reasoning_content="T"),
        said(ANSWER, reasoning_content="T"),
    ),
    "reasoning": (said(ANSWER, reasoning="T"), said(ANSWER, reasoning_content="T")),
    "harmony thinking": (said(ANSWER, thinking="T"), said(ANSWER, reasoning_content="T")),
    "a thought channel": (
        [USER, ANSWER | {"content": "<|channel>thought\nT\n<channel|>A"}],
        said(ANSWER, reasoning_content="T"),
    ),
    "anthropic thinking part": (
        [USER, ANSWER | {"content": [{"type": "thinking", "thinking": "T"}, text("A")]}],
        [USER, {"role": "assistant", "content": [text("A")], "reasoning_content": "T"}],
    ),
}


def plain(messages):
    """Without the difference between no text and no parts."""
    return [m | {"content": m["content"] or ""} for m in messages]


@pytest.mark.parametrize(("row", "messages"), FORMS.values(), ids=FORMS)
def test_every_form_means_the_same_messages_on_every_road(row, messages):
    assert plain(read_conversation(row).messages) == messages
    asked = read_prompt(row)
    assert plain(asked.messages) == messages[:-1]
    assert read_conversation(row).trained[-1]
    given = {"chosen": "better", "rejected": "worse"}
    pair = read_preference_pair({"prompt": asked.messages, "tools": asked.tools, **given})
    for side, conversation in pair.items():
        assert plain(conversation.messages)[:-1] == messages[:-1]
        assert conversation.messages[-1]["content"] == given[side]
        assert conversation.trained == [False] * (len(conversation.trained) - 1) + [True]


# ---- Marks of images.

MARKS = ("<image>", "<start_of_image>", "<image_soft_token>", "<|image|>", "<|image_pad|>")
MARKS += ("<|vision_start|><|image_pad|><|vision_end|>",)


@pytest.mark.parametrize("mark", MARKS)
def test_images_stand_at_their_marks_on_every_road(mark):
    first, second = f"{mark}Who?", f"and here?{mark}"
    row = {
        "messages": [
            {"role": "user", "content": first},
            ANSWER,
            {"role": "user", "content": second},
        ],
        "images": ["a.png", "b.png"],
    }
    placed = [user(IMAGE, text("Who?")), ANSWER, user(text("and here?"), IMAGE)]
    asked = read_prompt(row)
    assert (asked.messages, asked.images) == (placed, ["a.png", "b.png"])
    learnt = read_conversation(row | {"messages": [*row["messages"], ANSWER]})
    assert (learnt.messages, learnt.images) == ([*placed, ANSWER], ["a.png", "b.png"])
    sharegpt = [{"from": "human", "value": first}, {"from": "gpt", "value": "A"}]
    found = read_conversation({"conversations": sharegpt, "image": ["a.png"]})
    assert (found.messages, found.images) == ([placed[0], ANSWER], ["a.png"])
    prompt = {"prompt": first, "image": "a.png"}
    assert read_prompt(prompt).messages == placed[:1]
    assert read_conversation(prompt | {"completion": "A"}).messages == [placed[0], ANSWER]
    pair = read_preference_pair(prompt | {"chosen": "A", "rejected": "B"})
    assert [side.images for side in pair.values()] == [["a.png"]] * 2
    assert pair["chosen"].messages == [placed[0], ANSWER]
    for images in (["a.png"], list("abc"), [], None):
        for read in (read_prompt, read_conversation):
            with pytest.raises(ValueError, match=f"^{len(images or [])} images .* have 2 image"):
                read(row | {"images": images, "messages": [*row["messages"]]})


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ({"messages": [USER, ANSWER | {"content": "A <image> B"}], "images": ["a"]}, []),
        ({"messages": [user(IMAGE), ANSWER | {"content": [IMAGE]}], "images": ["a", "b"]}, ["a"]),
        ({"prompt": "Q", "completion": "A <image>", "images": ["a"]}, []),
        ({"prompt": "<image>Q", "answer": "A <image>", "images": ["a", "b"]}, ["a"]),
        ({"prompt": "Q", "answer": ["A"], "output": 3, "images": ["a"]}, ["a"]),
        ({"prompt": "Q", "answer": [{"id": "A"}], "images": ["a"]}, ["a"]),
    ],
)
def test_an_image_of_the_answer_is_none_of_the_prompt(row, left):
    asked = read_prompt(row)
    assert asked.images == left
    parts = [p for m in asked.messages if isinstance(m["content"], list) for p in m["content"]]
    assert parts.count(IMAGE) == len(left)
    if "prompt" in row:
        assert read_conversation(row, prompt_only=True).images == left


@pytest.mark.parametrize("kind", [int, float, np.int64])
def test_an_image_part_names_its_image_by_index(kind):
    def shown(*order):
        parts = [IMAGE | {"index": i if i in (None, 0.5) else kind(i), "text": None} for i in order]
        return {"messages": [user(*parts, text("Q") | {"index": None}), ANSWER]}

    row = shown(1, 0, 1) | {"images": ["a.png", "b.png"]}
    found = read_conversation(row)
    assert found.messages == [user(IMAGE, IMAGE, IMAGE, text("Q")), ANSWER]
    assert (found.images, found.unread) == (["b.png", "a.png", "b.png"], ())
    assert read_prompt(row).images == found.images
    for order in ((1, 2), (0, 0), (0, None), (0, -1), (0.5, 0)):
        with pytest.raises(ValueError, match="'index': 2 images are given .* expected each of 0"):
            read_conversation(shown(*order) | {"images": ["a.png", "b.png"]})


def test_a_mark_in_a_thought_is_refused():
    row = {"messages": said(ANSWER, reasoning="see <image>"), "images": ["a"]}
    for read in (read_conversation, read_prompt):
        with pytest.raises(ValueError, match="a thought has the mark '<image>'"):
            read(row)
    assert read_conversation(row["messages"]).messages[1]["reasoning_content"] == "see <image>"


def test_a_mark_beside_image_parts_is_text():
    messages = [user(IMAGE, text("an <image> tag")), ANSWER]
    assert read_conversation({"messages": messages, "image": "a.png"}).messages == messages


# ---- Loss switches.

SWITCHES = [("weight", 0), ("weight", 0.0), ("train", False), ("loss", False), ("loss_scale", 0)]


@pytest.mark.parametrize(("key", "value"), SWITCHES)
def test_a_loss_switch_leaves_a_message_out(key, value):
    learnt = {key: type(value)(1)}
    row = [USER, ANSWER | {key: value}, USER, ANSWER | learnt, USER, ANSWER]
    assert read_conversation(row).trained == [False, True, True]
    parts = [text("A") | {key: value}]
    assert read_conversation([USER, ANSWER | {"content": parts}, *TALK]).trained == [False, True]
    with pytest.raises(ValueError, match="^'chosen': .*loss switch is off"):
        read_preference_pair({"prompt": "Q", "chosen": ANSWER | {key: value}, "rejected": "B"})


def test_history_is_learnt_as_llama_factory_does_and_a_prompts_answers_are_not():
    row = {"instruction": "Q", "output": "A", "history": [["Q", "A"]]}
    assert read_conversation(row).trained == [True, True]
    assert read_conversation({"prompt": [*TALK, USER], "completion": "A"}).trained == [False, True]
    turns = [{"human": "Q", "assistant": "A", "loss": False}, {"human": "Q", "assistant": "A"}]
    assert read_conversation({"conversation": turns}).trained == [False, True]


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_scale"])
def test_a_switch_that_is_on_is_honoured_in_a_prompt_or_refused(key):
    prompt = [USER, ANSWER | {key: 1}, USER, ANSWER, USER]
    assert read_conversation({"prompt": prompt, "completion": "A"}).trained == [True, False, True]
    assert read_prompt({"prompt": prompt}).trained == [False, False]
    with pytest.raises(ValueError, match="message 1: its loss switch is on, and in preferences"):
        read_preference_pair({"prompt": prompt, "chosen": "B", "rejected": "W"})
    answer = ANSWER | {key: 1}
    pair = read_preference_pair({"prompt": "Q", "chosen": answer, "rejected": [USER, answer]})
    assert [side.trained for side in pair.values()] == [[True], [True]]


# ---- Tools.

TOOLS = {
    "openai, trl": [TOOL],
    "json": json.dumps([TOOL]),
    "list of json": [json.dumps(TOOL)],
    "bare": [{"name": "f", "description": "", "parameters": {}}],
    "anthropic": [{"name": "f", "description": "", "input_schema": {}}],
    "axolotl": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}],
    "parquet": [TOOL | {"strict": None}],
}


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("tools", TOOLS.values(), ids=TOOLS)
def test_definitions_of_tools_are_read_on_every_road(tools, key):
    prompt = {"prompt": "Q", key: tools}
    assert read_conversation(prompt | {"completion": "A"}).tools == [TOOL]
    assert read_prompt(prompt).tools == [TOOL]
    pair = read_preference_pair(prompt | {"chosen": "A", "rejected": "B"})
    assert [side.tools for side in pair.values()] == [[TOOL]] * 2


def test_results_are_named_after_their_calls():
    calls = [CALL | {"id": "1"}, {"id": "2", "function": {"name": "g", "arguments": "{}"}}]
    row = [
        USER,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "2", "content": "second"},
        {"role": "tool", "tool_call_id": "1", "content": "first"},
    ]
    assert [m["name"] for m in read_prompt(row).messages[2:]] == ["g", "f"]
    other = {"role": "tool_call", "content": '{"name": "f", "parameters": {"x": "1"}}'}
    assert read_prompt([USER, other, RESULT]).messages == ROUND[:3]
    named = [{"role": "function", "name": name, "content": name} for name in "gf"]
    assert [m["name"] for m in read_prompt([*row[:2], *named]).messages[2:]] == ["g", "f"]
    for wrong in (
        [row[2] | {"tool_call_id": "zzz"}],
        [row[2] | {"name": "f"}],
        [row[2], row[2]],
        [row[2], ANSWER],
        [row[2]],
        [named[0] | {"name": "other"}],
        [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "3", "content": ""}]}],
    ):
        with pytest.raises(ValueError, match="(it answers|the) call .*f \\(1\\)"):
            read_prompt([*row[:2], *wrong])


def test_a_call_that_nothing_answers_ends_the_conversation_or_is_refused():
    pair = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]
    asked = [USER, {"role": "function_call", "content": json.dumps(pair)}]
    both = {"role": "observation", "content": '[{"r": 1}, {"r": 2}]'}
    assert len(read_conversation(asked).messages) == 2
    assert len(read_conversation([*asked, both, both, ANSWER]).messages) == 5
    for rest in ([both], [both, ANSWER], [both, USER, ANSWER], [USER, ANSWER]):
        with pytest.raises(ValueError, match=r"the call [fg] \(None\) before it has no answer"):
            read_conversation([*asked, *rest])


@pytest.mark.parametrize(
    "result",
    [
        {"role": "tool", "tool_call_id": "1", "content": None},
        {"role": "tool", "content": NAN},
        {"role": "tool"},
        user({"type": "tool_result", "tool_use_id": "1"}),
        user({"type": "tool_result", "tool_use_id": "1", "content": None}),
        {"role": "tool", "content": ""},
    ],
)
def test_a_tool_may_answer_nothing(result):
    asked = [USER, ROUND[1] | {"tool_calls": [CALL | {"id": "1"}]}]
    assert read_prompt([*asked, result]).messages[2] == RESULT | {"content": ""}
    native = ROUND[1] | {"tool_responses": [{"name": "f", "response": None}]}
    assert read_prompt([USER, native]).messages[2] == RESULT | {"content": ""}


# ---- Template arguments.


def test_template_arguments_of_a_row():
    row = {"prompt": "Q", "completion": "A", "chat_template_kwargs": {"a": 1, "b": None}}
    assert read_conversation(row).arguments == {"a": 1}
    assert read_prompt(row | {"enable_thinking": True}).arguments["enable_thinking"] is True
    twice = {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(ValueError, match="'enable_thinking' and 'chat_template_kwargs' contradict"):
        read_conversation(row | twice)


# ---- Preferences.

BETTER, WORSE = {"role": "assistant", "content": "B"}, {"role": "assistant", "content": "W"}
PAIRS = {
    "trl": {"prompt": "Q", "chosen": "B", "rejected": "W"},
    "trl conversational": {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
    "trl implicit": {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
    "a message as answer": {"prompt": "Q", "chosen": BETTER, "rejected": WORSE},
    "llama-factory sharegpt": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "B"},
        "rejected": {"from": "gpt", "value": "W"},
    },
    "llama-factory alpaca": {"instruction": "Q", "input": "", "chosen": "B", "rejected": "W"},
    "ultrafeedback_binarized": {
        "prompt": "Q",
        "prompt_id": "0",
        "chosen": [USER, BETTER],
        "rejected": [USER, WORSE],
        "messages": [USER, BETTER],
        "score_chosen": 8.0,
    },
    "axolotl messages": {"messages": [USER], "chosen": BETTER, "rejected": WORSE},
    "axolotl argilla": {"instruction": "Q", "chosen_response": "B", "rejected_response": "W"},
    "axolotl intel": {"question": "Q", "chosen": "B", "rejected": "W"},
    "axolotl icr": {"input": "Q", "chosen": "B", "rejected": "W"},
    "ms-swift rejected_response": {"messages": [USER, BETTER], "rejected_response": "W"},
    "ms-swift rejected_response message": {
        "messages": [USER, BETTER],
        "rejected_response": [WORSE],
    },
    "ms-swift rejected_messages": {
        "messages": [USER, BETTER],
        "rejected_messages": [USER, WORSE],
    },
    "openai": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [BETTER],
        "non_preferred_output": [WORSE],
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_every_form_of_preferences_means_the_same(row):
    pair = read_preference_pair(row)
    assert [side.messages for side in pair.values()] == [[USER, BETTER], [USER, WORSE]]
    assert [side.trained for side in pair.values()] == [[True]] * 2
    if "system" not in row and not isinstance(row.get("chosen"), list):
        pair = read_preference_pair(row | {"system": "S"})
        assert pair["rejected"].messages == [SYSTEM, USER, WORSE]


def test_images_of_the_worse_answer():
    row = {"messages": [USER, BETTER], "images": ["a"], "rejected_images": ["b"]}
    pair = read_preference_pair(row)
    assert [side.images for side in pair.values()] == [["a"], ["b"]]


# ---- What is refused.

REFUSED = {
    "videos": ({"videos": ["a.mp4"]}, "'videos' is not supported: images are"),
    "video": ({"video": "a.mp4"}, "'video' is not"),
    "audios": ({"audios": ["a.wav"]}, "'audios' is not"),
    "audio": ({"audio": {"path": "a.wav"}}, "'audio' is not"),
    "ms-swift objects": ({"objects": {"ref": [], "bbox": [[1, 2]]}}, "'objects' is not"),
    "trl label": ({"label": False}, "'label' is feedback .*KTO"),
    "llama-factory kto_tag": ({"kto_tag": True}, "'kto_tag' is feedback"),
    "trl labels": ({"completions": ["a"], "labels": [True]}, "'labels' are of single steps"),
    "axolotl input_ids": ({"input_ids": [1], "labels": [1]}, "'input_ids'|'labels'"),
    "axolotl segments": ({"segments": [{"label": True, "text": "a"}]}, "'segments' are not"),
    "two systems": (
        {"messages": [SYSTEM, *TALK], "system": "other", "prompt": None},
        "'system' and the conversation's system message differ",
    ),
    "two systems beside": (
        {"system": "S", "system_prompt": "T"},
        "'system' and 'system_prompt' mean the same and differ",
    ),
    "two lists of tools": (
        {"tools": [TOOL], "functions": [{"name": "g"}]},
        "'tools' and 'functions' mean the same and differ",
    ),
    "history beside a prompt of messages": (
        {"prompt": [USER], "history": [["a", "b"]]},
        "'history' stands beside",
    ),
    "history beside messages": ({"messages": TALK, "history": [["a", "b"]]}, "'history' stands"),
    "history": ({"history": [["a"]]}, "'history': expected pairs of two strings"),
    "system": ({"system": ["a"]}, "'system': expected a string, found list"),
    "tools": ({"tools": "no json"}, "'tools': expected JSON, found 'no json'"),
    "tool without name": ({"tools": [{}]}, "'tools': expected definitions with a 'name'"),
    "chat_template_kwargs": ({"chat_template_kwargs": 3}, "'chat_template_kwargs': expected an"),
    "enable_thinking": ({"enable_thinking": "yes"}, "'enable_thinking': expected true or false"),
    **{
        f"template {start}": ({"prompt": start + "Q"}, "in another model's chat template")
        for start in (
            *("<start_of_turn>user\n", "<bos><start_of_turn>user\n", "<bos>", "<|turn>user "),
            *("<|im_start|>user\n", "<|begin_of_text|><|start_header_id|>", "<|start_header_id|>"),
            *(
                "<|user|>\n",
                "<｜begin▁of▁sentence｜><｜User｜>",
                "<|start|>user<|message|>",
                "[INST] ",
            ),
            *("<s>[INST]", "<s> <|user|>", "[gMASK]<sop><|user|>", "<BOS_TOKEN><|START_OF_TURN_"),
        )
    },
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_keys_that_would_be_lost_are_refused_on_every_road(keys, message):
    row = {"prompt": "Q", **keys}
    for read in (
        lambda: read_conversation(row | {"completion": "A"}),
        lambda: read_prompt(row),
        lambda: read_preference_pair(row | {"chosen": "B", "rejected": "W"}),
    ):
        if read_preference_pair.__name__ in read.__code__.co_names and "messages" in row:
            continue  # There messages that end in an answer are no prompt.
        with pytest.raises(ValueError, match=message):
            read()


MESSAGES = {
    "weight": (said(ANSWER, weight=0.5), "message 1: 'weight': expected 0 or 1"),
    "weight word": (said(ANSWER, weight="0"), "message 1: 'weight': expected 0 or 1"),
    "two switches": (said(ANSWER, weight=1, train=False), "'weight', 'train' contradict"),
    "train a question": ([USER | {"train": True}, ANSWER], "message 0: it is to be trained on"),
    "parts": (
        [USER, ANSWER | {"content": [text("a") | {"train": False}, text("b")]}],
        "message 1: its parts differ in their loss switches",
    ),
    "train_detail": (said(ANSWER, train_detail=[{}]), "message 1: 'train_detail'"),
    "refusal": (said(ANSWER, refusal="no"), "message 1: 'refusal'"),
    "message audio": (said(ANSWER, audio={"id": "a"}), "message 1: 'audio'"),
    "message images": ([USER | {"images": ["a"]}, ANSWER], "message 0: 'images'"),
    "a thought behind a text": (
        said(ANSWER, content=[text("A"), {"type": "thinking", "thinking": "T"}, text("B")]),
        "message 1: a thought stands behind what it says",
    ),
    "a text behind a call": (
        said(ANSWER, content=[{"type": "tool_use", "name": "f", "input": {}}, text("A")]),
        "message 1: a part of text stands behind a call",
    ),
    "a result behind a text": (
        [*ROUND[:2], user(text("A"), {"type": "tool_result", "content": "R"})],
        "message 2: a tool_result stands behind a text",
    ),
    "a thought of no text": (
        said(ANSWER, content=[{"type": "thinking", "signature": "a"}, text("A")]),
        "message 1: a thinking part needs a string 'thinking'",
    ),
    "a thought that is no text": (
        said(ANSWER, content=[{"type": "thinking", "thinking": [IMAGE]}, text("A")]),
        "message 1: 'thinking': expected a string, found list",
    ),
    "an open thought": (
        said(ANSWER, content="<|channel>thought\nhm\nC"),
        "message 1: its thought is left open",
    ),
    "two contents": ([USER | {"value": "other"}, ANSWER], "'content' and 'value' mean the same"),
    "two roles": ([USER | {"from": "gpt"}, ANSWER], "'role' and 'from' contradict"),
    "another role": ([{"role": "bot", "content": "a"}], "no role 'bot'; expected .* human, .* gpt"),
    "an image in a text": ([user(text("a") | {"image": "b"}), ANSWER], "its text part has 'image'"),
    "a text of an image": ([user(IMAGE | {"image": "b", "text": "a"}), ANSWER], "has 'text'; give"),
    "a thought in a text": (
        said(ANSWER, content=[text("A") | {"thinking": "T"}]),
        "message 1: its text part has 'thinking'",
    ),
    "a text of a call": (
        said(ANSWER, content=[{"type": "tool_use", "name": "f", "input": {}, "text": "A"}]),
        "message 1: its tool_use part has 'text'",
    ),
    "a call that is half off": (
        said(ANSWER, content=[text("A"), {"type": "tool_use", "name": "f", "train": False}]),
        "message 1: its parts differ in their loss switches",
    ),
    "a system in a message": (said(ANSWER, system="S"), "message 1: 'system': give it in a mes"),
    "tools in a message": ([USER | {"tools": [TOOL]}, ANSWER], "message 0: 'tools': give them"),
    "two thoughts": (
        said(ANSWER, reasoning="a", thinking="b"),
        "message 1: it has two thoughts that differ",
    ),
    "a user's thought": ([USER | {"reasoning": "a"}, ANSWER], "'reasoning' stands in a user"),
    "a user's call": ([USER | {"tool_calls": [CALL]}, ANSWER], "'tool_calls' stands in a user"),
    "call": (said(ANSWER, tool_calls=[{}]), "tool_calls: expected calls with a 'name'"),
    "arguments": (
        said(ANSWER, tool_calls=[{"name": "f", "arguments": "[1]"}]),
        "message 1: tool_calls: expected 'arguments' to be an object",
    ),
    **{
        f"arguments {written}": (
            said(ANSWER, tool_calls=[{"name": "f", "arguments": written}]),
            f"message 1: tool_calls: 'arguments': expected .*{found}",
        )
        for written, found in (
            ('{"a": 1, "b": {"a": 1, "a": 2}}', "the key 'a' stands in one object twice"),
            ('{"a": 1e400}', "1e400 is no finite number"),
            ('{"a": [NaN]}', "NaN is no finite number"),
            ('{"a": -Infinity}', "-Infinity is no finite number"),
        )
    },
    "infinite arguments": (
        said(ANSWER, tool_calls=[{"name": "f", "arguments": {"a": [np.inf]}}]),
        "message 1: tool_calls: 'arguments': expected finite numbers, found inf",
    ),
    "arguments of another name": (
        said(ANSWER, tool_calls=[{"name": "f", "args": {"x": 1}}]),
        r"message 1: tool_calls: a call has no 'arguments', and has \['args'\]",
    ),
    "function_call": (
        [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "f(x)"}],
        "message 1: function_call: expected JSON, found",
    ),
    "result of nothing": ([USER, RESULT], "message 1: it answers a call, and none precedes it"),
    "result": (ROUND[:2] + [RESULT | {"content": 5}], "message 2: expected what a tool answ"),
    "result of another word": (
        ROUND[:2] + [{"role": "tool", "content": None, "output": "R"}],
        "message 2: what a tool answered has no 'content', and 'output'",
    ),
    "one learnt, one not": (
        [USER, ANSWER | {"weight": 0}, ANSWER],
        "message 2: it follows an assistant message, and one",
    ),
    "thought in the middle": (
        [USER, ANSWER, ANSWER | {"reasoning": "a"}],
        "message 2: it has a thought and follows",
    ),
    "role": ([{"role": ["user"], "content": "a"}], r"message 0: there is no role \['user'\]"),
    "image_url": (
        [user({"type": "image_url", "image_url": {}}), ANSWER],
        "message 0: 'image_url': expected an object with 'url'",
    ),
    "video part": ([user({"type": "video_url", "video_url": "a"}), ANSWER], "'video_url' parts"),
}


@pytest.mark.parametrize(("messages", "error"), MESSAGES.values(), ids=MESSAGES)
def test_messages_that_would_lose_something_are_refused(messages, error):
    with pytest.raises(ValueError, match=error):
        read_conversation(messages)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "Q", "chosen": "B", "rejected": "W"}, "'chosen', 'rejected' make it a row of"),
        ({"chosen": [USER, ANSWER], "rejected": "W"}, "it is a row of preferences"),
        (
            {"input": {"messages": TALK}, "messages": TALK},
            "'messages' stands in 'input' and beside it",
        ),
        ({"instruction": "Q", "input": {"a": 1}, "output": "A"}, "'input': expected a string"),
        ({"text": "plain"}, r"found an object with \['text'\]; plain texts are not trained on"),
    ],
)
def test_rows_of_another_kind_of_training_are_refused(row, error):
    with pytest.raises(ValueError, match=error):
        read_conversation(row)


@pytest.mark.parametrize("content", ["", " ", [], [{"type": "text", "text": ""}]])
def test_an_empty_user_turn_is_an_error_on_every_road(content):
    asked = [USER, ANSWER, {"role": "user", "content": content}]
    for read, row in (
        (read_conversation, [*asked, ANSWER]),
        (read_prompt, {"messages": asked}),
        (read_preference_pair, {"prompt": asked, "chosen": "B", "rejected": "W"}),
    ):
        with pytest.raises(ValueError, match="message 2: the user turn is empty"):
            read(row)


def test_an_empty_prompt_is_an_error_unless_there_is_a_picture():
    row = {"prompt": "", "history": [["Q", "A"]]}
    answers = {"chosen": "B", "rejected": "W"}
    for read, more in (
        (read_conversation, {"completion": "A"}),
        (read_prompt, {}),
        (read_preference_pair, answers),
    ):
        with pytest.raises(ValueError, match="'prompt' is empty"):
            read(row | more)
    shown = read_prompt({"instruction": "", "images": [np.zeros((4, 4, 3), np.uint8)]})
    assert len(shown.images) == 1


# ---- Columns.


def test_every_other_key_is_a_column_of_every_road():
    row = {"prompt": "Q", "ability": "math", "reward_model": {"ground_truth": "4"}, "label": 3}
    others = {"ability": "math", "reward_model": {"ground_truth": "4"}, "label": 3}
    assert read_prompt(row).columns == others
    assert read_conversation(row | {"completion": "A"}).columns == others
    pair = read_preference_pair(row | {"chosen": "B", "rejected": "W"})
    assert others.items() <= pair["chosen"].columns.items()
    message = USER | {"tree_id": "a", "name": None}
    assert read_conversation([message, ANSWER]).unread == ("tree_id",)
    shown = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}, "max_pixels": 9}
    both = {"type": "image", "image": "a.png", "url": "b.png", "text": None}
    kept = {"type": "image", "bytes": b"a", "path": "a.png"}
    named = [user(shown, both, kept) | {"name": "Ann"}, ANSWER | {"id": "1"}]
    keys = {"name", "id", "detail", "max_pixels", "url"}
    assert set(read_conversation(named).unread) == keys
    result = {"type": "tool_result", "content": [text("R") | {"of": 1}], "is_error": True}
    answered = [*ROUND[:2], user(result) | {"tree_id": "a"}, ANSWER]
    assert set(read_conversation(answered).unread) == {"tree_id", "is_error", "of"}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"instruction": "I", "messages": TALK}, {"instruction": "I"}),
        ({"prompt": "P", "messages": TALK, "completion": "Z"}, {"prompt": "P", "completion": "Z"}),
        ({"conversations": TALK, "messages": TALK}, {"conversations": TALK}),
        (
            {"prompt": "P", "instruction": "I", "input": "x", "output": "A"},
            {"instruction": "I", "input": "x"},
        ),
        ({"messages": TALK, "rejected_images": ["a"]}, {"rejected_images": ["a"]}),
        ({"messages": TALK, "prompt": "", "instruction": None, "system_prompt": NAN}, {}),
    ],
)
def test_a_second_form_is_a_column(row, columns):
    found = read_conversation(row).columns
    assert found == columns
    asked = read_prompt(row).columns
    assert columns.items() <= asked.items() and asked.keys() <= {*columns, "answer", "output"}
    if "rejected_images" not in row:
        asking = row | ({"messages": [USER]} if "messages" in row else {})
        pair = read_preference_pair(asking | {"chosen": "B", "rejected": "W"})
        assert columns.items() <= pair["chosen"].columns.items()


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"chosen": "B", "chosen_response": "C", "rejected": "W"},
            "'chosen' and 'chosen_response'",
        ),
        (
            {"messages": [USER, BETTER], "rejected_response": "W", "rejected_messages": [WORSE]},
            "'rejected_response' and 'rejected_messages' mean the same and differ",
        ),
        (
            {"conversations": TALK, "chosen": "B", "rejected": "W"},
            "'conversations' ends in an answ",
        ),
    ],
)
def test_preferences_that_say_a_thing_twice_are_refused(row, error):
    with pytest.raises(ValueError, match=error):
        read_preference_pair(row)


def test_the_answer_that_is_left_out_of_a_prompt_is_a_column():
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert read_prompt([USER, call]).columns == {"answer": call}
    marked = {"messages": said(ANSWER, content="A <image> B"), "images": ["a"]}
    assert read_prompt(marked).columns == {"answer": "A <image> B"}
    assert read_prompt({"messages": TALK, "answer": ""}).columns == {"answer": "A"}
    assert read_prompt({"messages": TALK, "answer": "own"}).columns == {"answer": "own"}
    assert read_prompt([USER, ANSWER | {"content": ""}]).columns == {}
    with pytest.raises(ValueError, match="'prompt' ends in an assistant message"):
        read_prompt({"prompt": TALK})


def test_a_key_that_a_reward_names_is_its_column_whatever_it_means():
    row = {"prompt": "Q", "label": True, "system": "S", "videos": ["a"], "images": ["x"]}
    asked = read_prompt(row, names={"label", "system", "videos", "images"})
    assert {"label", "system", "videos", "images"} <= asked.columns.keys()
    assert asked.messages[0] == SYSTEM
    assert asked.images == ["x"]


# ---- Prompts that follow the template already.

TEMPLATED = "<bos><|turn>user\nQ<turn|>\n<|turn>model\n"


def test_a_templated_prompt_is_recognised_on_every_road():
    for start in (TEMPLATED, TEMPLATED.removeprefix("<bos>")):
        row = {"prompt": start}
        assert read_prompt(row).given == start
        assert read_conversation(row | {"completion": "A"}).text == start
        assert read_preference_pair(row | {"chosen": "B", "rejected": "W"})["chosen"].text == start
        beside = {"system": "S", "system_prompt": "S", "tools": [TOOL], "functions": [TOOL]}
        beside |= {"enable_thinking": True, "chat_template_kwargs": {"a": 1}}
        beside |= {"history": [["a", "b"]]}
        for key, value in beside.items():
            for read, answers in (
                (read_prompt, {}),
                (read_conversation, {"completion": "A"}),
                (read_preference_pair, {"chosen": "B", "rejected": "W"}),
            ):
                with pytest.raises(ValueError, match=f"already follows .* that '{key}' cannot be"):
                    read(row | answers | {key: value})
        empty = {"system": "", "tools": [], "enable_thinking": None, "chat_template_kwargs": {}}
        assert read_conversation(row | empty | {"completion": "A"}).columns == {}
        with pytest.raises(ValueError, match="already follows .* data.system_prompt cannot be"):
            read_prompt(row, system="S")
        assert read_prompt(row, system="").given == start
    assert read_prompt({"prompt": "Q"}, system="").messages == [USER]
    own = "<|turn>system\nS<turn|>\n<|turn>user\nQ<turn|>\n<|turn>model\n"
    assert read_prompt({"prompt": own}, system="T").given == own


ORDINARY = ("<|image|>Q", "<|vision_start|><|image_pad|><|vision_end|>Q", "<image>Q", "[1] Q")
ORDINARY += ("What is <|im_start|>?", "<| is F#, |> too", "<s>struck</s>", "<|> is an operator")


@pytest.mark.parametrize("prompt", ORDINARY)
def test_ordinary_text_is_no_template(prompt):
    assert read_prompt({"prompt": prompt}).messages[0]["content"] == prompt


# ---- Images.


def test_paths_below_the_file_are_those_of_images_alone(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(buffer, "png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    call = {"name": "f", "arguments": {"path": "a.py", "image": "b.png"}}
    row = {
        "messages": [
            user({"type": "image", "image": "a.png"}, {"type": "image", "image": encoded}),
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": {"path": "c", "image": "d"}},
        ],
        "images": ["e.png", encoded, f"data:image/png;base64,{encoded}"],
        "path": "f",
        "rejected_images": ["g.png"],
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    read = Rows(tmp_path / "rows.json")[0]
    parts = read["messages"][0]["content"]
    assert [part["image"] for part in parts] == [str(tmp_path / "a.png"), encoded]
    assert read["messages"][1:] == row["messages"][1:]
    assert read["images"] == [str(tmp_path / "e.png"), *row["images"][1:]]
    assert (read["path"], read["rejected_images"]) == ("f", [str(tmp_path / "g.png")])


def test_rows_that_are_told_to_think_and_do_not_are_counted(tiny_dir):
    rows = [{"messages": [USER, ANSWER | {"reasoning": "T"}]}, *[{"messages": TALK}] * 2]
    for thinking, shown in (
        (True, ["told to think, and without a thought to learn: 2"]),
        (False, []),
    ):
        said = []
        processor = Processor.from_pretrained(tiny_dir, thinking=thinking)
        make_dataset(rows, processor, batch_size=1, max_length=64).check(log=said.append)
        assert [line.strip() for line in "\n".join(said).split("\n") if "think" in line] == shown


def test_keys_and_thoughts_that_are_left_out_are_named_once(tiny_dir, tmp_path):
    processor = Processor.from_pretrained(tiny_dir)
    talk = [USER | {"tree_id": 1}, ANSWER | {"reasoning": "T"}, USER, ANSWER]
    rows = [{"messages": talk, "score": 1}, {"prompt": "Q", "completion": "A", "id": "x"}] * 2
    said = []
    make_dataset(rows, processor, batch_size=1, max_length=64).check(log=said.append)
    assert said[-1] == (
        "  columns that are not trained on: id, score\n"
        "  keys of messages that are not read: tree_id"
    )
    assert "2 earlier thoughts" in said[-2]
    pairs = [{"prompt": "Q", "chosen": "B", "rejected": "W", "margin": 1}]
    batches = PreferenceBatches(
        *(pairs, processor),
        batch_size=1,
        max_prompt_length=64,
        max_response_length=9,
        log=said.append,
    )
    next(iter(batches))
    assert said[-1] == "  columns that are not trained on: margin"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "Q", "label": True, "level": 3}]))
    found = PromptRows(path, processor, log=said.append, names={"label"})
    assert said[-1] == "  columns for rewards: label, level"
    assert found[0] == {"prompts": [USER], "label": True, "level": 3}
    with pytest.raises(ValueError, match="row 0 of rows.json: 'label' is feedback"):
        PromptRows(path, processor)


def test_each_turn_is_a_row_of_the_pipeline(tiny_dir):
    processor = Processor.from_pretrained(tiny_dir, thoughts="each_turn")
    rows = [{"messages": [USER, ANSWER | {"reasoning": "T"}] * 2}]
    data = make_dataset(
        rows, processor, batch_size=2, max_length=64, bucket_lengths=(64,), num_epochs=1
    )
    (batch,) = data
    first, second = sorted(batch.padding_mask.sum(1).tolist())
    assert first < second
    learnt = [
        processor.decode(t[m == 1]) for t, m in zip(batch.tokens, batch.loss_mask, strict=True)
    ]
    assert learnt == ["thought\nT\nA"] * 2


def test_page_of_the_data_lists_every_key_and_mark():
    from tunix_gemma4.data import (
        keys as processor_keys,
        messages as processor_messages,
        rows as processor_rows,
    )

    page = (Path(__file__).parents[1] / "docs/how-to/data.md").read_text("utf-8")
    names = [*processor_keys.CONSUMED, *processor_keys.REFUSED, *processor_keys.ANSWERS]
    names += [*processor_keys.CHOSEN, *processor_keys.REJECTED, *processor_messages.ROLES]
    names += [*processor_messages._SWITCHES, *processor_messages._THOUGHTS]
    names += [*processor_messages._REFUSED, *processor_rows._MARKS]
    page = page.replace("\\|", "|")
    missing = [name for name in dict.fromkeys(names) if f"`{name}`" not in page]
    assert not missing
