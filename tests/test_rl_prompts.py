# SPDX-License-Identifier: Apache-2.0
"""Batches of prompts and images in any form become one row per prompt, or are refused."""

import io

import numpy as np
import pytest
from rl_setup import draw_picture, question

from tunix_gemma4.data.processor import Processor
from tunix_gemma4.data.prompts import Prompt
from tunix_gemma4.plugin.rl.prompts import Cell, PromptReader, unwrap


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Processor.from_pretrained(tiny_checkpoint("demo"), max_soft_tokens=70)


@pytest.fixture
def reader(processor):
    return PromptReader(processor.tokenizer.encode, lambda: processor, max_prompt_length=150)


PICTURES = [draw_picture(seed) for seed in (1, 2)]
PIXELS = [np.asarray(picture) for picture in PICTURES]


def as_bytes(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def objects(*cells):
    result = np.empty(len(cells), object)
    result[:] = cells
    return result


@pytest.fixture
def forms(tmp_path):
    """Columns that all hold the same two pictures, one for each row."""
    paths = []
    for number, picture in enumerate(PICTURES):
        paths.append(str(tmp_path / f"{number}.png"))
        picture.save(paths[-1])
    return {
        "pictures": PICTURES,
        "lists of pictures": [[PICTURES[0]], [PICTURES[1]]],
        "an array of pictures": objects(*PICTURES),
        "paths": paths,
        "an array of paths": np.array(paths),
        "bytes": [as_bytes(picture) for picture in PICTURES],
        "dictionaries of bytes": [{"bytes": as_bytes(picture)} for picture in PICTURES],
        "one array": np.stack(PIXELS),
        "arrays": PIXELS,
        "an array of lists of arrays": objects([PIXELS[0]], [PIXELS[1]]),
        "one array with an axis of images": np.stack(PIXELS)[:, None],
    }


FORMS = (
    *("pictures", "lists of pictures", "an array of pictures", "paths", "an array of paths"),
    *("bytes", "dictionaries of bytes", "one array", "arrays", "an array of lists of arrays"),
    "one array with an axis of images",
)


@pytest.mark.parametrize("name", ["images", "image"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_each_row_its_own_picture(reader, processor, forms, form, name):
    expected = [
        processor.encode(
            {"messages": question("what", 1), "images": [picture]}, add_generation_prompt=True
        )
        for picture in PICTURES
    ]
    read = reader.read({"prompts": [question("what", 1)] * 2, name: forms[form]})
    assert not np.array_equal(expected[0].images, expected[1].images)
    for prompt, example in zip(read["prompts"], expected, strict=True):
        np.testing.assert_array_equal(prompt.example.tokens, example.tokens)
        np.testing.assert_array_equal(prompt.example.images, example.images)


def test_the_hosts_transport_leaves_rows_whole(reader, forms):
    """As the host repeats, cuts into micro-batches and merges columns."""
    read = reader.read({"prompts": [question("what", 1)] * 2, "images": forms["one array"]})
    repeated = {name: np.repeat(cells, 3, axis=0) for name, cells in read.items()}
    flattened = {name: list(cells.flatten()) for name, cells in repeated.items()}
    halves = [
        {name: np.array(cells[i : i + 3]) for name, cells in flattened.items()} for i in (0, 3)
    ]
    merged = {name: np.concatenate([np.atleast_1d(half[name]) for half in halves]) for name in read}
    assert all(cells.shape == (6,) for cells in merged.values())
    assert all(isinstance(cell, Prompt) for cell in merged["prompts"])
    assert all(isinstance(cell, Cell) for cell in merged["images"])
    for row, given in enumerate(unwrap(merged["images"])):
        np.testing.assert_array_equal(given, PIXELS[row // 3])


def test_rows_of_no_one_and_several_images_mix(reader):
    read = reader.read(
        {
            "prompts": [question("none"), question("one", 1), question("two", 2)],
            "images": [None, PICTURES[0], PICTURES],
        }
    )
    counts = [
        0 if prompt.example.images is None else len(prompt.example.images)
        for prompt in read["prompts"]
    ]
    assert counts == [0, 1, 2]


def test_a_templated_string_holds_its_images_where_it_says(reader, processor):
    text = "<bos><|turn>user\nwhat <|image|>?<turn|>\n<|turn>model\n"
    read = reader.read({"prompts": [text], "images": [PICTURES[0]]})
    tokens = read["prompts"][0].example.tokens.tolist()
    soft = [i for i, token in enumerate(tokens) if token == processor.image_token_id]
    assert tokens[soft[0] - 1] == processor.boi_token_id
    assert tokens[soft[-1] + 1] == processor.eoi_token_id
    assert soft == list(range(soft[0], soft[-1] + 1)) and len(soft) > 40
    without = [t for i, t in enumerate(tokens) if not soft[0] - 1 <= i <= soft[-1] + 1]
    plain = processor.tokenizer.encode(text.replace("<|image|>", ""), add_special_tokens=False)
    assert processor.decode(without) == processor.decode(plain)
    assert tokens.count(processor.tokenizer.bos_token_id) == 1


def test_columns_come_back_as_they_were_given(reader):
    given = {"answer": ["a", None], "bounds": [[1, 2], [3]], "weight": np.array([0.5, 2.0])}
    read = reader.read({"prompts": ["one", "two"], **given})
    assert unwrap(read["prompts"]) == ["one", "two"]
    assert unwrap(read["answer"]) == ["a", None]
    assert unwrap(read["bounds"]) == [[1, 2], [3]]
    assert unwrap(read["weight"]) == [0.5, 2.0]


def test_columns_that_say_something_of_the_prompt_are_read(processor, reader):
    tool = {"name": "lookup", "parameters": {"type": "object"}}
    batch = {
        "prompts": [question("what")],
        "system": ["Be brief."],
        "tools": [[tool]],
        "enable_thinking": [True],
        "label": [3],
    }
    read = reader.read(batch)
    row = {name: cells[0] for name, cells in batch.items()} | {"messages": question("what")}
    expected = processor.encode(row, add_generation_prompt=True)
    np.testing.assert_array_equal(read["prompts"][0].example.tokens, expected.tokens)
    assert unwrap(read["tools"]) == [[tool]]
    judged = {"prompts": [question("what")], "label": [True]}
    with pytest.raises(ValueError, match="prompt 1: 'label' is feedback"):
        reader.read(judged)
    asked = PromptReader(None, lambda: processor, max_prompt_length=150, names={"label"})
    assert unwrap(asked.read(judged)["label"]) == [True]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"prompt": ["a"]}, "needs the column 'prompts'"),
        ({"prompts": "one"}, "one value per row"),
        ({"prompts": ["a", "b"], "answer": ["c"]}, "differ in their number of rows"),
        ({"prompts": ["what"], "images": [PICTURES[0]]}, "0 times <|image|> and 1 images"),
        ({"prompts": [question("x", 2)], "images": [PICTURES[0]]}, "prompt 0: .*1 images .* 2"),
        ({"prompts": [question("x", 1)], "images": ["/no/such.png"]}, "prompt 0: image 0: .*such"),
        ({"prompts": [question("x", 3)], "images": [PICTURES + PICTURES[:1]]}, "max_prompt_length"),
        ({"prompts": [question("x", 1)], "images": [3]}, "prompt 0: image 0"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(reader, batch, message):
    with pytest.raises(ValueError, match=message):
        reader.read(batch)
