"""One thread, so that the core's tests give the same numbers beside anything else."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
