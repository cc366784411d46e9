"""A disk that fills for real (a small tmpfs), work that cannot fit: errors name what is missing, nothing saved is lost."""

import dataclasses
import importlib
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
from tasks.cgroup import limits
from tasks.checkpoints import save_model
from tasks.faults import in_a_line
from tasks.resume import load_state, save_state
from tasks.room import check_room, size, writing
from tasks.stage import Stage, StageError
from tests.apprentice.toys import tiny_llama
from tests.conftest import Project
from tests.tables import candidates, speaker, words, write_candidates, write_model, write_table

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


FULL_MEMORY = 'RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can\'t allocate memory: 9 bytes")'
RAISING = '''"""Raises what the environment says."""
import os

import torch

from tasks.stage import Stage, run


def main(stage):
    exec(os.environ["WORK"])


run(__name__, main, __doc__)
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "told"),
    [
        ("bytearray(2**62)", "MemoryError"),
        ("torch.empty(2**55)", "can't allocate memory|not enough memory|out of memory"),
        (f"raise {FULL_MEMORY}", "DefaultCPUAllocator"),
        ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')", "CUDA out of memory"),
        ("raise OSError(12, 'Cannot allocate memory')", "Cannot allocate memory"),
    ],
)
def test_a_stage_out_of_memory_ends_in_one_line_that_names_what_to_lower(project: Project, work: str, told: str) -> None:
    project.path("tasks/sft.py").write_text(RAISING)
    command, environment = [sys.executable, "-m", "tasks.sft"], {**os.environ, "DVC_STAGE": "sft", "WORK": work}
    done = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and re.match(rf"\[sft\] StageError: out of memory \(.*({told})", line), line
    assert "compute.forward_tokens" in line and "compute.cache_tokens" in line and "The last snapshot stays" in line


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("x"), OSError(2, "no such file")])
def test_a_fault_of_the_program_is_told_as_one(error: Exception) -> None:
    assert in_a_line(error, "sft", Path()) is None


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


def test_that_vllm_takes_a_while_to_start_is_said_where_it_samples(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    for sampler, samples, said in (("vllm", True, 1), ("vllm", False, 0), ("own", True, 0)):
        check_room(stage, dataclasses.replace(CPU, sampler=sampler), [CONFIG], [], samples=samples)
        assert capsys.readouterr().out.count("vLLM draws the samples; it starts with the first, half a minute or more") == said


def groups(tmp_path: Path, line: str, files: dict[str, str]) -> list[tuple[int, int]]:
    """The limits of a process whose groups are `line`, of a mount with these files."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "cgroup").write_text(f"3:cpuset:/\n{line}\n")
    for name, content in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(f"{content}\n")
    return list(limits(tmp_path / "cgroup", tmp_path / "mount"))


V2_FILES = {"memory.max": "max", "memory.current": "9", "memory.stat": "anon 5"}
V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


def test_the_limits_of_control_groups_of_both_versions(tmp_path: Path) -> None:
    """In a pod: its own group is limited to 1000, 700 in use of which 200 are pages of files; the one above to 5000."""
    pod = {"a/memory.max": "5000", "a/memory.current": "800", "a/memory.stat": "inactive_file 0"}
    own = {"a/b/memory.max": "1000", "a/b/memory.current": "700", "a/b/memory.stat": "anon 500\ninactive_file 200"}
    assert groups(tmp_path / "2", "0::/a/b", {**V2_FILES, **pod, **own}) == [(500, 1000), (4200, 5000)]
    v1 = dict(zip((f"memory/{name}" for name in V1_NAMES), ("1000", "700", "total_inactive_file 200"), strict=True))
    # in a container of version 1 the path is the host's, and what is mounted is the container's group itself
    assert groups(tmp_path / "1", "4:memory:/docker/0123", v1) == [(500, 1000)]
    assert groups(tmp_path / "0", "0::/", V2_FILES) == []
    assert list(limits(tmp_path / "none", tmp_path)) == []


def test_in_a_container_its_limit_counts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "limits", lambda: iter([(10**9, 8 * 10**4), (10**15, 10**15)]))
    with pytest.raises(StageError, match=r"and cpu has 78\.1 KiB of memory in all"):
        check_room(stage, CPU, [CONFIG], [], samples=True)


def test_models_that_are_written_untrained_take_disk(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * 8 * 5264 - 1))
    with pytest.raises(StageError, match=r"what it writes, its copy in DVC's cache .* take 164\.5 KiB of disk"):
        check_room(stage, CPU, [], [CONFIG, CONFIG], samples=False, written=4)


@pytest.mark.parametrize("name", ["vectors", "calibration", "perstep", "rescore", "foreign"])
def test_what_cannot_fit_is_not_begun_by_the_further_methods(
    stage_of: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing but the models is there: what samples, trains or reads a table first would fail otherwise."""
    stage = stage_of(name, **{"compute.device": "cpu", "rescore.reward": "judge"})
    stage.__dict__["key"] = "0123"
    for model in ("sft", "base", "judge", "bt_reward", "donor_ppo", "target", "foreign", "foreign_base"):
        write_model(stage.data, model, speaker())
    words().save_pretrained(stage.data / "models" / "tokenizer")
    write_candidates(stage.data, candidates("q", ("x", 1.0), ("y", 2.0)))
    monkeypatch.setattr(room, "memory_of", lambda compute: (1000, 1000))
    with pytest.raises(StageError, match=rf"{name}: .* take [\d.]+ [KM]iB, and cpu has 1000 bytes of memory in all"):
        importlib.import_module(f"tasks.{name}").main(stage)


@pytest.mark.parametrize(("name", "judge"), [("pairwise_ppo", "judge"), ("bt_ppo", "bt_reward")])
def test_the_model_behind_a_reward_counts(
    stage_of: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, name: str, judge: str
) -> None:
    stage, asked = stage_of(name, **{"compute.device": "cpu"}), list[Any]()
    for model in ("sft", "base"):
        write_model(stage.data, model, speaker())
    write_model(stage.data, judge, tiny_llama(0, vocab=len(words()), hidden_size=32))
    for table in ("demonstrations", "prompts"):
        write_table(stage.data, table, ("q", "x"))
    monkeypatch.setattr(room, "check_shapes", lambda stage, compute, trained, frozen, *rest: asked.extend(frozen))
    monkeypatch.setattr("tasks.roles.roles_of", lambda *rest: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(f"tasks.{name}").main(stage)
    assert 32 in {shape.width for shape in asked}


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**20, 2**40)] == ["0 bytes", "1023 bytes", "1.5 KiB", "5.0 MiB", "1.0 TiB"]
