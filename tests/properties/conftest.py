"""One thread, so that these tests give the same numbers beside anything else, and no waiting for the disk."""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of small files: what reaches the disk when is seen by no test in the same process."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
