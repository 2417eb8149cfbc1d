# SPDX-License-Identifier: Apache-2.0
"""One road for conversations, prompts and preferences: read once, checked first, never unnamed."""

import collections
import json
import logging

import numpy as np
import pytest
from test_data import (
    SHORT_ENOUGH,
    FakeProcessor,
    assert_same,
    dataset,
    mixed_rows,
    numbers,
    row,
    through_json,
)

from tunix_gemma4.data import (
    conversation as processor_conversation,
    make_dataset,
    sources as data_sources,
)
from tunix_gemma4.data.preferences import PreferenceBatches
from tunix_gemma4.data.processor import Example, Processor
from tunix_gemma4.data.prompts import PromptBatches, PromptRows
from tunix_gemma4.data.road import checked_rows
from tunix_gemma4.plugin.rl.prompts import PromptReader
from tunix_gemma4.recipes import grpo
from tunix_gemma4.settings.grpo import GrpoRunConfig, PromptConfig
from tunix_gemma4.settings.sft import RunConfig


@pytest.fixture(scope="module")
def processor(tiny_checkpoint):
    return Processor.from_pretrained(tiny_checkpoint("demo"), max_soft_tokens=70)


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


# ---- Once each.


class Counting:
    """A tokenizer that counts the rows it is given, by the number in their text."""

    def __init__(self, tokenizer, counts):
        self._tokenizer, self._counts = tokenizer, counts

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts, **options):
        self._counts[next(t for t in texts if "number" in t).split()[-1].strip(".")] += 1
        return self._tokenizer.encode_batch(texts, **options)


@pytest.fixture
def counts(processor, monkeypatch):
    """How often each row was parsed, read as a conversation, and tokenized."""
    found = {name: collections.Counter() for name in ("parsed", "read", "tokenized")}
    parse, read = data_sources.parse_json, processor_conversation.read_row

    def counting_parse(text, *args, **options):
        value = parse(text, *args, **options)
        found["parsed"][value["id"]] += 1
        return value

    def counting_read(given, *args, **options):
        found["read"][given["id"]] += 1
        return read(given, *args, **options)

    monkeypatch.setattr(data_sources, "parse_json", counting_parse)
    monkeypatch.setattr(processor_conversation, "read_row", counting_read)
    counter = Counting(processor._text_tokenizer, found["tokenized"])
    monkeypatch.setattr(processor, "_text_tokenizer", counter)
    return found


def test_each_row_is_parsed_read_and_tokenized_once(processor, counts, tmp_path):
    names = [str(index) for index in range(6)]
    asked = [{"id": n, "messages": [{"role": "user", "content": f"number {n}"}]} for n in names]
    answered = [{**one, "completion": "yes", "prompt": one["messages"]} for one in asked]
    for one in answered:
        del one["messages"]
    once = dict.fromkeys(names, 1)

    file = write(tmp_path / "sft.jsonl", answered)
    supervised = make_dataset(file, processor, batch_size=2, max_length=64, num_epochs=1)
    supervised.check()
    supervised.first()
    assert len(list(supervised)) == 3
    assert counts == {"parsed": once, "read": once, "tokenized": once}

    for counter in counts.values():
        counter.clear()
    rows = PromptRows(write(tmp_path / "rl.jsonl", asked), processor)
    rows.first()
    reader = PromptReader(processor.tokenizer.encode, lambda: processor, 512)
    taken = [reader.read(batch) for batch in PromptBatches(rows, 2, seed=0, limit=6)]
    assert sorted(cell.given for batch in taken for cell in batch["id"]) == names
    assert counts == {"parsed": once, "read": once, "tokenized": once}

    for counter in counts.values():
        counter.clear()
    pairs = [{**one, "chosen": "yes", "rejected": "no"} for one in answered]
    for one in pairs:
        del one["completion"]
    lengths = {"max_prompt_length": 64, "max_response_length": 8}
    file = write(tmp_path / "dpo.jsonl", pairs)
    assert len(list(PreferenceBatches(file, processor, batch_size=2, **lengths))) == 3
    # Each of the two conversations of a row.
    twice = dict.fromkeys(names, 2)
    assert counts == {"parsed": once, "read": twice, "tokenized": twice}


# ---- No exception without its row.


class Raising(FakeProcessor):
    def __init__(self, error):
        super().__init__()
        self._error = error

    def encode(self, conversation):
        if "666" in str(conversation):
            raise self._error
        return super().encode(conversation)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    "error",
    [StopIteration(), KeyError("url"), RecursionError("deep"), OSError(36, "File name too long")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_any_type_names_file_and_row_and_ends_no_epoch(error, prefetch, tmp_path):
    rows = [row(0), row(1), row(666), row(3)]
    file = write(tmp_path / "rows.jsonl", rows)
    options = {"batch_size": 1, "shuffle": False, "prefetch": prefetch}
    batches = iter(dataset(file, Raising(error), **options))
    with pytest.raises(ValueError, match=f"row 2 of rows.jsonl: {type(error).__name__}"):
        list(batches)
    skipping = iter(dataset(file, Raising(error), skip_bad_rows=True, **options))
    assert numbers(list(skipping)) == [0, 1, 3]
    assert (skipping.seen, skipping.dropped, skipping.bad) == (4, 0, 1)


def asking(content):
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    }


DEEP = "x"
for _ in range(300):
    DEEP = [DEEP]
BROKEN = {
    "surrogate": (asking("a\ud800"), r"messages\[0\].content: character 1 is half of a surrogate"),
    "role": (asking("a") | {"messages": [{"role": ["user"], "content": "a"}]}, ""),
    "url": (asking([{"type": "image_url", "image_url": {}}]), ""),
    "name": (asking([{"type": "image", "image": "n" * 300}]), "image"),
    "deep": (asking("a") | {"images": DEEP}, "images: expected at most 64 levels"),
}


def test_a_column_that_is_not_trained_on_may_hold_what_no_tokenizer_takes(processor, tmp_path):
    file = write(tmp_path / "rows.jsonl", [asking("fine") | {"source": "\ud800"}])
    assert len(list(make_dataset(file, processor, batch_size=1, max_length=64, num_epochs=1))) == 1


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_row_is_named_on_every_road(processor, tmp_path, name):
    bad, message = BROKEN[name]
    file = write(tmp_path / "rows.jsonl", [asking("fine"), bad])
    match = rf"(?s)row 1 of rows.jsonl: .*{message}"
    with pytest.raises(ValueError, match=match):
        list(make_dataset(file, processor, batch_size=1, max_length=600, num_epochs=1))
    with pytest.raises(ValueError, match=match):
        PromptRows(file, processor)
    pairs = [
        {"prompt": one["messages"][:1], "chosen": "yes", "rejected": "no"}
        | {key: one[key] for key in one if key == "images"}
        for one in (asking("fine"), bad)
    ]
    message = message.replace(r"messages\[0\]", r"prompt\[0\]")
    match = rf"(?s)row 1 of rows.jsonl: .*{message}"
    with pytest.raises(ValueError, match=match):
        lengths = {"max_prompt_length": 600, "max_response_length": 8}
        list(PreferenceBatches(write(file, pairs), processor, batch_size=1, **lengths))


# ---- Checked before the first step.


def bad_rows(count=23):
    """`mixed_rows` of which rows 5 and 20 cannot be read."""
    rows = mixed_rows(count)
    rows[5], rows[20] = row(666), {"text": "no conversation"}
    return rows


def test_a_check_names_every_bad_row_or_counts_them(tmp_path):
    with pytest.raises(
        ValueError, match=r"(?s)row 5 of .*cannot be decoded\nOf .* 1 more .*: 20\. .*sk"
    ):
        dataset(bad_rows()).check()
    lines = []
    data = dataset(bad_rows(), skip_bad_rows=True)
    checked = data.check(log=lines.append)
    assert (checked.rows, checked.examined, checked.examples) == (23, 23, 18)
    assert sorted(checked.bad) == [5, 20] and checked.long == [(4, 0), (13, 0), (22, 0)]
    text = "\n".join(lines)
    assert "23 rows, all checked: 18 to train on" in text
    assert "lengths at 50/95/100 %: " in text
    assert "left out: 3 longer than max_length=150" in text
    assert "left out: 2 that cannot be read, the first: row 5 of the given sequence" in text
    kept = [n for n in SHORT_ENOUGH if n not in (5, 20)]
    assert sorted(numbers(list(data))) == kept
    assert data.left_out.startswith("2 of 23 rows cannot be read and are left out, the first")


def test_a_check_of_some_rows_reads_them_alone_and_looks_at_every_image(tmp_path):
    rows = [row(i, 10 + i) for i in range(9)]
    processor = FakeProcessor()
    checked = dataset(rows, processor).check(3)
    assert sorted(processor.encoded) == [0, 4, 8]
    assert (checked.examined, checked.examples) == (3, 9)
    rows[6] = asking([{"type": "image", "image": str(tmp_path / "none.png")}])
    with pytest.raises(ValueError, match="row 6 .*image 0: there is no file .*none.png"):
        dataset(rows, processor).check(3)
    assert dataset(rows, processor).check(False).examined == 0
    with pytest.raises(ValueError, match=r"data.check: expected all, a number of rows or false"):
        dataset(rows, processor).check(0)


def test_a_result_is_kept_until_data_or_settings_change(tmp_path):
    file = write(tmp_path / "rows.jsonl", [row(i, 10) for i in range(5)])
    cache = tmp_path / "kept" / "check.json"
    first = dataset(file).check(cache=cache, key="a")
    processor = FakeProcessor()
    again = dataset(file, processor)
    assert again.check(cache=cache, key="a") == first and not processor.encoded
    assert again.steps_per_epoch() == 3
    assert dataset(file, processor).check(cache=cache, key="b") and len(processor.encoded) == 5
    write(file, [row(i, 10) for i in range(6)])
    assert dataset(file).check(cache=cache, key="b").rows == 6
    cache.write_text(cache.read_text()[:20])
    assert dataset(file).check(cache=cache, key="b").rows == 6


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_steps_are_planned_from_what_is_trained_on(batch_size, steps, seed):
    options = {"batch_size": batch_size, "gradient_accumulation_steps": steps, "seed": seed}
    data = dataset(bad_rows(), skip_bad_rows=True, num_epochs=2, **options)
    assert data.steps_per_epoch() is None
    data.check()
    assert len(list(data)) == 2 * steps * data.steps_per_epoch()


def test_the_schedule_ends_with_the_steps_of_the_check():
    config = RunConfig(max_steps=None, num_train_epochs=3, batch_size=4)
    assert config.total_steps(20, 2) == 6 and config.total_steps(20) == 15


def test_a_check_names_what_is_not_trained_on(processor, tmp_path):
    thought = {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    messages = [*asking("a")["messages"][:1], thought, *asking("b")["messages"]]
    rows = [{"messages": messages, "id": 1}, asking("c") | {"source": "web"}]
    lines = []
    cache = tmp_path / "check.json"
    file = write(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        lines.clear()
        data = make_dataset(file, processor, batch_size=1, max_length=64)
        data.check(log=lines.append, cache=cache)
        text = "\n".join(lines)
        assert "left out, as when the model is asked: 1 earlier thoughts" in text
        assert "columns that are not trained on: id, source" in text


# ---- A row is taken out after a checkpoint was written.


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["sequence", "jsonl"])
def test_a_row_that_was_not_reached_may_be_taken_out_or_corrected(tmp_path, kind, shuffle):
    file = tmp_path / "rows.jsonl"
    source = (lambda rows: rows) if kind == "sequence" else (lambda rows: write(file, rows))
    options = {"batch_size": 2, "shuffle": shuffle, "seed": 3}
    rows = [row(i, 10) for i in range(12)]
    whole = numbers(list(dataset(source(rows), **options)))
    iterator = iter(dataset(source(rows), **options))
    before = numbers([next(iterator), next(iterator)])
    state, gone = through_json(iterator.get_state()), whole[-3]
    left = [one for i, one in enumerate(rows) if i != gone]

    resumed = iter(dataset(source(left), **options))
    resumed.set_state(state)
    first = numbers([next(resumed)])
    again = iter(dataset(source(left), **options))
    again.set_state(through_json(resumed.get_state()))
    expected = [n for n in whole if n != gone]
    assert before + first + numbers(list(again)) == expected

    corrected = list(rows)
    corrected[gone] = row(99, 10)
    resumed = iter(dataset(source(corrected), **options))
    resumed.set_state(state)
    expected = [99 if n == gone else n for n in whole]
    assert before + numbers(list(resumed)) == expected

    reached = [one for i, one in enumerate(rows) if i != before[0]]
    with pytest.raises(ValueError, match=rf"row {before[0]}\. Put them back .*skip_bad_rows"):
        iter(dataset(source(reached), **options)).set_state(state)
    with pytest.raises(ValueError, match="it has 13 rows and .* knew 12; row 12 is new"):
        iter(dataset(source([*rows, row(13)]), **options)).set_state(state)


class Twice(FakeProcessor):
    """Makes two examples of a row, the second longer and numbered from 100."""

    def encode_all(self, read):
        number, length = map(int, read.messages[0]["content"][-1]["text"].split())
        examples = []
        for first, size in ((number, length), (number + 100, length + 60)):
            tokens = np.full(size, 7, np.int32)
            tokens[0] = first + 1000
            examples.append(Example(tokens, np.ones(size, np.int32), None))
        return examples


def test_a_position_counts_rows_that_make_several_examples():
    rows = [row(i, 10 + 20 * i) for i in range(6)]
    options = {"batch_size": 4, "gradient_accumulation_steps": 2, "num_epochs": 2}
    data = dataset(rows, Twice(), **options)
    assert data.check().examples == 11
    iterator = iter(data)
    states, batches = [through_json(iterator.get_state())], []
    for batch in iterator:
        batches.append(batch)
        states.append(through_json(iterator.get_state()))
    # The second of the last row has 170 tokens.
    kept = [0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104]
    assert sorted(numbers(batches)) == sorted(kept * 2)
    assert len(batches) == 2 * 2 * data.steps_per_epoch()
    assert (iterator.seen, iterator.dropped) == (12, 2)
    for place, state in enumerate(states):
        restored = iter(dataset(rows, Twice(), **options))
        restored.set_state(state)
        assert_same(list(restored), batches[place:])


# ---- Prompts and preferences.


def test_prompts_that_are_not_checked_are_read_in_their_turn(processor, tmp_path, caplog):
    rows = [{"prompt": f"number {i}" if i % 3 else "word " * 90, "n": i} for i in range(9)]
    file = write(tmp_path / "rows.jsonl", rows)
    unchecked = {"max_prompt_length": 40, "check": False}
    found = {
        check: PromptRows(file, processor, max_prompt_length=40, check=check)
        for check in (None, 4, False)
    }
    assert [len(rows) for rows in found.values()] == [6, 4, 9]  # Of some rows an estimate.
    orders = []
    with caplog.at_level(logging.WARNING, logger="absl"):
        for rows in found.values():
            assert rows.columns == ("n",)
            orders.append(
                np.ravel([b["n"] for b in PromptBatches(rows, 2, seed=1, limit=12)]).tolist()
            )
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == sorted([1, 2, 4, 5, 7, 8] * 2)
    assert "3 of 9 prompts are left out" in caplog.text
    rest = PromptBatches(PromptRows(file, processor, **unchecked), 2, seed=1, start=4, limit=12)
    assert np.ravel([b["n"] for b in rest]).tolist() == orders[0][4:]


def test_a_position_of_preferences_is_restored(processor):
    rows = [{"prompt": f"number {i}", "chosen": "yes", "rejected": "no"} for i in range(5)]
    rows[2]["rejected"] = "yes"
    lengths = {"max_prompt_length": 64, "max_response_length": 8}
    options = {"batch_size": 2, "epochs": 3, "skip_bad_rows": True, **lengths}
    batches = PreferenceBatches(rows, processor, **options)
    iterator = iter(batches)
    next(iterator)
    state = through_json(iterator.get_state())
    rest = [batch["prompt_ids"] for batch in iterator]
    assert len(rest) == 5 and "1 of 5 rows cannot be read" in batches.left_out
    restored = iter(PreferenceBatches(rows, processor, **options))
    restored.set_state(state)
    np.testing.assert_array_equal([batch["prompt_ids"] for batch in restored], rest)


def test_prompts_that_were_not_reached_may_be_taken_out(processor, tmp_path):
    rows = [{"prompt": f"number {i}", "n": i} for i in range(8)]
    file, cache = write(tmp_path / "rows.jsonl", rows), tmp_path / "check.json"
    found = PromptRows(file, processor, cache=cache)
    order = np.ravel([b["n"] for b in PromptBatches(found, 2, seed=1, limit=8)]).tolist()

    def goes_on_without(*numbers):
        left = [one for one in rows if one["n"] not in numbers]
        before = checked_rows(cache)
        found = PromptRows(write(file, left), processor, cache=cache, key="later", before=before)
        batches = PromptBatches(found, 2, seed=1, start=4, limit=8)
        found.refuse_changed(batches, "checkpoints")
        return np.ravel([batch["n"] for batch in batches]).tolist()

    rest = goes_on_without(order[5])
    assert rest[:3] == [order[4], *order[6:]] and len(rest) == 4
    assert goes_on_without(order[5]) == rest
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"checkpoints: 1 of .* row {order[2]}\. Put them b"):
            goes_on_without(order[5], order[2])
    write(file, [*rows, rows[0]])
    with pytest.raises(ValueError, match="it has 9 rows and the run of the checkpoints knew 8"):
        PromptRows(file, processor, before=checked_rows(cache))


def test_checkpoints_of_an_earlier_order_are_refused(processor, tmp_path):
    rows = [{"prompt": "hi"}, {"prompt": "word " * 90}]
    file = write(tmp_path / "rows.jsonl", rows)
    config = GrpoRunConfig(data=PromptConfig(path=str(file), max_prompt_length=40))
    found = PromptRows(file, processor, max_prompt_length=40)
    with pytest.raises(ValueError, match="an earlier version of this package"):
        grpo.refuse_older(config, found, tmp_path)
    config.data.shuffle = False
    grpo.refuse_older(config, found, tmp_path)
