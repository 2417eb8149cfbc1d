# SPDX-License-Identifier: Apache-2.0
"""Tables of the documentation that would go stale: hooks, metrics, reward functions."""

import re
from pathlib import Path

import pytest

from tunix_gemma4 import ModelConfig, rewards
from tunix_gemma4.plugin import register, version
from tunix_gemma4.plugin.rl import learner, report as rl_report

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_table_of_hooks_is_that_of_register():
    page = (DOCS / "reference/hooks.md").read_text()
    rows = re.findall(r"^\| `(?:tunix|qwix)[.:].*\|$", page, re.MULTILINE)
    expected = [f"| `{hook.target}` | {hook.why} |" for hook in register.HOOKS]
    # Paste these where they differ.
    assert rows == expected, "\n".join(expected)
    assert f"tested is {' and '.join(version.TESTED)}." in page


def reported():
    ours = [f"{rl_report.ACTOR}/{name}" for name in learner.METRICS]
    return sorted({*ours, *(f"{prefix}/{name}" for _, prefix, name in rl_report._SHOWN)})


@pytest.mark.parametrize("name", reported())
def test_every_metric_of_a_line_is_explained(name):
    assert f"`{name}`" in (DOCS / "how-to/read_metrics.md").read_text()


@pytest.mark.parametrize("name", [*rewards.PLAIN, *rewards.WITH_ARGUMENTS])
def test_every_reward_function_is_listed(name):
    page = (DOCS / "how-to/write_reward.md").read_text()
    assert re.search(rf"^\| `{name}[`(]", page, re.MULTILINE)


def test_the_table_of_heads_is_that_of_the_sizes():
    page = (DOCS / "how-to/choose_mesh.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (\d+) \| ([\d, ]+) \| (\d+), (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for size, heads, fitting, sliding, full in rows:
        config = getattr(ModelConfig, f"gemma4_{size.lower().replace('-', '_')}")()
        count = config.num_attention_heads
        found = {layer.kind: layer.num_kv_heads for layer in config.layers}
        assert int(heads) == count and found == {"sliding": int(sliding), "full": int(full)}
        assert [int(tp) for tp in fitting.split(",")] == [
            tp for tp in range(1, count + 1) if count % tp == 0
        ]
