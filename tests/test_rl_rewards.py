# SPDX-License-Identifier: Apache-2.0
"""Rewards that go wrong stop the run and name the sample."""

import math
import os
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from tunix.rl import function_registry
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.reward_manager import SequenceRewardManager

import tunix_gemma4
from tunix_gemma4.plugin.rl.context import RolloutContext, bind
from tunix_gemma4.plugin.rl.metrics import MetricNames
from tunix_gemma4.plugin.rl.rewards import (
    RewardError,
    checked,
    limited,
    require_sums,
    without_abstained,
    without_spread,
)
from tunix_gemma4.rewards import exact_answer, weighted

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


def test_a_function_that_changes_the_folder_moves_nothing_of_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()

    def leaves(prompts, completions):
        os.chdir("other")
        return [1.0] * len(prompts)

    with caplog.at_level("WARNING"):
        assert call(leaves) == [1.0] * 3
    assert os.getcwd() == str(tmp_path)
    assert "reward function leaves changed the current folder to" in caplog.text

    def removes(prompts, completions):
        os.chdir("other")
        os.rmdir(os.getcwd())
        return [1.0] * len(prompts)

    assert call(removes) == [1.0] * 3 and os.getcwd() == str(tmp_path)


def test_prompts_are_those_of_the_data_set():
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    given = [[{"role": "user", "content": name}] for name in PROMPTS]
    with bind(RolloutContext(prompts=given)):
        call(reward)
    assert seen == given


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1.0, math.nan, 2.0], "finite number.*found nan\nsample 1: prompt 'p1', completion 'c1'"),
        ([1.0, 2.0, math.inf], "found inf\nsample 2"),
        ([1.0, 1e300, 1.0], r"found 1e\+300\nsample 1"),  # Infinite in a step.
        ([1.0, 10**400, 1.0], "found 1000+\nsample 1"),
        (["1.0", 0.0, 0.0], "found '1.0'\nsample 0"),
        ({0.0, 1.0, 2.0}, "expected a list of 3 numbers, found set"),
        (b"abc", "expected a list of 3 numbers, found bytes"),
        (np.array(1.0), "expected a list of 3 numbers, found ndarray"),
        (np.array([1, 1j, 0]), "expected a finite number.*sample 0"),
        (np.array(["2020"] * 3, "datetime64[Y]"), "expected a finite number.*sample 0"),
        (np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]), "expected a finite number.*sample 1"),
        ({"p0": 1.0, "p1": 1.0, "p2": 1.0}, "expected a list of 3 numbers, found dict"),
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


def test_sys_exit_is_an_error_of_the_function_and_the_sample():
    def leave(prompts, completions, answer):
        if "stop" in answer:
            sys.exit(0)
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match="(?s)leave raised SystemExit: 0.*sample 2: prompt 'p2'"):
        call(leave, answer=["go", "go", "stop"])


def test_function_that_does_not_return_is_named(monkeypatch, caplog):
    threads = set()

    def ponder(prompts, completions, answer):
        threads.add(threading.get_ident())
        if answer[0] == "slowly":
            threading.Event().wait()
        if answer[0] == "wrong":
            raise KeyError("x")
        return [1.0] * len(prompts)

    quick = checked(limited(ponder, 5.0))
    for _ in range(2):
        assert quick(PROMPTS, COMPLETIONS, answer=["quickly"] * 3) == [1.0] * 3
    assert len(threads) == 1 and threading.get_ident() not in threads
    with pytest.raises(
        RewardError, match=r"(?s)ponder raised KeyError: 'x'\nsample 0: prompt 'p0'"
    ):
        quick(PROMPTS, COMPLETIONS, answer=["wrong"] * 3)
    monkeypatch.setattr("tunix_gemma4.plugin.rl.rewards.WARN_AFTER", 0.02)
    message = r"(?s)ponder did not return within reward_timeout=0.2 seconds.* 3 completions.*'p0'"
    with pytest.raises(RewardError, match=message):
        checked(limited(ponder, 0.2))(PROMPTS, COMPLETIONS, answer=["slowly"] * 3)
    assert "reward function ponder has not returned for 0 seconds" in caplog.text


CONVERSATIONS = [[{"role": "user", "content": name}] for name in PROMPTS]


def test_completions_of_conversations_are_messages():
    seen = []

    def keep(completions, **_):
        seen.append(completions)
        return [0.0] * 3

    with bind(RolloutContext(prompts=[CONVERSATIONS[0], "p1", CONVERSATIONS[2]])):
        call(keep)
    assert seen[0] == [
        [{"role": "assistant", "content": "c0"}],
        "c1",
        [{"role": "assistant", "content": "c2"}],
    ]


def test_thought_before_an_answer_is_a_key_of_its_own():
    def thought(completions):
        (said,) = completions[0]
        assert said["reasoning_content"] == "2 and 2" and said["content"] == "4"
        assert "reasoning_content" not in completions[1][0]
        return [1.0] * 2

    given = ["<|channel>thought\n2 and 2\n<channel|>4", "<|channel>thought\nwithout end"]
    with bind(RolloutContext(prompts=CONVERSATIONS[:2])):
        assert checked(thought)(prompts=["?"] * 2, completions=given) == [1.0, 1.0]


def test_function_written_for_strings_is_told_of_messages():
    def length(prompts, completions):
        return [float(said.strip() == "") for said in completions]

    with (
        bind(RolloutContext(prompts=CONVERSATIONS)),
        pytest.raises(RewardError, match=r'(?s)AttributeError.*completion\[0\]\["content"\]'),
    ):
        call(length)


def test_context_is_given_to_who_names_it():
    context = {"completion_ids": [[1], [2, 3], [4]], "trainer_state": "state"}

    def named(completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    def all_of_it(completions, **columns):
        assert columns["trainer_state"] == "state" and columns["prompts"] == PROMPTS
        return named(columns["completion_ids"])

    with bind(RolloutContext(for_rewards=context)):
        assert call(named) == call(all_of_it) == [1.0, 2.0, 1.0]


def test_asynchronous_functions_are_awaited_and_may_abstain():
    async def judge(prompts, completions):
        return [1.0, None, 0.5]

    np.testing.assert_array_equal(call(judge), [1.0, np.nan, 0.5])
    np.testing.assert_array_equal(call(weighted(judge, 0.5)), [0.5, np.nan, 0.25])


def test_images_are_opened_once_each(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("RGB", (4, 4), "red").save(path)
    held = Image.new("L", (2, 2))

    def sees(prompts, completions, images, image):
        assert images[0][0] is images[1][0] and images[0][0].getpixel((0, 0)) == (255, 0, 0)
        assert images[2] is None and image[0] is held
        return [1.0] * 3

    assert call(sees, images=[[path], [path], None], image=[held] * 3) == [1.0] * 3


def test_what_a_function_does_to_its_lists_is_its_own_affair():
    def empties(prompts, completions, answer):
        completions.clear()
        answer.sort(reverse=True)
        return []

    answer = [1, 2, 3]
    with pytest.raises(RewardError, match="empties: expected 3 rewards, one per completion"):
        call(empties, answer=answer)
    assert answer == [1, 2, 3]


def test_pictures_that_cannot_be_opened_name_function_and_sample():
    def sees(prompts, completions, images):
        return [1.0] * 3

    with pytest.raises(RewardError, match="(?s)sees raised ValueError.*nowhere.png.*sample 0"):
        call(sees, images=[["nowhere.png"]] * 3)


@pytest.fixture
def registered():
    tunix_gemma4.register()
    yield
    tunix_gemma4.unregister()


def test_abstaining_leaves_sums_and_metrics_to_the_others(registered):
    columns = [[1.0, None, None, 2.0], [0.5, 0.25, None, None]]

    def fixed(name, found):
        def reward(prompts, completions):
            return found

        reward.__name__ = name
        return checked(reward)

    config = GRPOConfig(num_generations=2)
    manager = SequenceRewardManager([fixed("a", columns[0]), fixed("b", columns[1])], config)
    info = manager(prompts=["p"] * 4, completions=["c"] * 4)
    np.testing.assert_array_equal(info["rewards"], [1.5, 0.25, np.nan, 2.0])
    means = {
        name: op(np.array([values])) for name, (values, op) in info["log_metrics"].items() if op
    }
    assert means == pytest.approx(
        {
            "rewards/a": 1.5,
            "rewards/b": 0.375,
            "rewards/sum": 1.25,
            "rewards/mean": 1.0,
            "rewards/min": (0.5 + 0.25 + 2.0) / 3,
            "rewards/max": (1.0 + 0.25 + 2.0) / 3,
        }
    )


def test_advantages_leave_out_completions_that_nobody_judged(registered, caplog):
    nan = np.nan
    found = np.array([1.0, nan, 2.0, 4.0, 0.0, 1.0, 1.0, 0.0, nan, nan, nan, 3.0])
    with bind(RolloutContext()):
        filled = without_abstained(found, groups=True)
        assert np.isfinite(filled).all()
        assert filled.mean() == pytest.approx(np.nanmean(found))
        estimator = function_registry.get_advantage_estimator("grpo")
        advantages = estimator(rewards=filled, num_generations=4)
    expected = np.zeros(12)
    # The published formula on the completions that have a reward.
    for group in (np.array([0, 2, 3]), np.array([4, 5, 6, 7])):
        kept = found[group]
        expected[group] = (kept - kept.mean()) / (kept.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)
    with bind(RolloutContext()):
        without_abstained(np.full(4, nan), groups=True)
    assert "gave any of 4 completions a number" in caplog.text
    with pytest.raises(RewardError, match="sample 1: every reward function returned None"):
        without_abstained(found, groups=False)


def test_our_own_functions_read_both_forms_and_the_hosts_get_strings():
    def shaped(prompts, completions):
        return [float(len(said)) for said in completions]

    shaped.__module__ = "tunix.rl.grpo.dapo_learner"
    with bind(RolloutContext(prompts=CONVERSATIONS)):
        assert call(exact_answer, answer=["c0", "x", "c2"]) == [1.0, 0.0, 1.0]
        assert call(shaped) == [2.0] * 3


def test_no_two_metrics_share_a_name(caplog):
    names = MetricNames()
    functions = ["matches", "matches_2", "matches", "sum", "mean", "matches"]
    found = [names.of(f"rewards/{name}", number) for number, name in enumerate(functions)]
    expected = ["matches", "matches_2", "matches_3", "sum_2", "mean_2", "matches_4"]
    assert found == [f"rewards/{name}" for name in expected]
    assert "'rewards/matches_3'" in caplog.text
    # A second step finds the names of the first; the trainers' own are never given.
    assert names.of("rewards/matches", 2) == "rewards/matches_3"
    assert names.of("rewards/matches", "metric") == "rewards/matches_5"
    assert names.of("actor/loss", "metric") == "actor/loss_2"


def test_spread_is_found_in_floating_point():
    same = np.array([0.1] * 6)
    assert same.std() > 0 and without_spread(same)
    assert without_spread(np.array([0.1 + 0.2, 0.3])) and without_spread(np.zeros(3))
    assert not without_spread(np.array([0.0, 1e-6])) and not without_spread(
        np.array([1e6, 1e6 + 1])
    )


def test_a_sum_beyond_float32_is_named():
    require_sums(np.array([1.0, np.nan]))
    with pytest.raises(RewardError, match=r"sample 1: .*6e\+38"):
        require_sums(np.array([1.0, 6e38]))
