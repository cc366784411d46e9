"""A disk that fills for real (a small tmpfs), work that cannot fit: errors name what is missing, nothing saved is lost."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apprentice.compute import CPU
from tasks import room
from tasks.checkpoints import save_model
from tasks.resume import load_state, save_state
from tasks.room import check_room, size, writing
from tasks.stage import Stage, StageError
from tests.apprentice.toys import tiny_llama
from tests.conftest import Project
from tests.tables import words

MEBIBYTE = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def state(step: int, mebibytes: float) -> dict[str, Any]:
    return {"step": step, "w": torch.full((int(mebibytes * MEBIBYTE / 4),), float(step))}


def test_a_snapshot_that_does_not_fit_is_refused_and_the_previous_one_stays(small_disk: Path) -> None:
    save_state(small_disk / "last", state(1, 2.5))
    with pytest.raises(StageError, match=r"the disk is full: .*last\.partial takes 2\.5 MiB, and 1\.\d+ MiB are free"):
        save_state(small_disk / "last", state(2, 2.5))
    found = load_state(small_disk / "last")
    assert found is not None and found["step"] == 1 and float(found["w"].min()) == float(found["w"].max()) == 1.0


def test_a_disk_that_fills_while_writing_gives_the_same_error(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else took the room after the look: the write itself fails, and its torn files go."""
    save_state(small_disk / "last", state(1, 2.5))
    free = shutil.disk_usage
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    with pytest.raises(StageError, match=r"the disk is full: .* the previous snapshot stays"):
        save_state(small_disk / "last", state(2, 2.5))
    assert free(small_disk).free > MEBIBYTE and not (small_disk / "last.partial").exists()
    found = load_state(small_disk / "last")
    assert found is not None and found["step"] == 1


def test_a_disk_that_fills_while_a_model_is_written_gives_the_same_error_and_its_torn_files_go(
    stage: Stage, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.data = small_disk / "data"
    free = shutil.disk_usage
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    with pytest.raises(
        StageError, match=r"the disk is full: .*models/\.sft\.partial takes 5\.\d MiB, .* the last snapshot stays"
    ):
        save_model(stage, "sft", tiny_llama(0, vocab=2**16, hidden_size=20), words(), [], {})
    assert free(small_disk).free > 3.9 * MEBIBYTE and not list((stage.data / "models").iterdir())


def test_other_errors_of_writing_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "x", 1, ""):
        (tmp_path / "nowhere" / "x").write_text("x")


FILLING = '''"""Writes a row to a full disk."""
from tasks.stage import Stage, run


def main(stage):
    with open("/dev/full", "w") as file:
        file.write("row")


run(__name__, main, __doc__)
'''


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_stage_on_a_full_disk_ends_in_one_line(project: Project) -> None:
    project.path("tasks/sft.py").write_text(FILLING)
    command, environment = [sys.executable, "-m", "tasks.sft"], {**os.environ, "DVC_STAGE": "sft"}
    done = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"\[sft\] StageError: the disk is full .*; free some of /.* give the same command again", done.stderr)


@pytest.fixture
def stage(stage_of: Callable[..., Stage]) -> Stage:
    return stage_of("sft")


CONFIG = tiny_llama(0).config


def test_what_is_needed_is_said_before_work(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    check_room(stage, CPU, [CONFIG], [CONFIG], samples=True)
    said = capsys.readouterr().out
    assert re.search(
        r"\[sft\] needs about [\d.]+ MiB more memory \([\d.]+ GiB free\) and [\d.]+ KiB of disk \([\d.]+ GiB free", said
    )
    assert "WARNING" not in said


@pytest.mark.parametrize(
    ("free", "memory", "disk", "message"),
    [
        (10**9, 8 * 10**4, 10**9, r"weights, gradients and optimizer take [\d.]+ KiB, and cpu has 78\.1 KiB of memory in all"),
        (10**9, 10**9, 10**5, r"two snapshots take [\d.]+ KiB of disk, and 97\.7 KiB are free"),
    ],
)
def test_what_cannot_fit_is_not_begun(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, free: int, memory: int, disk: int, message: str
) -> None:
    """The model has 5264 parameters: 16 bytes each in memory, 8 + 24 each on disk."""
    assert sum(parameter.numel() for parameter in tiny_llama(0).parameters()) * 16 > 8 * 10**4
    monkeypatch.setattr(room, "memory_of", lambda compute: (free, memory))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))
    with pytest.raises(StageError, match=message):
        check_room(stage, CPU, [CONFIG], [], samples=True)


def test_what_may_not_fit_is_a_warning(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "memory_of", lambda compute: (10**4, 10**12))
    check_room(stage, dataclasses.replace(CPU, cache_tokens=4096), [CONFIG], [], samples=True)
    assert "WARNING: that is more memory than is free" in capsys.readouterr().out


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**20, 2**40)] == ["0 bytes", "1023 bytes", "1.5 KiB", "5.0 MiB", "1.0 TiB"]
