# SPDX-License-Identifier: Apache-2.0
"""Settings of torch for every comparison, and what needs Tunix."""

import importlib.util

import pytest
import torch

_HAS_TUNIX = importlib.util.find_spec("tunix") is not None
# `make parity-latest` has no Tunix; `make parity` has.
collect_ignore = [] if _HAS_TUNIX else ["test_rewards.py"]


def pytest_report_header():
    return None if _HAS_TUNIX else "tests/parity/test_rewards.py is not collected: it needs Tunix"


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Threads cost more than they bring for tiny models, a hundredfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
