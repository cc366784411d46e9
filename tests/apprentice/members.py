"""Tests of several processes: run them, have each do its jobs, and compare what they wrote."""

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apprentice.sharding import whole
from apprentice.team import ALONE, Team, join, leave
from tests.apprentice.toys import Interrupted, Keeping


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


def do_jobs(
    rank: int,
    size: int,
    folder: Path,
    jobs: Sequence[Any],
    keeping: type[Keeping],
    find: Callable[[Any, Team, Keeping], tuple[Mapping[str, Tensor], Any]],
) -> None:
    """One process of a team: does its jobs, each with a label, a step to stop at and a snapshot to go on from, into files
    of its own: tensors and rows, or the snapshot of one that was stopped."""
    torch.set_num_threads(1)
    team = join(rank, size, f"file://{folder}/meeting{size}", torch.device("cpu"), 120.0) if size > 1 else ALONE
    for job in jobs:
        place = folder / f"{size}-{rank}-{job.label}"
        recorder = keeping(job.stop, torch.load(folder / job.go_on, weights_only=True) if job.go_on else None)
        try:
            tensors, rows = find(job, team, recorder)
        except Interrupted:
            torch.save(recorder.saved, place)
        else:
            save_file({key: whole(value).clone() for key, value in tensors.items()}, place)
            place.with_suffix(".json").write_text(json.dumps(rows))
    if size > 1:
        leave()


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
