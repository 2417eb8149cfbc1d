# SPDX-License-Identifier: Apache-2.0
"""Rewards that go wrong stop the run and name the sample."""

import math

import numpy as np
import pytest

from tunix_gemma4.host.binding import Bound, bind
from tunix_gemma4.host.rewards import RewardError, checked

PROMPTS, COMPLETIONS = ["p0", "p1", "p2"], ["c0", "c1", "c2"]


def call(reward_fn, **columns):
    return checked(reward_fn)(prompts=PROMPTS, completions=COMPLETIONS, **columns)


def test_numbers_pass_whatever_holds_them():
    assert call(lambda prompts, completions: [1, 0.5, True]) == [1.0, 0.5, 1.0]
    assert call(lambda prompts, completions: np.array([1, 2, 3])) == [1.0, 2.0, 3.0]


def test_only_the_columns_that_are_named_are_given():
    def reward(prompts, completions, answer):
        return [float(a) for a in answer]

    assert call(reward, answer=[1, 2, 3], mode="train", trajectory_ids=["0"] * 3) == [1, 2, 3]
    assert checked(reward).__name__ == "reward"


def test_prompts_are_those_of_the_data_set():
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    given = [[{"role": "user", "content": name}] for name in PROMPTS]
    with bind(Bound(prompts=given)):
        call(reward)
    assert seen == given


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1.0, math.nan, 2.0], "finite number, found nan\nsample 1: prompt 'p1', completion 'c1'"),
        ([1.0, 2.0, math.inf], "found inf\nsample 2"),
        ([None, 0.0, 0.0], "found None\nsample 0"),
        (["a", 0.0, 0.0], "found 'a'\nsample 0"),
        ([[1.0, 2.0], 0.0, 0.0], "sample 0"),
        ([1.0, 2.0], "expected 3 rewards, one per completion, found 2\nsample 2: prompt 'p2'"),
        ([1.0] * 4, "found 4"),
        (None, "found NoneType"),
        (1.0, "found float"),
    ],
)
def test_a_wrong_result_names_function_and_sample(found, message):
    def length_reward(prompts, completions):
        return found

    with pytest.raises(RewardError, match=f"(?s)length_reward.*{message}"):
        call(length_reward)


def test_a_crash_names_the_sample_that_caused_it():
    def parse(prompts, completions, answer):
        return [float(a) for a in answer]

    with pytest.raises(RewardError, match="(?s)parse raised ValueError.*sample 1: prompt 'p1'"):
        call(parse, answer=["1", "one", "3"])


def test_a_crash_of_the_whole_batch_says_that_no_sample_alone_caused_it():
    def spread(prompts, completions):
        if len(prompts) > 1:
            raise ZeroDivisionError("no spread")
        return [0.0]

    with pytest.raises(RewardError, match="(?s)no spread.*each of the 3 samples alone"):
        call(spread)
