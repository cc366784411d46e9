"""No waiting for the disk: hundreds of small files, and no test here is about crashes."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_fsync() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda file: None)
    yield
    patch.undo()
