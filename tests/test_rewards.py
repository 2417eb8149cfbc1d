# SPDX-License-Identifier: Apache-2.0
"""Reward functions: what earns how much, and how a setting names one."""

import re
from fractions import Fraction
from pathlib import Path

import pytest

from tunix_gemma4 import rewards
from tunix_gemma4.rewards import load_reward, read_choice, read_number, weighted


def one(spec, completion, **columns):
    columns = {name: [value] for name, value in columns.items()}
    (reward,) = load_reward(spec)(prompts=["?"], completions=[completion], **columns)
    return reward


@pytest.mark.parametrize(
    ("said", "reward"), [("7", 1), (" 7\n", 1), ("07", 0), ("7.", 0), ("", 0), ("seven", 0)]
)
def test_exact_answer_is_exact_but_for_space(said, reward):
    assert one("exact_answer", said, answer="7") == reward
    assert one("exact_answer", said, answer=7) == reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 eggs.\n#### 7", 7),
        ("#### 1,234", 1234),
        ("#### $1,234.50.", Fraction("1234.5")),
        ("#### 3\nno, wait\n#### 4", 4),
        ("It costs $18.00", 18),
        ("That is -5", -5),
        ("It is -$5.", -5),
        ("minus: \N{MINUS SIGN}5", -5),
        ("10-3", 3),
        ("from (1) - 4", 4),
        ("either 1,2 or 3, 4", 4),
        ("1,000,000 people", 1_000_000),
        ("The answer is 42.", 42),
        ("**42**", 42),
        (".5", Fraction(1, 2)),
        ("50%", 50),
        ("#### none, but 12", 12),
        ("1e3", 1000),
        ("2.5E-1 m", Fraction(1, 4)),
        ("it is -1/2.", Fraction(-1, 2)),
        ("#### 1,000/4", 250),
        ("on 1/2/2024", 2024),
        ("1/0 is 1e99999", 99999),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_number_is_the_last_one_written_in_any_common_way(text, number):
    assert read_number(text) == number


def test_numbers_are_compared_by_value():
    assert one("numeric_answer", "so it is 42.0", answer="19 + 23 = 42\n#### 42") == 1
    assert one("numeric_answer", "#### 42", answer=42) == 1
    assert one("numeric_answer", "0.1", answer=0.1) == 1
    assert one("numeric_answer", "1e3 = 10^3 = 1000", answer=1e3) == 1
    assert one("numeric_answer", "1/2", answer="0.5") == 1
    assert one("numeric_answer", "#### 43", answer="#### 42") == 0
    assert one("numeric_answer", "forty-two", answer="#### 42") == 0


def test_answers_may_stand_in_the_column_solution():
    assert one("numeric_answer", "8", solution="#### 8") == 1
    with pytest.raises(ValueError, match="neither a column 'answer' nor 'solution'"):
        one("numeric_answer", "8")


def test_answer_without_a_number_or_letter_is_the_users_mistake():
    with pytest.raises(ValueError, match="no number in the answer 'many'"):
        one("numeric_answer", "8", answer="many")
    with pytest.raises(ValueError, match="no letter A to J in the answer 'paris'"):
        one("multiple_choice", "B", answer="paris")
    with pytest.raises(ValueError, match="'answer': the number in the answer '9.* 400 characters"):
        one("numeric_answer", "8", answer="9" * 400)


@pytest.mark.parametrize("column", ["answer", "solution"])
@pytest.mark.parametrize("wrong", [None, [5], {"a": 1}, "", float("nan"), float("inf")])
def test_answer_that_is_none_is_named_with_its_sample(wrong, column):
    for name in ("exact_answer", "numeric_answer", "multiple_choice"):
        with pytest.raises(ValueError, match=f"^sample 1: '{column}': expected a text or a .* fou"):
            load_reward(name)(["p"] * 2, ["A"] * 2, **{column: ["A 1", wrong]})


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. Paris", "B"),
        ("The answer is B.", "B"),
        ("A or C? The answer: **C**", "C"),
        ("A dog barks, so D", "D"),
        ("I think B", "B"),
        ("A", "A"),
        ("A) a dog", "A"),
        ("B is the answer", "B"),
        ("Answer A is wrong; my final answer is B", "B"),
        ("Because", None),
        ("", None),
        ("K", None),
    ],
)
def test_choice_is_a_letter_that_stands_alone(text, letter):
    assert read_choice(text) == letter


def test_multiple_choice_compares_letters():
    assert one("multiple_choice", "(C) because", answer="C. Rome") == 1
    assert one("multiple_choice", "(C) because", answer="D") == 0
    assert one("multiple_choice", "no idea", answer="D") == 0


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ("one\ntwo\n#### 12", 1),
        ("#### 1,200.50\n", 1),
        ("#### $3", 1),
        ("#### -1/2", 1),
        ("#### 3 apples", 0),
        ("#### ", 0),
        ("so #### 3", 0),
        ("#### 3\nmore", 0),
    ],
)
def test_final_answer_stands_on_the_last_line(said, reward):
    assert one("final_answer_format", said) == reward


def test_pattern_matches_the_whole_completion():
    spec = r"matches(pattern='<think>.*</think>\\s*\\d+')"
    assert one(spec, "<think>a\nb</think>\n12 ") == 1
    assert one(spec, "<think>a</think> 12 apples") == 0
    assert one(spec, "x <think>a</think> 12") == 0


@pytest.mark.parametrize(
    ("length", "reward"), [(0, 0), (80, 0), (90, -0.5), (100, -1), (10_000, -1)]
)
def test_length_is_penalised_softly_then_fully(length, reward):
    assert one("soft_overlong(max_length=100, buffer=20)", "x" * length) == reward


def test_built_in_functions_return_one_number_per_completion():
    said, right = ["1", "#### 2", "C"], ["1 B", "2 B", "3 B"]
    made = [load_reward("matches(pattern='1')"), rewards.soft_overlong(9, 3)]
    for function in (*rewards.PLAIN.values(), *made):
        columns = {"answer": right} if "answer" in function.__code__.co_varnames else {}
        found = function(prompts=[[]] * 3, completions=said, **columns)
        assert [type(value) for value in found] == [float] * 3


def test_own_function_is_found_in_a_module_or_a_file(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(prompts, completions):\n    return [-len(said) for said in completions]\n"
    )
    assert one(f"{tmp_path / 'my_rewards.py'}:short", "abc") == -3
    monkeypatch.syspath_prepend(tmp_path)
    assert one("my_rewards:short", "abcd") == -4
    with pytest.raises(ValueError, match="my_rewards: it has no 'long'; its functions are short"):
        load_reward("my_rewards:long")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numeric", r"no reward function 'numeric'; there are exact_answer, .*soft_overlong"),
        ("soft_overlong", r"needs arguments: soft_overlong\(max_length=\.\.\., buffer=\.\.\.\)"),
        ("soft_overlong(max_length=3)", r"expected soft_overlong\(max_length=\.\.\., buffer"),
        ("soft_overlong(3, 2)", r"expected soft_overlong\(max_length"),
        ("soft_overlong(max_length='3', buffer=5)", "an argument is of another kind"),
        ("matches(pattern=1)", "an argument is of another kind"),
        ("soft_overlong(max_length=3, buffer=5)", "0 < buffer <= max_length, found buffer=5"),
        ("soft_overlong(max_length=open('x'), buffer=1)", r"expected name\(key=value, \.\.\.\)"),
        ("numeric_answer(tolerance=1)", "numeric_answer takes no arguments here"),
        ("matches(pattern='(')", "not a regular expression"),
        ("no_such_module_here:f", "no_such_module_here: cannot be imported"),
        ("nowhere.py:f", r"nowhere\.py: there is no such file"),
        ("math:pi", "expected a function, .* found float"),
        ("decimal:Decimal", "an object that is called, found a class"),
    ],
)
def test_mistaken_name_is_answered_with_what_there_is(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "1 / 0", "def f(:"])
def test_file_that_cannot_be_run_is_named(line, tmp_path):
    (tmp_path / "mine.py").write_text(line)
    with pytest.raises(ValueError, match=r"mine\.py: cannot be imported: \w+"):
        load_reward(f"{tmp_path / 'mine.py'}:f")


def test_files_of_ones_own_functions_are_known(tmp_path):
    mine = f"{tmp_path / 'mine.py'}:f"
    found = rewards.source_files(["exact_answer", "matches(pattern='a:b')", mine, "re:match"])
    assert found == {mine: tmp_path / "mine.py", "re:match": Path(re.__file__)}
    assert rewards.source_files(["sys:exit"]) == {}


def test_weighted_reward_keeps_name_and_signature():
    function = weighted(rewards.exact_answer, 0.25)
    assert function.__name__ == "exact_answer"
    assert function(prompts=["?"] * 2, completions=["a", "b"], answer=["a", "a"]) == [0.25, 0]
