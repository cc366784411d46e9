"""Tests of several processes: run them, and compare what each wrote."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


def run_members(member: Callable[..., None], size: int, *arguments: Any) -> None:
    """Run `member(rank, size, *arguments)` in that many processes to their end."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([member.__module__])  # loads torch once
    processes = [forking.Process(target=member, args=(rank, size, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * size


def compared(
    folder: Path, got: str, wanted: str, tolerance: float, seen: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor
) -> int:
    """Compare tensors and rows that two processes wrote, of each tensor what is `seen`; how many tensors that were."""
    found, other = load_file(folder / got), load_file(folder / wanted)
    assert found.keys() == other.keys()
    for name in other:
        torch.testing.assert_close(seen(name, found[name]), seen(name, other[name]), atol=tolerance, rtol=0)
    rows, others = (json.loads((folder / f"{name}.json").read_text()) for name in (got, wanted))
    assert len(rows) == len(others)
    for row, other_row in zip(rows, others, strict=True):
        assert row == {
            name: value if value is None else pytest.approx(value, rel=tolerance, abs=tolerance)
            for name, value in other_row.items()
        }
    return len(found)
