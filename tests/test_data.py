# SPDX-License-Identifier: Apache-2.0
"""The input pipeline, mostly with a processor small enough to know every token by heart."""

import collections
import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tunix_gemma4.data import make_dataset
from tunix_gemma4.data.conversation import read_conversation
from tunix_gemma4.data.processor import Batch, Example
from tunix_gemma4.data.sources import Rows

PATCHES, PATCH_DIM = 4, 5
PIXEL = np.zeros((2, 2), np.uint8)


class FakeProcessor:
    """The user's text says "number length"; the answer's length is the supervised tokens.

    A row is [number + 1000, 7, 7, ..., 7] and its images are filled with its number.
    """

    def __init__(self):
        self.encoded = collections.Counter()
        self.threads = set()
        self.given = {}

    def encode(self, conversation):
        read = read_conversation(conversation)
        user, assistant = read.messages
        number, length = map(int, user["content"][-1]["text"].split())
        if number == 666:
            raise ValueError("this image cannot be decoded")
        self.encoded[number] += 1
        self.given[number] = read.images
        self.threads.add(threading.current_thread().name)
        tokens = np.full(length, 7, np.int32)
        tokens[0] = number + 1000
        loss_mask = np.zeros(length, np.int32)
        loss_mask[length - len(assistant["content"][0]["text"]) :] = 1
        images = len(read.images)
        pixels = np.full((images, PATCHES, PATCH_DIM), number, np.float32)
        return Example(tokens=tokens, loss_mask=loss_mask, images=pixels if images else None)

    def collate(self, examples, *, length, images, side="right"):
        shape = (len(examples), length)
        tokens, loss_mask, padding_mask = (np.zeros(shape, np.int32) for _ in range(3))
        pixels = np.full((len(examples), images, PATCHES, PATCH_DIM), -1, np.float32)
        for i, example in enumerate(examples):
            size = len(example.tokens)
            assert size <= length
            tokens[i, :size], loss_mask[i, :size] = example.tokens, example.loss_mask
            padding_mask[i, :size] = 1
            if example.images is not None:
                pixels[i, : len(example.images)] = example.images
        return Batch(
            tokens=tokens,
            loss_mask=loss_mask,
            padding_mask=padding_mask,
            images=pixels if images else None,
            loss_denominator=None,
        )


def row(number, length=10, images=0, supervised=3):
    parts = [{"type": "image", "image": PIXEL}] * images
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": f"{number} {length}"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "x" * supervised}]},
        ]
    }


def mixed_rows(count=23):
    """Lengths 5 to 150, 0 to 3 images, 1 to 4 supervised tokens, every ninth row too long."""
    rows = []
    for i in range(count):
        length = 300 if i % 9 == 4 else 5 + (i * 37) % 146
        rows.append(row(i, length, images=(i * 7) % 5 % 4, supervised=1 + i % 4))
    return rows


SHORT_ENOUGH = [i for i in range(23) if i % 9 != 4]


def dataset(rows, processor=None, **options):
    defaults = {"batch_size": 2, "max_length": 150, "num_epochs": 1, "prefetch": 0}
    return make_dataset(rows, processor or FakeProcessor(), **{**defaults, **options})


def numbers(batches):
    """The rows of the batches, in order; empty rows left out."""
    return [int(n) - 1000 for batch in batches for n in batch.tokens[:, 0] if n]


def shapes(batches):
    return [
        (batch.tokens.shape, None if batch.images is None else batch.images.shape)
        for batch in batches
    ]


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert shapes(found) == shapes(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
        np.testing.assert_array_equal(a.padding_mask, b.padding_mask)
        np.testing.assert_array_equal(a.loss_denominator, b.loss_denominator)
        if a.images is not None:
            np.testing.assert_array_equal(a.images, b.images)


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_each_row_comes_exactly_once_per_epoch(batch_size, steps, prefetch):
    data = dataset(
        mixed_rows(),
        batch_size=batch_size,
        gradient_accumulation_steps=steps,
        num_epochs=3,
        prefetch=prefetch,
    )
    iterator = iter(data)
    found, epochs = [], []
    for batch in iterator:
        found += numbers([batch])
        if len(found) == len(SHORT_ENOUGH):
            epochs.append(found)
            found = []
    assert [sorted(epoch) for epoch in epochs] == [SHORT_ENOUGH] * 3
    assert not found


def test_an_epoch_is_shuffled_by_seed_and_each_epoch_anew():
    rows = [row(i) for i in range(16)]

    def epochs(seed):
        found = numbers(dataset(rows, seed=seed, num_epochs=2))
        return found[:16], found[16:]

    first, second = epochs(seed=1)
    assert epochs(seed=1) == (first, second)
    assert sorted(first) == sorted(second) == list(range(16))
    assert len({tuple(order) for order in (first, second, *epochs(seed=2), range(16))}) == 5


def test_num_epochs_none_goes_on_without_end():
    iterator = iter(dataset([row(i) for i in range(4)], num_epochs=None))
    found = numbers([next(iterator) for _ in range(20)])
    assert collections.Counter(found) == dict.fromkeys(range(4), 10)


def test_an_evaluation_dataset_is_in_order_finite_and_the_same_each_time():
    data = dataset([row(i) for i in range(5)], shuffle=False)
    first, second = list(data), list(data)
    assert numbers(first) == [0, 1, 2, 3, 4]
    assert_same(first, second)
    assert shapes(first) == [((2, 64), None)] * 3


def test_the_smallest_bucket_that_holds_a_row_is_taken():
    rows = [row(0, 64), row(1, 65), row(2, 150, images=1), row(3, 5, images=3), row(4, 128)]
    batches = list(dataset(rows, batch_size=1, shuffle=False))
    assert numbers(batches) == [0, 1, 2, 3, 4]
    image = (PATCHES, PATCH_DIM)
    assert shapes(batches) == [
        ((1, 64), None),
        ((1, 128), None),
        ((1, 150), (1, 1, *image)),
        ((1, 64), (1, 4, *image)),
        ((1, 128), None),
    ]
    assert [int(batch.padding_mask.sum()) for batch in batches] == [64, 65, 150, 5, 128]


def test_the_caller_may_choose_the_buckets():
    rows = [row(0, 10), row(1, 21), row(2, 40, images=1)]
    batches = list(
        dataset(
            rows,
            batch_size=1,
            shuffle=False,
            max_length=40,
            bucket_lengths=(48, 20),
            image_buckets=(3,),
        )
    )
    assert [batch.tokens.shape[1] for batch in batches] == [20, 48, 48]
    assert {batch.images.shape[1] for batch in batches} == {3}


def test_leftover_rows_fill_what_is_free_in_larger_leftover_buckets():
    rows = [row(0, 10), row(1, 100), row(2, 100, images=1), row(3, 10, images=2), row(4, 12)]
    batches = list(dataset(rows, batch_size=3, shuffle=False))
    assert shapes(batches) == [
        ((3, 128), (3, 1, PATCHES, PATCH_DIM)),
        ((3, 64), (3, 2, PATCHES, PATCH_DIM)),
    ]
    assert [numbers([batch]) for batch in batches] == [[2, 1, 0], [3, 4]]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_each_step_is_whole_and_normalised_by_its_own_supervised_tokens(steps):
    batches = list(dataset(mixed_rows(), gradient_accumulation_steps=steps, num_epochs=2))
    assert len(batches) % steps == 0
    for start in range(0, len(batches), steps):
        step = batches[start : start + steps]
        supervised = sum(int(batch.loss_mask.sum()) for batch in step)
        for batch in step:
            assert batch.loss_denominator.dtype == np.float32
            np.testing.assert_array_equal(
                batch.loss_denominator, np.full(2, supervised / steps, np.float32)
            )


def test_a_short_last_step_is_filled_with_empty_micro_batches_of_a_seen_shape():
    rows = [row(i, 10, images=1) for i in range(3)]
    batches = list(dataset(rows, gradient_accumulation_steps=4, shuffle=False))
    assert shapes(batches) == [((2, 64), (2, 1, PATCHES, PATCH_DIM))] * 4
    assert [batch.loss_mask.sum() for batch in batches] == [6, 3, 0, 0]
    assert [batch.padding_mask.sum() for batch in batches] == [20, 10, 0, 0]
    assert [batch.loss_denominator[0] for batch in batches] == [9 / 4] * 4


def test_the_first_token_of_a_row_is_not_counted_as_a_target():
    (batch,) = dataset([row(0, 4, supervised=4), row(1, 4, supervised=1)])
    assert batch.loss_denominator[0] == 3 + 1


def test_a_step_without_supervised_tokens_has_a_finite_denominator():
    (batch,) = dataset([row(0, 1, supervised=1)])
    assert batch.loss_denominator.tolist() == [1, 1]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_position_is_restored_exactly_wherever_it_was_saved(prefetch):
    def fresh():
        return iter(
            dataset(
                mixed_rows(),
                batch_size=3,
                gradient_accumulation_steps=2,
                num_epochs=2,
                prefetch=prefetch,
            )
        )

    iterator = fresh()
    states, counts, batches = [through_json(iterator.get_state())], [(0, 0)], []
    for batch in iterator:
        batches.append(batch)
        states.append(through_json(iterator.get_state()))
        counts.append((iterator.seen, iterator.dropped))
    assert len(batches) > 10
    assert any(state["waiting"] and state["left"] for state in states), "no position in a bucket"
    for place, state in enumerate(states):
        restored = fresh()
        restored.set_state(state)
        assert (restored.seen, restored.dropped) == counts[place]
        assert through_json(restored.get_state()) == state
        assert_same(list(restored), batches[place:])


def test_a_running_iterator_can_be_set_back_and_forth():
    iterator = iter(dataset(mixed_rows(), gradient_accumulation_steps=2, prefetch=2))
    start = through_json(iterator.get_state())
    batches = [next(iterator) for _ in range(5)]
    later = through_json(iterator.get_state())
    batches += list(iterator)
    iterator.set_state(later)
    assert_same(list(iterator), batches[5:])
    iterator.set_state(start)
    assert_same(list(iterator), batches)


def test_two_iterators_of_a_dataset_do_not_disturb_each_other():
    data = dataset(mixed_rows(), prefetch=2)
    expected = list(data)
    first, second = iter(data), iter(data)
    pairs = list(zip(first, second, strict=True))
    assert_same([a for a, _ in pairs], expected)
    assert_same([b for _, b in pairs], expected)


def test_a_program_that_stops_before_the_data_ends_says_nothing_about_it():
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data import dataset, row
iterator = iter(dataset([row(0), row(1)], num_epochs=None, prefetch=2))
next(iterator)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_a_closed_iterator_says_so():
    iterator = iter(dataset([row(0)], prefetch=2))
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="this iterator was closed"):
        next(iterator)


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_rows_of_the_same_global_batches(process_count):
    options = {"batch_size": 4, "gradient_accumulation_steps": 2, "num_epochs": 2}
    whole = list(dataset(mixed_rows(), **options, process_index=0, process_count=1))
    parts = [
        list(dataset(mixed_rows(), **options, process_index=i, process_count=process_count))
        for i in range(process_count)
    ]
    assert all(shapes(part) == shapes(parts[0]) for part in parts)
    joined = [
        Batch(
            **{
                name: None
                if vars(pieces[0])[name] is None
                else np.concatenate([vars(piece)[name] for piece in pieces])
                for name in ("tokens", "loss_mask", "padding_mask", "images", "loss_denominator")
            }
        )
        for pieces in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_a_position_can_be_restored_into_another_number_of_processes():
    options = {"batch_size": 4, "gradient_accumulation_steps": 2}
    iterator = iter(dataset(mixed_rows(), **options, process_index=0, process_count=1))
    next(iterator)
    restored = iter(dataset(mixed_rows(), **options, process_index=1, process_count=2))
    restored.set_state(through_json(iterator.get_state()))
    expected = [n for batch in iterator for n in batch.tokens[2:, 0]]
    assert [n for batch in restored for n in batch.tokens[:, 0]] == expected


def test_after_the_first_epoch_a_process_encodes_only_its_own_rows():
    processor = FakeProcessor()
    rows = [row(i) for i in range(8)]
    data = dataset(rows, processor, batch_size=4, num_epochs=2, process_index=1, process_count=2)
    batches = list(data)
    second_epoch = numbers(batches[2:])
    assert len(second_epoch) == 4
    assert {n: times for n, times in processor.encoded.items() if times == 2} == dict.fromkeys(
        second_epoch, 2
    )


def test_rows_are_encoded_once_an_epoch_and_in_threads_when_prefetching():
    processor = FakeProcessor()
    list(dataset(mixed_rows(), processor, num_epochs=2, prefetch=2))
    assert set(processor.encoded.values()) == {2}
    assert threading.main_thread().name not in processor.threads


def test_rows_over_max_length_are_counted_and_reported_and_never_cut(caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        iterator = iter(dataset(mixed_rows(), shuffle=False, num_epochs=2))
        batches = list(iterator)
    assert sorted(numbers(batches)) == sorted(SHORT_ENOUGH * 2)
    assert (iterator.seen, iterator.dropped) == (46, 6)
    assert [record.getMessage() for record in caplog.records] == [
        "row 4 of the given sequence has 300 tokens, more than max_length=150: "
        "it is dropped, as all such rows.",
        "the given sequence: 3 of 23 rows are longer than max_length=150 and are dropped.",
    ]


def write_jsonl(path, rows, extra=""):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + extra)
    return path


def write_parquet(path, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = sorted({key for one in rows for key in one})
    table = sys.modules["pyarrow"].table({key: [one.get(key) for one in rows] for key in columns})
    parquet.write_table(table, path, row_group_size=4)


def text_row(number, length=10):
    return row(number, length) | {"note": "größer 🙂 " * (number % 3)}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files_give_the_same_batches_as_a_sequence(tmp_path, kind):
    rows = [text_row(i, 5 + 9 * i) for i in range(9)]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n", 4))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        write_parquet(path, rows)
    options = {"num_epochs": 2, "prefetch": 2}
    assert_same(list(dataset(str(path), **options)), list(dataset(rows, **options)))


def without_images(one):
    """Every image part of a row emptied."""
    parts = one["messages"][0]["content"]
    parts[:] = [{"type": "image"} if part["type"] == "image" else part for part in parts]
    return one


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_paths_of_images_in_a_file_are_relative_to_the_file(tmp_path, kind):
    rows = [
        without_images(row(0, images=2)) | {"images": ["a.png", "sub/b.png"]},
        without_images(row(1, images=1)) | {"image": "/somewhere/c.png"},
        without_images(row(2, images=1)) | {"images": ["https://x.org/d.png"]},
        row(3, images=1),
        without_images(row(4, images=1)) | {"image": "f.png", "url": "not an image"},
    ]
    rows[3]["messages"][0]["content"][0] = {"type": "image", "path": "e.png"}
    path = tmp_path / f"rows.{kind}"
    (write_jsonl if kind == "jsonl" else write_parquet)(path, rows)
    processor = FakeProcessor()
    list(dataset(path, processor, shuffle=False))
    assert processor.given == {
        0: [str(tmp_path / "a.png"), str(tmp_path / "sub" / "b.png")],
        1: ["/somewhere/c.png"],
        2: ["https://x.org/d.png"],
        3: [str(tmp_path / "e.png")],
        4: [str(tmp_path / "f.png")],
    }
    assert Rows(path)[4]["url"] == "not an image"


def test_images_as_the_datasets_library_writes_them_to_parquet_are_read(tmp_path):
    rows = [
        without_images(row(0, images=1)) | {"images": [{"bytes": b"raw", "path": "a.png"}]},
        without_images(row(1, images=1)) | {"images": [{"bytes": None, "path": "b.png"}]},
    ]
    path = tmp_path / "rows.parquet"
    write_parquet(path, rows)
    processor = FakeProcessor()
    list(dataset(path, processor, shuffle=False))
    assert processor.given[0][0]["bytes"] == b"raw"
    assert processor.given[1] == [{"bytes": None, "path": str(tmp_path / "b.png")}]


def test_images_of_a_sequence_are_left_as_they_are():
    rows = [row(0, images=1), without_images(row(1, images=1)) | {"image": "a.png"}]
    processor = FakeProcessor()
    list(dataset(rows, processor, shuffle=False))
    assert processor.given[0][0] is PIXEL
    assert processor.given[1] == ["a.png"]


def first_batch(source, **options):
    return next(iter(dataset(source, shuffle=False, **options)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.jsonl: there is no such file"):
        dataset(tmp_path / "absent.jsonl")


def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"expected a file ending in \.jsonl, \.json, \.parquet"):
        dataset(tmp_path / "rows.csv")


def test_a_line_that_is_not_json_is_named_with_its_file_before_training_begins(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row(0), row(1)], extra='\n{"messages": [\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 4: .* not JSON"):
        dataset(path)


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"messages": []}).encode() + b'\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: expected one JSON object"):
        dataset(path)


def test_json_that_is_not_a_list_is_refused(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"messages": []}')
    with pytest.raises(ValueError, match="expected a list of rows, found dict"):
        dataset(path)
    path.write_text('{"messages": []}\n{"messages": []}')
    with pytest.raises(ValueError, match=r"rows\.json, line 2: not JSON .* \.jsonl"):
        dataset(path)


def test_a_broken_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"rows\.parquet: not a readable parquet file"):
        dataset(path)


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="needs the package pyarrow"):
        dataset(path)


@pytest.mark.parametrize("kind", ["sequence", "jsonl", "json"])
def test_an_empty_dataset_is_refused(tmp_path, kind):
    source = [] if kind == "sequence" else tmp_path / f"rows.{kind}"
    if kind != "sequence":
        source.write_text("[]" if kind == "json" else "\n\n")
    with pytest.raises(ValueError, match="expected at least one row, found none"):
        dataset(source)


def test_rows_and_settings_of_another_type_are_refused():
    with pytest.raises(ValueError, match=r"found generator; a generator's rows .* list\(\.\.\.\)"):
        dataset(row(n) for n in range(3))
    with pytest.raises(ValueError, match="skip_bad_rows: expected True or False, found 'no'"):
        dataset([row(0)], skip_bad_rows="no")


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({"text": "hello"}, r"found an object with \['text'\]"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": "hello"}, "found str"),
        ("hello", "found str"),
    ],
    ids=["other_keys", "empty", "string", "not_an_object"],
)
def test_a_row_without_messages_is_named_by_its_index(tmp_path, bad, found):
    rows = [row(0), bad]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=f"row 1 of the given sequence: .*{found}"):
        first_batch(rows)
    with pytest.raises(ValueError, match=rf"row 1 of rows\.jsonl: .*{found}"):
        first_batch(path)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_of_the_processor_names_the_row(prefetch):
    with pytest.raises(ValueError, match="row 1 of the given sequence: this image cannot"):
        first_batch([row(0), row(666)], prefetch=prefetch)


def test_a_dataset_in_which_no_row_fits_is_an_error_and_not_an_endless_loop():
    with pytest.raises(ValueError, match=r"all 3 rows .* max_length=16; the shortest .* 20 tokens"):
        first_batch([row(i, 20 + i) for i in range(3)], max_length=16, num_epochs=None)


def test_a_row_with_more_images_than_any_bucket_is_named():
    with pytest.raises(ValueError, match=r"row 1 .* has 3 images, and image_buckets ends at 2"):
        first_batch([row(0), row(1, images=3)], image_buckets=(0, 1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, found 0"),
        ({"max_length": 0}, "max_length: expected at least 1, found 0"),
        ({"num_epochs": 0}, "num_epochs: expected at least 1, found 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected at least 1"),
        ({"prefetch": -1}, "prefetch: expected at least 0"),
        ({"seed": -1}, "seed: expected at least 0 .*, found -1"),
        ({"max_length": float("nan")}, "max_length: expected a whole number of at least 1"),
        ({"image_buckets": (0, -1)}, "image_buckets: expected at least 0, found -1"),
        ({"bucket_lengths": (64, 128)}, "bucket_lengths: .* max_length=150, found .64, 128."),
        ({"image_buckets": ()}, "image_buckets: expected numbers of images"),
        ({"process_index": 2, "process_count": 2}, "process_index: expected 0 to 1, found 2"),
        (
            {"batch_size": 6, "process_index": 0, "process_count": 4},
            "batch_size: expected a multiple of the number of processes, 4, found 6",
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_an_impossible_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        dataset([row(0)], **options)


def test_a_position_of_another_dataset_is_refused():
    state = through_json(iter(dataset([row(0), row(1)])).get_state())
    with pytest.raises(ValueError, match=r"another dataset \(batch_size was 2, is 4\)"):
        iter(dataset([row(0), row(1)], batch_size=4)).set_state(state)
    with pytest.raises(ValueError, match="it has 3 rows and .* knew 2; row 1 is new"):
        iter(dataset([row(0)] * 3)).set_state(state)
    with pytest.raises(ValueError, match="expected version 1, found None"):
        iter(dataset([row(0)])).set_state({})


def test_a_position_beyond_the_last_epoch_is_refused():
    iterator = iter(dataset([row(0), row(1)], num_epochs=2))
    list(iterator)
    with pytest.raises(ValueError, match="4 rows were read, and num_epochs=1 of 2 rows"):
        iter(dataset([row(0), row(1)])).set_state(iterator.get_state())


def test_the_real_processor_feeds_the_pipeline(tiny_dir, tmp_path):
    from PIL import Image

    from tunix_gemma4.data.processor import Processor

    processor = Processor.from_pretrained(tiny_dir, max_soft_tokens=70)
    colors = np.random.default_rng(0).integers(0, 255, (6, 20, 30, 3), np.uint8)
    rows = []
    for i, color in enumerate(colors):
        Image.fromarray(color[: 12 + i]).save(tmp_path / f"{i}.png")
        parts = [{"type": "image", "image": f"{i}.png"}] * (i % 3)
        rows.append(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [*parts, {"type": "text", "text": "What?" * (i + 1)}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": str(i)}]},
                ]
            }
        )
    options = {"batch_size": 2, "max_length": 512, "gradient_accumulation_steps": 3, "prefetch": 2}
    data = dataset(write_jsonl(tmp_path / "rows.jsonl", rows), processor, **options)
    iterator = iter(data)
    batches = [next(iterator)]
    state = through_json(iterator.get_state())
    batches += list(iterator)

    def bare(tokens, mask):
        return tuple(np.asarray(tokens)[np.asarray(mask) == 1].tolist())

    found = {
        bare(batch.tokens[i], batch.padding_mask[i])
        for batch in batches
        for i in range(2)
        if batch.padding_mask[i].any()
    }
    direct = [
        {
            "messages": [
                {**m, "content": [_opened(p, tmp_path) for p in m["content"]]}
                for m in r["messages"]
            ]
        }
        for r in rows
    ]
    expected = [processor.encode(conversation) for conversation in direct]
    assert found == {tuple(np.asarray(example.tokens).tolist()) for example in expected}
    supervised = sum(int(example.loss_mask.sum()) for example in expected)
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == supervised > 0
    assert sum(float(batch.loss_denominator[0]) for batch in batches) == supervised
    restored = iter(data)
    restored.set_state(state)
    assert_same(list(restored), batches[1:])


def _opened(part, folder):
    return part if part["type"] == "text" else {**part, "image": str(folder / part["image"])}


def test_a_batch_knows_its_rows():
    data = dataset([row(i) for i in range(5)], batch_size=4, shuffle=True, num_epochs=1)
    batches = list(data)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == [-1, -1, -1, 0, 1, 2, 3, 4]
    assert data.name == "the given sequence"
