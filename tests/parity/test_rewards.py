# SPDX-License-Identifier: Apache-2.0
"""TRL's own reward functions run here as they are, and see what they see there."""

import pytest
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from tunix_gemma4.plugin.rl.context import RolloutContext, bind
from tunix_gemma4.plugin.rl.rewards import checked

SAID = ["<think>\nsums\n</think>\n4", "<think> no end 4", "4"]
IDS = [[5] * 70, [5] * 90, [5] * 101]


@pytest.fixture(autouse=True)
def _in_work():
    prompts = [[{"role": "user", "content": "2+2?"}]] * 3
    with bind(
        RolloutContext(prompts=prompts, for_rewards={"completion_ids": IDS, "trainer_state": None})
    ):
        yield


def test_format_reward_reads_the_messages():
    expected = think_format_reward([[{"role": "assistant", "content": said}] for said in SAID])
    assert expected == [1.0, 0.0, 0.0]
    assert checked(think_format_reward)(prompts=["?"] * 3, completions=SAID) == expected


def test_length_punishment_counts_the_tokens():
    punishment = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert punishment(completion_ids=IDS) == [0.0, -0.5, -1.0]
    found = checked(punishment)(prompts=["?"] * 3, completions=SAID, answer=["4"] * 3)
    assert found == [0.0, -0.5, -1.0]
