# SPDX-License-Identifier: Apache-2.0
"""Preferences in TRL's forms become the host's batches, or say what is wrong."""

import json
import logging

import numpy as np
import pytest
from PIL import Image
from tunix.sft.dpo import dpo_trainer

from tunix_gemma4.data.preferences import PreferenceBatches, collate, read_preference
from tunix_gemma4.data.processor import Processor

QUESTION = [{"role": "user", "content": "Which is larger?"}]
LENGTHS = {"max_prompt_length": 96, "max_response_length": 16}


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Processor.from_pretrained(tiny_checkpoint("demo"), max_soft_tokens=70)


def picture(seed, width=16, height=16):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def answer(text):
    return [{"role": "assistant", "content": text}]


def shown(image=None, text="What is it?"):
    part = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


def test_prompt_and_answers_are_the_pieces_of_the_whole_conversations(processor):
    row = {"prompt": QUESTION, "chosen": answer("nine"), "rejected": answer("one, I think")}
    read = read_preference(row, processor)
    prompt = processor.encode(QUESTION, add_generation_prompt=True)
    np.testing.assert_array_equal(read.prompt, prompt.tokens)
    assert read.images is None
    for side in ("chosen", "rejected"):
        whole = processor.encode(QUESTION + row[side]).tokens
        tokens = np.concatenate([read.prompt, getattr(read, side)])
        np.testing.assert_array_equal(tokens, whole[: len(tokens)])
        assert tokens[-1] in processor.stop_ids
        assert processor.decode(getattr(read, side)) == row[side][0]["content"]


@pytest.mark.parametrize("preset", ["31b", "12b"])
def test_a_template_that_opens_answers_with_an_empty_thought_keeps_it_in_the_prompt(
    tiny_checkpoint, preset
):
    processor = Processor.from_pretrained(tiny_checkpoint(preset), max_soft_tokens=70)
    row = {"prompt": QUESTION, "chosen": answer("nine"), "rejected": answer("one")}
    read = read_preference(row, processor)
    prompt = processor.encode(QUESTION, add_generation_prompt=True)
    np.testing.assert_array_equal(read.prompt, prompt.tokens)
    assert processor.decode(read.chosen) == "nine"


def test_a_thought_in_one_answer_alone_is_compared_with_an_empty_one(tiny_checkpoint):
    processor = Processor.from_pretrained(tiny_checkpoint("31b"))
    thought = [answer("nine")[0] | {"reasoning": "It has more strokes."}]
    empty = "<|channel>thought\n<channel|>"
    for chosen, rejected in ((thought, answer("one")), (answer("one"), thought)):
        row = {"prompt": QUESTION, "chosen": chosen, "rejected": rejected}
        read = read_preference(row, processor)
        assert processor.decode(read.prompt, skip_special_tokens=False).endswith("<|turn>model\n")
        said = {
            processor.decode(getattr(read, side), skip_special_tokens=False)
            for side in ("chosen", "rejected")
        }
        assert said == {
            f"{empty}one<turn|>",
            "<|channel>thought\nIt has more strokes.\n<channel|>nine<turn|>",
        }


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Which is larger?", "chosen": "nine", "rejected": "one"},
        {"chosen": QUESTION + answer("nine"), "rejected": QUESTION + answer("one")},
        {"prompt": QUESTION, "chosen": "nine", "rejected": answer("one")},
    ],
)
def test_every_form_gives_the_same_preference(processor, row):
    plain = {"prompt": QUESTION, "chosen": answer("nine"), "rejected": answer("one")}
    expected, read = read_preference(plain, processor), read_preference(row, processor)
    for name in ("prompt", "chosen", "rejected"):
        np.testing.assert_array_equal(getattr(read, name), getattr(expected, name))


def test_images_stand_in_their_parts_or_beside(processor):
    image = picture(0)
    answers = {"chosen": answer("red"), "rejected": answer("blue")}
    inside = read_preference({"prompt": shown(image), **answers}, processor)
    beside = read_preference({"prompt": shown(), "images": [image], **answers}, processor)
    whole = {
        side: shown(image) + answers[side] for side in answers
    }  # as TRL writes an implicit prompt
    implicit = read_preference(whole, processor)
    assert np.sum(inside.prompt == processor.image_token_id) == 64
    for read in (beside, implicit):
        np.testing.assert_array_equal(read.prompt, inside.prompt)
        np.testing.assert_array_equal(read.images, inside.images)


def test_a_batch_has_the_hosts_fields_prompts_left_padded_and_answers_right(processor):
    rows = [
        {"prompt": QUESTION, "chosen": "nine", "rejected": "one, I think"},
        {"prompt": shown(picture(1)), "chosen": "a red square", "rejected": "blue"},
    ]
    read = [read_preference(row, processor) for row in rows]
    batch = collate(read, processor, max_prompt_length=96, max_response_length=16)
    taken = dpo_trainer._preprocess_dict(batch)
    assert isinstance(taken, dpo_trainer.TrainingInput)
    assert batch["images"].shape[:2] == (2, 1)
    np.testing.assert_array_equal(batch["images"][1], read[1].images)
    assert (batch["images"][0, ..., -2:] == -1).all()
    for index, preference in enumerate(read):
        size = len(preference.prompt)
        np.testing.assert_array_equal(batch["prompt_ids"][index, -size:], preference.prompt)
        np.testing.assert_array_equal(batch["prompt_mask"][index], np.arange(96) >= 96 - size)
        for side in ("chosen", "rejected"):
            ids = getattr(preference, side)
            np.testing.assert_array_equal(batch[f"{side}_ids"][index, : len(ids)], ids)
            np.testing.assert_array_equal(batch[f"{side}_mask"][index], np.arange(16) < len(ids))
    text = collate(read[:1], processor, max_prompt_length=96, max_response_length=16)
    assert "images" not in text


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": QUESTION, "chosen": "a"}, r"expected 'prompt', 'chosen' and 'rejected'"),
        ("a row", "found str"),
        ({"chosen": "a", "rejected": "b"}, "'chosen': without 'prompt' it has to be a whole"),
        (
            {"prompt": QUESTION, "chosen": answer("a") * 3, "rejected": answer("b")},
            "'chosen': expected one assistant message, found 3",
        ),
        (
            {"prompt": QUESTION, "chosen": answer("a"), "rejected": QUESTION},
            "'rejected': there is no assistant message",
        ),
        ({"prompt": QUESTION, "chosen": "a", "rejected": "a"}, "the same answer"),
        (
            {
                "chosen": [{"role": "user", "content": "Which is smaller?"}] + answer("one"),
                "rejected": QUESTION + answer("nine"),
            },
            "answer two different prompts",
        ),
        (
            {
                "chosen": shown(picture(0)) + answer("one"),
                "rejected": shown(picture(1)) + answer("nine"),
            },
            "differ in their images",
        ),
        ({"prompt": shown(), "chosen": "a", "rejected": "b"}, "an image part without an image"),
    ],
)
def test_a_row_that_cannot_be_compared_says_why(processor, row, message):
    with pytest.raises(ValueError, match=message):
        read_preference(row, processor)


def rows_of(count, *, words=1):
    return [
        {"prompt": f"number {index}", "chosen": "yes " * words, "rejected": "no"}
        for index in range(count)
    ]


def test_rows_that_are_too_long_are_left_out_and_counted(processor, caplog):
    rows = rows_of(5) + rows_of(2, words=40)
    batches = PreferenceBatches(rows, processor, batch_size=2, epochs=2, **LENGTHS)
    with caplog.at_level(logging.WARNING):
        found = list(batches)
    assert batches.dropped == 2
    assert "2 of 7 rows are left out" in caplog.text
    # Five rows twice, in whole batches; each comes once per epoch.
    assert [len(batch["prompt_ids"]) for batch in found] == [2] * 5
    prompts = [row.tobytes() for batch in found for row in batch["prompt_ids"]]
    assert len(set(prompts[:5])) == 5 and sorted(prompts[:5]) == sorted(prompts[5:])
    again = [row.tobytes() for batch in batches for row in batch["prompt_ids"]]
    assert again == prompts
    other = PreferenceBatches(rows, processor, batch_size=2, epochs=2, seed=1, **LENGTHS)
    assert [row.tobytes() for batch in other for row in batch["prompt_ids"]] != prompts


def test_rows_that_fill_no_batch_are_said(processor, caplog):
    batches = PreferenceBatches(rows_of(5), processor, batch_size=4, **LENGTHS)
    with caplog.at_level(logging.WARNING):
        assert len(list(batches)) == 1
    assert "the last 1 of 5 rows (1 epochs) are left out" in caplog.text


def test_too_few_rows_that_fit_are_refused(processor):
    batches = PreferenceBatches(rows_of(3, words=40), processor, batch_size=2, **LENGTHS)
    with pytest.raises(ValueError, match="0 of its 3 rows are short enough"):
        list(batches)


def test_a_file_names_its_bad_row_and_finds_its_images(processor, tmp_path):
    picture(0).save(tmp_path / "a.png")
    good = {"prompt": shown("a.png"), "chosen": "red", "rejected": "blue"}
    implicit = {
        "chosen": shown("a.png") + answer("red"),
        "rejected": shown("a.png") + answer("blue"),
    }
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [good, implicit])))
    (batch,) = PreferenceBatches(file, processor, batch_size=2, **LENGTHS)
    np.testing.assert_array_equal(batch["images"][0], batch["images"][1])
    assert (batch["images"][0, ..., -1] >= 0).any()
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}))
    with pytest.raises(ValueError, match=r"row 0 of rows.jsonl: .*same answer"):
        list(PreferenceBatches(file, processor, batch_size=1, **LENGTHS))


def test_batches_without_an_end_go_on_past_an_epoch(processor):
    batches = PreferenceBatches(rows_of(3), processor, batch_size=2, epochs=None, **LENGTHS)
    found = [batch["prompt_ids"] for batch, _ in zip(batches, range(7), strict=False)]
    assert len(found) == 7
    assert len({row.tobytes() for batch in found for row in batch}) == 3


def test_image_slots_never_fall(processor):
    rows = [
        {"prompt": shown(picture(index)), "chosen": "red", "rejected": "blue"} for index in range(2)
    ] + rows_of(2)
    batches = PreferenceBatches(rows, processor, batch_size=1, epochs=3, **LENGTHS)
    slots = [batch["images"].shape[1] if "images" in batch else 0 for batch in batches]
    assert slots == sorted(slots) and slots[-4:] == [1] * 4
