# SPDX-License-Identifier: Apache-2.0
"""What register() does when Tunix's models and command lines are not as they were."""

import inspect

import pytest
from tunix.models import automodel

import tunix_gemma4
from tunix_gemma4.plugin.hooks import Installed
from tunix_gemma4.plugin.register import HOOKS, status

OURS = [
    hook for hook in HOOKS if hook.wrap.__module__.split(".")[-1] in ("automodel", "cli", "engines")
]


@pytest.fixture(autouse=True)
def _unregistered_afterwards():
    yield
    tunix_gemma4.unregister()


def stored(hook):
    return inspect.getattr_static(*hook.place())


def test_there_are_hooks_on_models_command_lines_and_engines():
    modules = {hook.target.partition(":")[0] for hook in OURS}
    assert {"tunix.models.automodel", "tunix.cli.config", "tunix.generate.mappings"} <= modules


@pytest.mark.parametrize("hook", OURS, ids=lambda hook: hook.target)
def test_a_function_that_moved_is_named_and_nothing_is_wrapped(monkeypatch, hook):
    holder, name = hook.place()
    with monkeypatch.context() as changed:
        changed.delattr(holder, name)
        with pytest.raises(RuntimeError, match=f"(?s)hooks into.*{hook.target}: "):
            Installed().install([hook])
    if not hook.parameters:
        return

    def other(entirely, different):
        raise AssertionError("never called")

    monkeypatch.setattr(holder, name, other)
    installed = Installed()
    with pytest.raises(RuntimeError) as error:
        installed.install([hook])
    expected = f"{hook.target}: no parameter {', '.join(hook.parameters)}; it has entirely, differ"
    assert expected in str(error.value)
    assert getattr(holder, name) is other
    assert not installed


@pytest.mark.parametrize("hook", OURS, ids=lambda hook: hook.target)
def test_each_goes_away_without_a_trace(hook):
    before = stored(hook)
    installed = Installed()
    installed.install([hook])
    assert stored(hook) is not before
    installed.restore()
    assert stored(hook) is before


def test_a_host_that_looks_models_up_elsewhere_is_noticed(monkeypatch):
    """As if a newer Tunix kept the function and no longer called it."""
    theirs = automodel.call_model_config("gemma-4-e2b")
    monkeypatch.setattr(automodel, "call_model_config", lambda model_name: theirs)
    before = [stored(hook) for hook in HOOKS if not hook.optional]
    with pytest.raises(RuntimeError, match="looks models up elsewhere"):
        tunix_gemma4.register()
    assert status() == "tunix_gemma4 is not registered"
    assert all(
        stored(hook) is value
        for hook, value in zip([h for h in HOOKS if not h.optional], before, strict=True)
    )
