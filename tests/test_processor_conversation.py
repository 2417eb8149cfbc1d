# SPDX-License-Identifier: Apache-2.0
"""Every form of a conversation is read as the same messages, and nonsense is refused by name."""

import numpy as np
import pytest

from tunix_gemma4.data.conversation import read_conversation

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is this?"}
PARTS = [IMAGE, TEXT]
ANSWER = {"role": "assistant", "content": "A cat."}
EXPECTED = [{"role": "user", "content": PARTS}, ANSWER]


def user(*parts):
    return {"role": "user", "content": list(parts)}


def objects(*values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


SAME = {
    "messages": [user(IMAGE | {"image": "cat.png"}, TEXT), ANSWER],
    "row": {"messages": [user(IMAGE | {"image": "cat.png"}, TEXT), ANSWER]},
    "model_role": [user(IMAGE | {"image": "cat.png"}, TEXT), ANSWER | {"role": "model"}],
    "path_key": [user(IMAGE | {"path": "cat.png"}, TEXT), ANSWER],
    "url_key": [user(IMAGE | {"url": "cat.png"}, TEXT), ANSWER],
    "openai_part": [user({"type": "image_url", "image_url": {"url": "cat.png"}}, TEXT), ANSWER],
    "string_part": [user(IMAGE | {"image": "cat.png"}, "What is this?"), ANSWER],
    "parquet": {
        "messages": objects(
            {
                "role": "user",
                "content": objects(IMAGE | {"image": "cat.png", "text": None}, TEXT),
            },
            ANSWER,
        )
    },
    "images_beside": {"messages": [user(IMAGE, TEXT), ANSWER], "images": ["cat.png"]},
    "image_beside": {"messages": [user(IMAGE, TEXT), ANSWER], "image": "cat.png"},
    "image_beside_a_string": {
        "messages": [{"role": "user", "content": "What is this?"}, ANSWER],
        "image": "cat.png",
    },
    "sharegpt_mark": {
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A cat."},
        ],
        "image": "cat.png",
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "What is this?"},
            {"from": "gpt", "value": "A cat."},
        ],
        "images": ["cat.png"],
    },
    "prompt_and_completion": {
        "prompt": "What is this?",
        "completion": "A cat.",
        "images": ["cat.png"],
    },
    "prompt_and_completion_messages": {
        "prompt": [user(IMAGE, TEXT)],
        "completion": [ANSWER],
        "images": ["cat.png"],
    },
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_every_form_reads_the_same(row):
    read = read_conversation(row)
    assert read.messages == EXPECTED
    assert read.images == ["cat.png"]
    assert read.trained == [True]


def test_images_fill_their_parts_in_order():
    second = user(IMAGE, TEXT, IMAGE)
    read = read_conversation(
        {"messages": [user(IMAGE | {"image": "a"}, IMAGE), ANSWER, second], "images": list("bcd")}
    )
    assert read.images == ["a", "b", "c", "d"]


def test_array_image_is_one_image_and_not_a_list_of_rows():
    array = np.zeros((4, 5, 3), np.uint8)
    for key in ("image", "images"):
        read = read_conversation({"messages": [user(TEXT), ANSWER], key: array})
        assert len(read.images) == 1
        assert read.images[0] is array


def test_mark_of_an_image_is_text_where_no_image_is_given():
    read = read_conversation({"conversations": [{"from": "human", "value": "is <image> html?"}]})
    assert read.messages == [{"role": "user", "content": "is <image> html?"}]


def test_developer_is_system():
    read = read_conversation([{"role": "developer", "content": "Be brief."}, user(TEXT), ANSWER])
    assert read.messages[0]["role"] == "system"


def test_only_the_completion_is_trained():
    history = [user(TEXT), ANSWER, user(TEXT)]
    read = read_conversation({"prompt": history, "completion": [ANSWER]})
    assert read.trained == [False, True]
    assert read_conversation([*history, ANSWER]).trained == [True, True]


def test_prompt_leaves_the_completion_out():
    row = {"prompt": "Hi", "completion": "Hello"}
    assert [m["role"] for m in read_conversation(row, prompt_only=True).messages] == ["user"]


def test_row_is_not_changed_by_reading_it():
    row = {"messages": [user(TEXT), ANSWER], "images": ["cat.png"]}
    read_conversation(row)
    assert row == {"messages": [user(TEXT), ANSWER], "images": ["cat.png"]}


REFUSED = {
    "form": ("hello", "expected a list of messages, or an object .*, found str"),
    "keys": ({"text": "a"}, r"found an object with \['text'\]"),
    "empty": ([], "the conversation is empty"),
    "message": (["hello"], "message 0: expected an object .* found 'hello'"),
    "role": ([{"role": "boss", "content": "a"}], "message 0: there is no role 'boss'"),
    "no_role": ([{"content": "a"}], "message 0: there is no role None"),
    "no_content": ([{"role": "user"}], "message 0: expected its content .* found NoneType"),
    "number": ([{"role": "user", "content": 7}], "message 0: .* found int"),
    "part": ([user(7)], "message 0: expected each part to be an object, found 7"),
    "part_type": ([user({"type": "smell"})], "message 0: unknown part type 'smell'"),
    "text_part": ([user({"type": "text"})], "message 0: a text part needs a string"),
    "audio": ([user({"type": "audio", "audio": "a.wav"})], "message 0: 'audio' parts are not"),
    "video": ([user({"type": "video", "video": "a.mp4"})], "message 0: 'video' parts are not"),
    "empty_answer": ([user(TEXT), ANSWER | {"content": " \n"}], "message 1: .*turn is empty"),
    "empty_answer_parts": ([user(TEXT), ANSWER | {"content": []}], "message 1: .*turn is empty"),
    "no_image": ([user(IMAGE)], "an image part without an image; give it"),
    "too_few": ({"messages": [user(IMAGE, IMAGE)], "images": ["a"]}, "1 images .* have 2 image"),
    "too_many": ({"messages": [user(IMAGE)], "images": ["a", "b"]}, "2 images .* have 1 image"),
    "beside_inline": (
        {"messages": [user(IMAGE | {"image": "a"})], "images": ["b"]},
        "1 images .* have 0 image parts without",
    ),
    "nowhere": ({"messages": [ANSWER], "images": ["a"]}, "no user message to hold them"),
}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(row, message):
    with pytest.raises(ValueError, match=message):
        read_conversation(row)


def test_prompt_that_holds_its_answer_is_refused():
    with pytest.raises(ValueError, match="leave its last assistant message out"):
        read_conversation([user(TEXT), ANSWER], prompt_only=True)
