# SPDX-License-Identifier: Apache-2.0
"""What ends a run, and what is left then: signals, errors, other runs, broken-off ends."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import absl.logging
import pytest
from safetensors.numpy import load_file
from small_models import ONE_DEVICE

from tunix_gemma4.__main__ import main
from tunix_gemma4.checkpoint.check import NonFiniteError
from tunix_gemma4.checkpoint.files import clear_leftovers, locked, sha256, write_text
from tunix_gemma4.plugin import stop
from tunix_gemma4.recipes import sft
from tunix_gemma4.recipes.run_directory import (
    Record,
    one_way_out,
    prepare_output,
    training,
    write_settings,
)
from tunix_gemma4.settings.sft import RunConfig, load_run_config

STEPS = 5
CONFIG = """
lora: {rank: 2, alpha: 4}
text_only: true
batch_size: 2
max_steps: 5
eval_steps: 3
merge: true
learning_rate: 0.01
remat: none
report_to: none
save_steps: 100
data: {max_length: 64, bucket_lengths: [64], max_soft_tokens: 70, image_buckets: [0]}
"""


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    """`settings(output)`: a run of five steps on text."""
    folder = tmp_path_factory.mktemp("settings")
    rows = [
        [{"role": "user", "content": f"row {index}"}, {"role": "assistant", "content": "yes" * 3}]
        for index in range(8)
    ]
    lines = [json.dumps({"messages": row}) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "held_out.jsonl").write_text(lines[0])
    (folder / "run.yaml").write_text(CONFIG)
    given = {
        "model": tiny_checkpoint("demo"),
        "data.path": folder / "train.jsonl",
        "data.eval_path": folder / "held_out.jsonl",
    }
    words = [f"{key}={value}" for key, value in given.items()]

    def make(output, *overrides, as_words=False):
        command = [str(folder / "run.yaml"), *words, f"output_dir={output}", *overrides]
        return command if as_words else load_run_config(command[0], command[1:])

    return make


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "run"
    result = sft.run(settings(output))
    return output, result.trainer.history("loss")


def results(output):
    """The bytes of every tensor that a run saves at its end."""
    files = [
        path for name in ("adapter", "model") for path in (output / name).rglob("*.safetensors")
    ]
    return {
        (path.parent.name, name): array.tobytes()
        for path in files
        for name, array in load_file(path).items()
    }


def test_interrupted_run_goes_on_to_the_same_numbers_and_a_broken_off_end_is_finished(
    settings, unbroken, tmp_path, capsys
):
    output, losses = unbroken
    config = settings(tmp_path / "run")

    def look(trainer):
        if trainer.train_steps == 3:
            with pytest.raises(ValueError, match="run: another run is writing to it"):
                sft.run(config)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(stop.Interrupted, match=r"stopped by Ctrl-C after step \d, which is") as end:
        sft.run(config, after_eval=look)
    done = int(str(end.value).split("step ")[1][0])
    assert f"The checkpoint of step {done} is kept in " in end.value.__notes__[0]
    assert "the same command goes on" in end.value.__notes__[0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("checkpoints", "run_config.yaml"),
    ]

    # What may change: these, and the data as far as it is still to come, as the position tells.
    resumed = sft.run(settings(tmp_path / "run", "data.skip_bad_rows=true", "logging_steps=1"))
    assert f"Resuming after step {done}" in capsys.readouterr().out
    assert resumed.trainer.history("loss") == losses[done:]
    assert results(tmp_path / "run") == results(output)

    # As a kill between adapter/ and model/ leaves it, and with what that one was writing.
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / ".model.new-4194305").mkdir()
    text = (tmp_path / "run" / "run_config.yaml").read_text()
    (tmp_path / "run" / "run_config.yaml").write_text(text[: len(text) // 2])
    sft.run(config)
    assert "adapter/ and not model/; this one finishes it" in capsys.readouterr().out
    assert results(tmp_path / "run") == results(output)
    assert not (tmp_path / "run" / ".model.new-4194305").exists()
    with pytest.raises(ValueError, match="it holds a finished run") as refused:
        sft.run(config)
    assert not hasattr(refused.value, "__notes__")  # The same command is refused for ever.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora=null merge=false", r"another lora \(.*: lora was .*, is None\..* depends on lora$"),
        (
            "lora.rank=4",
            r"lora.rank was 2, is 4\. .* the shape of what is trained, depends on lora",
        ),
        ("data.bucket_lengths=[32,64]", "the place in the data, .*depends on data.bucket_lengths$"),
        ("model=OTHER", r"none of its checkpoints .*Their run had other settings: model was .*2b"),
    ],
)
def test_run_that_is_refused_leaves_what_the_checkpoints_say_of_themselves(
    change, message, settings, unbroken, tiny_checkpoint, tmp_path
):
    change = change.replace("OTHER", str(tiny_checkpoint("e2b")))
    shutil.copytree(unbroken[0], tmp_path / "run")
    for name in ("adapter", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    kept = ("run_config.yaml", "checkpoints/record.json")
    before = [(tmp_path / "run" / name).read_bytes() for name in kept]
    with pytest.raises(ValueError, match=message) as refused:
        sft.run(settings(tmp_path / "run", *change.split(), "allow_changes=true"))
    assert not hasattr(refused.value, "__notes__")
    assert [(tmp_path / "run" / name).read_bytes() for name in kept] == before


def test_other_rows_are_refused_before_the_model_is_loaded(
    settings, unbroken, tmp_path, monkeypatch
):
    monkeypatch.delattr(sft.common, "load_base")
    shutil.copytree(unbroken[0], tmp_path / "run")
    for name in ("adapter", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    lines = Path(settings(tmp_path).data.path).read_text().splitlines()
    path = tmp_path / "other.jsonl"
    for rows, message in (
        ([*lines, lines[0]], r"other.jsonl: it has 9 rows .* knew 8; row 8 is new"),
        (lines[1:], "1 of the rows before it are gone from other.jsonl .* the first was row 0"),
    ):
        path.write_text("\n".join(rows))
        with pytest.raises(ValueError, match=message):
            sft.run(settings(tmp_path / "run", f"data.path={path}", "allow_changes=true"))


def test_run_without_merge_is_finished_with_its_adapter(settings, unbroken, tmp_path):
    """Merging later is another wish than finishing what broke off."""
    config = settings(tmp_path / "run", "merge=false")
    prepare_output(config, ())
    for part in ("checkpoints/5", "adapter"):
        (tmp_path / "run" / part).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds a finished run \(adapter/\)"):
        sft.run(settings(tmp_path / "run"))


@pytest.mark.slow
def test_sigterm_to_the_command_saves_and_exits_with_143(settings, unbroken, tmp_path):
    command = settings(tmp_path / "run", "logging_steps=1", as_words=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tunix_gemma4", "sft", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": ONE_DEVICE},
    )
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    _, said = process.communicate()
    assert process.returncode == 143, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-2:]
    assert last[0].startswith("tunix-gemma4 sft: stopped by SIGTERM after step")
    assert last[1].endswith("the same command goes on from there.")
    assert main(["sft", *command]) == 0
    assert results(tmp_path / "run") == results(unbroken[0])


_PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
from tunix_gemma4.__main__ import main
sys.exit(main(["sft", *sys.argv[3:]]))
"""


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_the_same_step_of_both(settings, tmp_path):
    overrides = ["logging_steps=1", "max_steps=2000", "num_train_epochs=null", "mesh.fsdp=2"]
    command = settings(tmp_path / "run", *overrides, as_words=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, rank, address, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "XLA_FLAGS": ONE_DEVICE},
        )
        for rank in "01"
    ]
    try:
        next(line for line in processes[0].stdout if line.startswith("step 1/"))
        processes[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], said
    stopped = {text.strip().splitlines()[-2] for text in said}
    assert len(stopped) == 1, said
    step = re.search(r"stopped by SIGTERM after step (\d+), which is saved", stopped.pop())[1]
    assert (tmp_path / "run" / "checkpoints" / step).is_dir()


# ---- One message, and what it says.


class Part:
    """A checkpoint manager or a metrics logger."""

    def __init__(self, problem=None):
        self.closed, self._problem = False, problem

    def close(self):
        self.closed = True
        if self._problem:
            raise self._problem


class FakeTrainer:
    def __init__(self, problem=None):
        self.checkpoint_manager, self.metrics_logger = Part(problem), Part()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("wrong"), 2, "tunix-gemma4 sft: wrong\nBesides, "),
        (OSError(28, "No space left on device", "file"), 1, "[Errno 28] No space left"),
        (OSError("the disk is gone"), 1, "The run writes to "),
        (NonFiniteError("step 3"), 1, "tunix-gemma4 sft: step 3"),
        (KeyError("x"), 1, "tunix-gemma4 sft: KeyError: 'x'"),
        (RuntimeError("first\nsecond"), 1, "tunix-gemma4 sft: RuntimeError: first\n"),
        (KeyboardInterrupt(), 130, "tunix-gemma4 sft: stopped\n"),
        (stop.Terminated("stopped by SIGTERM after step 2"), 143, "SIGTERM after step 2"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_closes_what_is_open_and_has_one_message_last(
    error, code, message, settings, tmp_path, monkeypatch, capsys
):
    trainer = FakeTrainer(problem=OSError("disk full"))
    error.add_note("A library's remark")
    output = tmp_path / "run"

    @one_way_out
    def run(config):
        (output / "checkpoints" / "actor" / "7").mkdir(parents=True)
        with training(trainer):
            raise error

    monkeypatch.setattr(sft, "run", run)
    assert main(["sft", *settings(output, as_words=True)]) == code
    assert trainer.checkpoint_manager.closed and trainer.metrics_logger.closed
    said = capsys.readouterr().err
    assert message in said
    assert "Besides, Part did not close: disk full\n" in said
    goes_on = "" if isinstance(error, NonFiniteError) else "; the same command goes on from there"
    assert said.endswith(f"The checkpoint of step 7 is kept in {output}/checkpoints{goes_on}.\n")
    assert ("Traceback" in said) == (type(error) in (KeyError, RuntimeError))


def test_output_that_cannot_be_written_to_is_named(settings, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    places = ((file, "is a file"), (file / "run", "cannot be made"))
    for output, what in (*places, (tmp_path / ("a" * 300), "cannot be made (File name too long)")):
        assert main(["sft", *settings(output, as_words=True)]) == 2
        assert f"output_dir: {output} {what}" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["orbax", "other"])
def test_tracebacks_that_orbax_logs_besides_raising_are_left_out(
    package, settings, tmp_path, caplog
):
    code = compile("1 / 0", f"{tmp_path}/{package}/thread.py", "exec")

    @one_way_out
    def run(config):
        try:
            exec(code)
        except ZeroDivisionError:
            absl.logging.exception("in a thread")
            raise

    with pytest.raises(ZeroDivisionError):
        run(settings(tmp_path / "run"))
    assert ("in a thread" in caplog.text) == (package == "other")


def test_second_ctrl_c_waits_for_no_thread(settings, tmp_path, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)

    @one_way_out
    def run(config):
        with training(FakeTrainer()):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sft, "run", run)
    main(["sft", *settings(tmp_path / "run", as_words=True)])
    assert codes == [130]
    assert capsys.readouterr().err.endswith("tunix-gemma4 sft: stopped by Ctrl-C\n")
    with stop.handled():
        assert not stop.at_once()


def test_mistake_leaves_no_directory_behind(settings, tmp_path):
    with pytest.raises(ValueError, match="there is no nothing"):
        sft.run(settings(tmp_path / "run", "model=nothing"))
    assert not (tmp_path / "run").exists()


def test_signals_outside_the_main_thread_are_left_alone(settings, tmp_path):
    seen = []

    @one_way_out
    def run(config):
        seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run, args=(settings(tmp_path / "a"),))
    thread.start()
    thread.join()
    own = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        run(settings(tmp_path / "b"))
    finally:
        signal.signal(signal.SIGTERM, own)
    assert seen == [signal.SIG_DFL, mine]


# ---- Files.


def test_killed_process_leaves_no_lock(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; "
        "from tunix_gemma4.checkpoint.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another run is writing"), locked(tmp_path):
            pass
        other.kill()
    with locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_leftovers_of_dead_processes_go_and_what_they_moved_comes_back(tmp_path):
    dead, alive = 4194305, os.getppid()
    for name in (
        f".a.new-{dead}",
        f".a.new-{os.getpid()}",
        f".b.old-{dead}",
        f".c.old-{dead}",
        "c",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / f".run_config.yaml.new-{dead}").write_text("half")
    (tmp_path / f".d.new-{alive}").mkdir()
    clear_leftovers(tmp_path, "b")
    assert (tmp_path / "b").is_dir() and (tmp_path / f".a.new-{dead}").is_dir()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".d.new-{alive}", "b", "c"]


def test_small_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_file_of_the_hubs_cache_has_its_hash_for_a_name(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "plain").write_text("content")
    for name, expected in (("ab" * 32, "ab" * 32), ("ab" * 20, sha256(tmp_path / "plain"))):
        (tmp_path / "blobs" / name).write_text("content")
        link = tmp_path / f"link-{len(name)}"
        link.symlink_to(tmp_path / "blobs" / name)
        assert sha256(link) == expected


# ---- What a resumed run depends on.


@pytest.fixture
def recorded(tmp_path):
    """`recorded()`: a record of a model, data and a reward, beside a checkpoint of step 1."""
    for name in ("model/w.safetensors", "model/config.json", "data", "reward.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    config = RunConfig(model=str(tmp_path / "model"), output_dir="", batch_size=4)
    config.data.path = str(tmp_path / "data")

    def make(**changes):
        vars(config).update({"allow_changes": False} | changes)
        return Record(tmp_path, config, {"reward.py:f": tmp_path / "reward.py"})

    settle_and_keep(make())
    (tmp_path / "checkpoints" / "1").mkdir()
    settle_and_keep(make())
    return make


def settle_and_keep(record):
    record.settle()
    record.keep()


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("model/w.safetensors", "model/w.safetensors"),
        ("data", "data.path"),
        ("reward.py", "reward.py:f"),
    ],
)
def test_changed_contents_are_named(name, called, recorded, tmp_path, caplog):
    (tmp_path / name).write_text("something else")
    with pytest.raises(
        ValueError, match=rf"other contents of {called} \(\d+ bytes, SHA-256 \w+, now"
    ):
        recorded().settle()
    (tmp_path / name).write_text(name)
    recorded().settle()
    (tmp_path / name).write_text("something else")
    settle_and_keep(recorded(allow_changes=True))
    assert "The run goes on all the same" in caplog.text
    recorded().settle()


def test_missing_and_added_files_of_the_base_are_named(recorded, tmp_path):
    (tmp_path / "model" / "w.safetensors").rename(tmp_path / "model" / "v.safetensors")
    with pytest.raises(
        ValueError, match=r"v\.safetensors \(no such file, now .*w\.safetensors \(\d"
    ):
        recorded().settle()


def test_files_that_were_hashed_are_not_read_again(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("tunix_gemma4.recipes.run_directory.sha256", lambda path: 1 / 0)
    recorded().settle()


@pytest.mark.parametrize("text", [None, "{", '{"settings": {}, "files": {"data": 3}}'])
def test_run_without_a_record_resumes_with_a_word(text, recorded, tmp_path, caplog):
    path = tmp_path / "checkpoints" / "record.json"
    path.unlink() if text is None else path.write_text(text)
    (tmp_path / "data").write_text("something else")
    recorded().settle()
    assert "is not known" in caplog.text
    recorded().settle()


def test_settings_are_compared_one_by_one(settings, tmp_path):
    config = settings(tmp_path / "run")
    prepare_output(config, ())
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    changed = settings(tmp_path / "run", "data.max_length=32", "max_steps=9", "lora.rank=4")
    found = (
        r"another data.max_length, lora.rank \(see .*\): data.max_length was 64, is 32; lora.rank"
    )
    with pytest.raises(ValueError, match=found) as raised:
        prepare_output(changed, ("data", "lora", "batch_size"))
    assert "emove" not in str(raised.value)
    assert "allow_changes" not in str(raised.value)  # It could not help with the rank.
    changed = settings(tmp_path / "run", "data.max_length=32", "max_steps=9")
    with pytest.raises(ValueError, match="allow_changes=true goes on all the same"):
        prepare_output(changed, ("data", "lora"))
    prepare_output(dataclasses.replace(changed, allow_changes=True), ("data", "lora"))
    prepare_output(config, ("data", "lora", "batch_size"))  # It was not restored.
    settle_and_keep(Record(tmp_path / "run", changed))
    prepare_output(changed, ("data", "lora"))
    (tmp_path / "run" / "checkpoints" / "record.json").unlink()
    for text in ("batch_size: [", "batch_size: 1"):  # Not YAML, and cut behind a digit.
        (tmp_path / "run" / "run_config.yaml").write_text(text)
        prepare_output(changed, ("data", "lora", "batch_size"))


def test_what_an_earlier_version_did_not_have_was_as_it_is_by_default(settings, tmp_path):
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    lora = {"rank": 4, "alpha": 8, "targets": "language", "quantize": None}
    words = [f"lora.{key}={value}" for key, value in lora.items() if value]
    written = dataclasses.asdict(settings(tmp_path / "run", *words)) | {"lora": lora}
    path = tmp_path / "run" / "checkpoints" / "record.json"
    path.write_text(json.dumps({"settings": written, "files": {}}))
    prepare_output(settings(tmp_path / "run", *words), ("data", "lora"))
    for more, said in (
        ("lora.use_rslora=true", "lora.use_rslora was False, is True"),
        ("lora.targets=[q_proj]", r"lora.targets was language, is \['q_proj'\]"),
        ("data.chat_template_kwargs={a: 1}", "chat_template_kwargs was None, is {'a': 1}"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare_output(settings(tmp_path / "run", *words, more), ("data", "lora"))
    # What it knew and this one does not.
    path.write_text(
        json.dumps({"settings": written | {"lora": lora | {"dora": True}}, "files": {}})
    )
    with pytest.raises(ValueError, match=r"lora\.dora was True, is None"):
        prepare_output(settings(tmp_path / "run", *words), ("data", "lora"))


def test_same_place_spelt_another_way_is_the_same(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    write_settings(tmp_path / "run", settings("run", "model=base", "data.path=rows.jsonl"))
    for start in ("./", "base/../", f"{tmp_path}/"):
        words = [f"model={start}base", f"data.path={start}rows.jsonl"]
        prepare_output(settings("run", *words), ("model", "data"))
    other = settings("run", "model=base", "data.path=base/rows.jsonl")
    with pytest.raises(ValueError, match="data.path was rows.jsonl, is base/rows.jsonl"):
        prepare_output(other, ("model", "data"))


def test_writes_that_come_back_to_a_save_given_up_say_nothing(settings, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: said.append(str(error)))
    monkeypatch.setattr(sys, "unraisablehook", lambda given: said.append(str(given.exc_value)))

    @one_way_out
    def run(config):
        raise ValueError("no space is left")

    for _ in range(2):
        with pytest.raises(ValueError, match="no space is left"):
            run(settings(tmp_path / "run"))
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another")):
        sys.excepthook(type(error), error, None)
        sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    assert said == ["another", "another"]
