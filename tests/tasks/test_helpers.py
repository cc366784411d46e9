"""A stage in several processes: the same curve as in one, and no process outlives another."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apprentice.demonstrations import demonstration, write_demonstrations
from tasks import helpers
from tasks.stage import Stage, StageError
from tests.apprentice.toys import tiny_llama
from tests.conftest import Project
from tests.tables import write_model
from tests.toy import runs, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc"),
]
Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def place(project: Project) -> Project:
    """A project with a base and tables, for `sft` of some seconds that saves every step."""
    project.without_git()
    project.set(
        compute__processes=2,
        compute__device="cpu",
        compute__forward_tokens=16,
        runtime__checkpoint_steps=1,
        sft__epochs=40,
        sft__batch_size=8,
        sft__gate_prompts=2,
        sft__gate_samples=2,
    )
    words = ["p", "x", "y", "q"]
    for name, count in (("demonstrations", 16), ("validation", 4)):
        rows = [
            demonstration(f"{name[0]} {words[i % 4]} {words[i // 4 % 4]}", " ".join(words[: 1 + i % 3]), "test")
            for i in range(count)
        ]
        write_demonstrations(project.path(f"data/clean/{name}.jsonl"), rows)
    write_model(project.path("data"), "base", tiny_llama(0, vocab=12))
    return project


@pytest.fixture
def begin(place: Project, tmp_path: Path) -> Begin:
    """Start `sft` as DVC does, what it says in a file; temporary folders in one of its own."""
    (tmp_path / "scratch").mkdir()

    def start() -> "subprocess.Popen[str]":
        own = {"PYTHONPATH": str(place.root), "DVC_STAGE": "sft", "TMPDIR": str(tmp_path / "scratch")}
        with place.path("said.txt").open("w") as said:
            command = [sys.executable, "-m", "tasks.sft"]
            return subprocess.Popen(command, cwd=place.root, env={**os.environ, **own}, stdout=said, stderr=said, text=True)

    return start


def said(place: Project) -> str:
    return place.path("said.txt").read_text()


def curve(place: Project) -> list[dict[str, float]]:
    with place.path("data/reports/sft/history.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def steps(place: Project) -> int:
    path = place.path("data/reports/sft/history.csv")
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def helper_of(child: "subprocess.Popen[str]") -> int:
    """The process beside the stage: the one below its keeper."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    (found,) = (pid for pid, parent in parents.items() if parents.get(parent) == child.pid)
    return found


def test_whatever_ends_it_goes_on_and_comes_to_the_curve_of_one_process(place: Project, begin: Begin, tmp_path: Path) -> None:
    child = begin()
    wait_for(lambda: steps(place) >= 3, log=place.path("said.txt"))
    helper = helper_of(child)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 128 + signal.SIGTERM and "is saved, and the same command goes on from there" in said(place)
    wait_for(lambda: not runs(helper), 20)
    assert list((tmp_path / "scratch").iterdir()) == []

    before, child = steps(place), begin()
    wait_for(lambda: steps(place) >= before + 3, log=place.path("said.txt"))
    helper = helper_of(child)
    os.kill(helper, signal.SIGKILL)
    assert child.wait(60) == 2
    assert "process 1 of 2 ended; it said last" in said(place) and "goes on from the last snapshot" in said(place)
    assert "continuing after step" in said(place) and list((tmp_path / "scratch").iterdir()) == []

    before, child = steps(place), begin()
    wait_for(lambda: steps(place) >= before + 3, log=place.path("said.txt"))
    helper = helper_of(child)
    child.kill()
    child.wait()
    wait_for(lambda: not runs(helper), 20)

    assert begin().wait(120) == 0, said(place)
    assert "2 processes share the work" in said(place) and "continuing after step" in said(place)
    shared = curve(place)
    place.set(compute__processes=1)
    for left in ("data/models/sft", ".resume/sft"):  # as DVC does, and a stage once dvc.lock has the work
        shutil.rmtree(place.path(left))
    assert begin().wait(120) == 0, said(place)
    alone = curve(place)
    assert len(shared) == len(alone) == 80 and "continuing" not in said(place)
    for row, other in zip(shared, alone, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_helper_reads_the_reports_of_other_stages_and_has_its_own_to_itself(
    stage_of: Callable[..., Stage], tmp_path: Path
) -> None:
    """`target` reads what `ingest` reports, `continued_sft` the history of `srppo`."""
    stage = stage_of("sft")
    for name in ("ingest", stage.name):
        (stage.data / "reports" / name).mkdir(parents=True, exist_ok=True)
        (stage.data / "reports" / name / "metrics.json").write_text(name)
    stage.helper = {"key": "k"}
    helpers.link_project(stage, tmp_path / "1")
    reports = tmp_path / "1" / "data" / "reports"
    assert (reports / "ingest" / "metrics.json").read_text() == "ingest" and not (reports / stage.name).exists()
    (reports / stage.name).mkdir()
    (reports / stage.name / "metrics.json").write_text("the helper's")
    assert (stage.data / "reports" / stage.name / "metrics.json").read_text() == stage.name


def test_models_spread_over_processes_come_to_the_model_of_one_and_their_snapshots_go_on_either_way(
    place: Project, begin: Begin
) -> None:
    """Two processes that are stopped, one that is, two again; and one that never was."""
    place.set(compute__sharding=True, compute__gradient_checkpointing=True, sft__select="held_out_loss")
    for changes in (
        {"compute__processes": 1, "compute__sharding": False},
        {"compute__processes": 2, "compute__sharding": True},
    ):
        before, child = steps(place), begin()
        wait_for(lambda before=before: steps(place) >= before + 3, log=place.path("said.txt"))
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 128 + signal.SIGTERM and "is saved, and the same command goes on from there" in said(place)
        assert ("with models spread over 2 processes" in said(place)) == (changes["compute__processes"] == 1)
        place.set(**changes)
    assert steps(place) < 80 and begin().wait(120) == 0, said(place)
    assert "continuing after step" in said(place) and "with models spread over 2 processes" in said(place)
    found, model = curve(place), load_file(place.path("data/models/sft/model.safetensors"))
    config = place.path("data/models/sft/config.json").read_text()

    place.set(compute__processes=1, compute__sharding=False)
    for left in ("data/models/sft", ".resume/sft"):  # as DVC does, and a stage once dvc.lock has the work
        shutil.rmtree(place.path(left))
    assert begin().wait(120) == 0, said(place)
    alone = load_file(place.path("data/models/sft/model.safetensors"))
    assert config == place.path("data/models/sft/config.json").read_text()
    assert model.keys() == alone.keys() and "continuing" not in said(place)
    for name, tensor in model.items():
        torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=0)
    for row, other in zip(found, curve(place), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("device", "told"), [("cuda", "need a device each, and 1 can be seen"), ("mps", "MPS is one device")])
def test_more_processes_than_devices_are_refused(device: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    helpers._check_devices(4, torch.device("cpu"))
    helpers._check_devices(1, torch.device("cuda"))
    with pytest.raises(StageError, match=rf"compute\.processes: 2 processes .*{told}"):
        helpers._check_devices(2, torch.device(device))
