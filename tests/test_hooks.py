# SPDX-License-Identifier: Apache-2.0
"""register() and unregister(): in place at once, checked, and gone without a trace."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tunix.rl import algo_core, common, rl_learner

import tunix_gemma4
from tunix_gemma4.plugin import register, version
from tunix_gemma4.plugin.hooks import Hook, Installed
from tunix_gemma4.plugin.register import EXTENDED, HOOKS, status
from tunix_gemma4.plugin.version import TESTED

MISSING = object()


@pytest.fixture(autouse=True)
def _unregistered_afterwards():
    yield
    tunix_gemma4.unregister()


def found():
    """What stands at every target at the moment, and whether its holder has it of its own."""
    places = {hook.target: hook.place() for hook in HOOKS}
    return {
        target: (inspect.getattr_static(holder, name, MISSING), name in vars(holder))
        for target, (holder, name) in places.items()
    }


def called(hook):
    """The target as its callers get it: of a classmethod, the bound method."""
    return getattr(*hook.place(), MISSING)


def differing(before, after):
    return {target for target in before if before[target][0] is not after[target][0]}


def test_registering_wraps_every_target_once():
    before = found()
    tunix_gemma4.register()
    once = found()
    assert differing(before, once) == {hook.target for hook in HOOKS}
    tunix_gemma4.register()
    assert not differing(once, found())


def test_unregistering_leaves_the_very_objects_that_were_there():
    before = found()
    for _ in range(2):
        tunix_gemma4.register()
        tunix_gemma4.register()
        tunix_gemma4.unregister()
        assert not differing(before, found())
        assert {target: own for target, (_, own) in found().items()} == {
            target: own for target, (_, own) in before.items()
        }
        tunix_gemma4.unregister()
        assert not differing(before, found())


def test_wrappers_have_the_signatures_of_what_they_wrap():
    before = {hook: called(hook) for hook in HOOKS if hook.parameters}
    tunix_gemma4.register()
    functions = [hook for hook in before if before[hook] is not MISSING]
    assert len(functions) >= 9
    for hook in functions:
        original, wrapper = before[hook], called(hook)
        assert inspect.signature(wrapper) == inspect.signature(original)
        assert wrapper.__name__ == original.__name__


def test_status_names_what_is_wrapped():
    assert status() == "tunix_gemma4 is not registered"
    tunix_gemma4.register()
    lines = status().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [hook.target for hook in HOOKS]
    assert all(line.partition(": ")[2] for line in lines)


def test_a_host_with_other_parameters_is_refused_naming_what_moved(monkeypatch):
    def compute_score(model, tokens, completion_tokens, **rest):
        raise AssertionError("never called")

    def compute_entropy_from_logits(scores):
        raise AssertionError("never called")

    monkeypatch.setattr(common, "compute_score", compute_score)
    monkeypatch.setattr(algo_core, "compute_entropy_from_logits", compute_entropy_from_logits)
    before = found()
    with pytest.raises(RuntimeError, match="is not the one that tunix_gemma4 hooks into") as error:
        tunix_gemma4.register()
    message = str(error.value)
    assert (
        "tunix.rl.common:compute_score: no parameter prompt_tokens, segment_ids; "
        "it has model, tokens, completion_tokens, rest"
    ) in message
    assert "tunix.rl.algo_core:compute_entropy_from_logits: no parameter logits" in message
    assert message.count("tunix.rl") == 2
    assert not differing(before, found())
    assert status() == "tunix_gemma4 is not registered"


def test_a_host_that_lacks_a_function_is_refused_naming_it(monkeypatch):
    monkeypatch.delattr(common, "get_per_token_logps")
    monkeypatch.delattr(rl_learner.RLLearner, "_compute_rewards")
    with pytest.raises(RuntimeError) as error:
        tunix_gemma4.register()
    assert "tunix.rl.common:get_per_token_logps: module" in str(error.value)
    assert "tunix.rl.rl_learner:RLLearner._compute_rewards: type object" in str(error.value)


def test_a_host_that_lacks_a_module_is_refused_naming_it():
    hook = Hook("tunix.rl.nowhere:function", lambda original: original, (), "a test")
    with pytest.raises(RuntimeError, match="tunix.rl.nowhere:function: No module named"):
        Installed().install([hook])


def test_an_untested_version_is_named_in_a_warning(monkeypatch):
    monkeypatch.setattr(register, "found", lambda: version.Found("0.1.99"))
    with pytest.warns(UserWarning, match=f"google-tunix 0.1.99 is untested.*{TESTED[0]}"):
        tunix_gemma4.register()


def overridden(kind):
    """Methods of ours that the host has too, but for what every class has."""
    base = kind.__mro__[1]
    return [
        (kind, name)
        for name, value in vars(kind).items()
        if callable(value) and not name.startswith("__") and hasattr(base, name)
    ]


OVERRIDDEN = [pair for kind in EXTENDED for pair in overridden(kind)]


@pytest.mark.parametrize(
    ("kind", "name"), OVERRIDDEN, ids=lambda part: getattr(part, "__name__", part)
)
def test_an_overridden_method_that_moved_is_named_and_nothing_is_wrapped(monkeypatch, kind, name):
    base = kind.__mro__[1]
    holders = [one for one in base.__mro__ if name in vars(one)]
    before = found()
    with monkeypatch.context() as changed:
        for holder in holders:
            changed.setattr(holder, f"{name}_renamed", vars(holder)[name], raising=False)
            changed.delattr(holder, name)
        with pytest.raises(RuntimeError) as error:
            tunix_gemma4.register()
    target = f"{base.__module__}:{base.__qualname__}.{name}"
    assert f"{target}: gone; {kind.__name__} overrides it" in str(error.value)

    monkeypatch.setattr(holders[0], name, lambda self, entirely, different: None)
    with pytest.raises(RuntimeError) as error:
        tunix_gemma4.register()
    assert f"{target}: its parameters are (entirely, different)" in str(error.value)
    monkeypatch.undo()
    assert not differing(before, found())


def test_what_ours_call_is_checked_and_a_trainer_checks_without_registering(monkeypatch):
    base = EXTENDED[0].__mro__[1]
    monkeypatch.setattr(base, "_train_step", lambda self, model, optimizer, sums, inputs: None)
    with pytest.raises(RuntimeError) as error:
        EXTENDED[0](None, None, None)
    message = str(error.value)
    assert message.count("\n") == 2
    assert "PeftTrainer._train_step: its parameters are (model, optimizer, sums, inputs)" in message
    assert message.endswith("pip install --force-reinstall --no-deps google-tunix==0.1.7")


def test_versions_that_do_not_do_are_refused_by_name(tmp_path):
    assert version.refusal(version.found()) is None
    assert version.refusal(version.Found("0.2.0")) is None  # Unknown: the hooks tell.
    older = version.refusal(version.Found("0.1.6"))
    assert "google-tunix 0.1.6 does not go" in older
    assert "older than 0.1.7" in older
    assert older.endswith("pip install google-tunix==0.1.7")

    # A checkout on the path is not what pip says is installed.
    (tmp_path / "tunix").mkdir()
    (tmp_path / "tunix" / "__init__.py").write_text("")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.1.5"\n')
    program = "import tunix_gemma4; tunix_gemma4.register()"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    last = run.stderr.splitlines()[-1]
    assert f"RuntimeError: google-tunix 0.1.5 (from {tmp_path}) does not go" in last
    assert last.endswith(f"Take {tmp_path} off the path and pip install google-tunix==0.1.7")


def test_what_is_known_of_a_newer_version_is_said():
    assert version.doubt(version.found()) is None
    tried = version.doubt(version.Found("0.1.8", Path("there")))
    assert "google-tunix 0.1.8 (from there): commit c7d8950f" in tried
    assert "SFT, GRPO and DPO" in tried


def test_by_hand_comparison_says_what_it_needs():
    script = Path(__file__).with_name("tunix_versions.py")
    environment = {name: value for name, value in os.environ.items() if name != "TUNIX_CHECKOUT"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert "TUNIX_CHECKOUT: expected the folder of a checkout of google/tunix" in run.stdout


def test_the_gate_of_a_newer_host_is_replaced_and_put_back(monkeypatch):
    def theirs(model):
        raise AssertionError("never called")

    monkeypatch.setattr(common, "_model_accepts_segment_ids", theirs, raising=False)
    tunix_gemma4.register()
    assert common._model_accepts_segment_ids(lambda tokens, segment_ids: tokens)
    tunix_gemma4.unregister()
    assert common._model_accepts_segment_ids is theirs


class Parent:
    def method(self, number):
        return number


class Child(Parent):
    pass


def test_a_method_that_was_inherited_is_inherited_again(monkeypatch):
    hook = Hook(
        f"{__name__}:Child.method",
        lambda original: lambda self, number: original(self, number) + 1,
        ("number",),
        "a test",
    )
    installed = Installed()
    installed.install([hook])
    assert (Child().method(1), Parent().method(1)) == (2, 1)
    assert installed and installed.hooks() == [hook]
    installed.restore()
    assert "method" not in vars(Child) and Child().method(1) == 1
    assert not installed
