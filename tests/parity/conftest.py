# SPDX-License-Identifier: Apache-2.0
"""Settings of torch for every comparison."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Threads cost more than they bring for tiny models, a hundredfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
