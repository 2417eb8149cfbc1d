# SPDX-License-Identifier: Apache-2.0
"""Rows of a file to batches of prompts: forms, columns, lengths, order, resumption."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from tunix_gemma4.data.processor import Processor
from tunix_gemma4.data.prompts import PromptBatches, PromptRows


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Processor.from_pretrained(tiny_checkpoint("demo"), max_soft_tokens=70)


@pytest.fixture
def read(processor, tmp_path):
    """`read(rows, **settings)`: the prompts of a file of these rows."""

    def read(rows, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return PromptRows(path, processor, **settings)

    return read


def user(content):
    return {"role": "user", "content": content}


def test_prompt_is_a_string_or_messages_and_columns_come_along(read):
    rows = read([{"prompt": "hi", "answer": "1"}, {"prompt": [user("ho")], "level": 2}])
    assert rows[0] == {"prompts": [user("hi")], "answer": "1", "level": None}
    assert rows[1] == {"prompts": [user("ho")], "answer": None, "level": 2}


def test_last_answer_of_messages_becomes_a_column(read):
    said = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    rows = read(
        [
            {"messages": [user("a"), said, user("b"), said]},
            {"messages": [user("c")], "answer": "own"},
            {"messages": [user("d"), said], "answer": "own"},
            {"conversations": [{"from": "human", "value": "e"}, {"from": "gpt", "value": "no"}]},
        ]
    )
    assert [message["role"] for message in rows[0]["prompts"]] == ["user", "assistant", "user"]
    assert [rows[index]["answer"] for index in range(4)] == ["yes", "own", "own", "no"]
    assert rows[3]["prompts"] == [user("e")]


def test_prompt_column_and_system_prompt_are_used(read):
    own = [{"role": "system", "content": "be long"}, user("what?")]
    rows = read(
        [{"question": "how?", "prompt": "not this"}, {"question": own}],
        prompt_column="question",
        system_prompt="be short",
    )
    assert rows[0]["prompts"] == [{"role": "system", "content": "be short"}, user("how?")]
    assert rows[1]["prompts"] == own
    assert (rows.columns, rows[0]["prompt"]) == (("prompt",), "not this")


def test_images_become_a_column_of_lists_with_paths_below_the_file(read, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    parts = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "what?"}]
    rows = read([{"messages": [user(parts)]}, {"prompt": "hi"}, {"prompt": "ho", "image": "x.png"}])
    path = str(tmp_path / "x.png")
    assert [rows[index]["images"] for index in range(3)] == [[path], [], [path]]
    shown = [{"type": "image"}, {"type": "text", "text": "what?"}]
    assert rows[0]["prompts"] == [user(shown)]


def test_long_prompts_are_dropped_and_counted(read, processor, tmp_path):
    rows = [{"prompt": "word " * count} for count in (1, 40, 2, 50)]
    found = read(rows, max_prompt_length=30)
    assert (len(found), found.dropped, found.kept) == (2, 2, [0, 2])
    with pytest.raises(ValueError, match=r"each of its 4 prompts is longer .*=3; the shortest has"):
        read(rows, max_prompt_length=3)


def test_images_count_with_their_own_size_where_it_matters(read, processor, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "small.png")
    row = {"prompt": "what?", "image": "small.png"}
    most = 200
    whole = len(
        processor.encode(
            row | {"image": str(tmp_path / "small.png")}, add_generation_prompt=True
        ).tokens
    )
    assert whole < most
    assert len(read([row], max_prompt_length=most)) == 1
    assert len(read([row], max_prompt_length=whole)) == 1
    with pytest.raises(ValueError, match=f"the shortest has {whole} tokens"):
        read([row], max_prompt_length=whole - 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " ", "images": []}, "row 1 of rows.jsonl: 'prompt' is empty"),
        ({"question": "hi"}, "row 1 of rows.jsonl: expected 'prompt' or 'messages', .* question"),
        ({"prompt": "hi", "rewards": 1}, "row 1 .*the column 'rewards' has a name that"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "row 1 .*conversation is empty"),
    ],
)
def test_row_that_is_no_prompt_is_named(read, row, message):
    with pytest.raises(ValueError, match=message):
        read([{"prompt": "hi"}, row])


def test_a_prompt_column_of_no_row_is_named_once(read):
    with pytest.raises(ValueError, match="no row of rows.jsonl has the column 'asked'; .*: q, a$"):
        read([{"q": "hi", "a": 1}] * 3, prompt_column="asked", skip_bad_rows=True)


def taken(batches, count):
    return [batch["n"] for batch in itertools.islice(batches, count)]


@pytest.fixture
def ten(read):
    return read([{"prompt": "hi", "n": index} for index in range(10)])


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(ten):
    numbers = np.ravel(taken(PromptBatches(ten, 5, seed=3), 4))
    first, second = numbers[:10], numbers[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert numbers.tolist() == np.ravel(taken(PromptBatches(ten, 5, seed=3), 4)).tolist()
    assert numbers.tolist() != np.ravel(taken(PromptBatches(ten, 5, seed=4), 4)).tolist()


def test_without_a_seed_the_order_is_that_of_the_file(ten):
    assert taken(PromptBatches(ten, 4, seed=None, limit=8), 9) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_resumed_run_sees_what_the_other_would_have_seen(ten):
    """With two optimizer steps per batch the host skips twice as many rows as were used."""
    whole = taken(PromptBatches(ten, 4, seed=0), 5)
    resumed = PromptBatches(ten, 4, seed=0, skipped=16, start=8)
    assert taken(resumed, 4) == [[None] * 4] * 4
    assert taken(resumed, 7)[4:] == whole[2:]
