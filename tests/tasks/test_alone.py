"""Two processes at one thing, and a stage whose DVC was killed."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from tasks.alone import hold
from tests.conftest import ROOT, Project
from tests.toy import begin, make_toy, run, runs, wait_for

HOLDER = "import pathlib, sys, time; from tasks.alone import hold; held = hold(pathlib.Path(sys.argv[1]), print); "
HOLDER += "print('held', flush=True); time.sleep(300)"
STAGE = '''
"""Stands for a training that saves when it is asked to stop."""
import os, pathlib, time
from tasks.stage import run


def main(stage):
    stage.stoppable = True
    with open("begun", "a") as file:
        print(os.getpid(), file=file)
    while not stage.stop_signal and not pathlib.Path("go").exists():
        time.sleep(0.05)
    if stage.stop_signal:
        pathlib.Path("saved").touch()
        raise SystemExit(143)
    pathlib.Path("data/clean").mkdir(parents=True)
    pathlib.Path("data/reports/prepare").mkdir(parents=True, exist_ok=True)
    pathlib.Path("data/reports/prepare/metrics.json").write_text("{}")


run(__name__, main, __doc__)
'''


def test_the_second_waits_for_the_first_and_says_who_it_is(tmp_path: Path) -> None:
    path, said, waited = tmp_path / "locks" / "one.lock", [], []
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout and first.stdout.readline() == "held\n"

    def second() -> None:
        file, had_to_wait = hold(path, said.append)
        waited.append(had_to_wait)
        file.close()

    thread = threading.Thread(target=second)
    thread.start()
    wait_for(lambda: said)
    assert f"-c {path}` (pid {first.pid}, since 20" in said[0] and not waited
    first.kill()
    first.wait()
    thread.join(10)
    assert waited == [True] and str(os.getpid()) in path.read_text() and str(first.pid) not in path.read_text()
    assert hold(path, said.append)[1] is False


@pytest.fixture
def toy(tmp_path: Path) -> Project:
    """A toy whose first stage is a program of ours."""
    toy = make_toy(tmp_path / "toy")
    pipeline = yaml.safe_load(toy.path("dvc.yaml").read_text())
    pipeline["stages"]["prepare"]["cmd"] = "python -m tasks.sft"
    toy.path("dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    toy.path("tasks/sft.py").write_text(STAGE)
    return toy


def begun(toy: Project) -> list[int]:
    return [int(pid) for pid in toy.path("begun").read_text().split()] if toy.path("begun").exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])  # the one may stay as DVC's child, the other becomes the stage
def test_a_stage_whose_dvc_is_killed_saves_and_ends(toy: Project, shell: str) -> None:
    child, log = begin(toy, "-m", "dvc", "repro", "prepare", SHELL=shell), toy.path("output.txt")
    wait_for(lambda: begun(toy), log=log)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    toy_again = begin(toy, "-m", "dvc", "repro", "prepare", SHELL=shell)
    wait_for(lambda: len(begun(toy)) == 2, log=log)
    assert not runs(begun(toy)[0]) and toy.path("saved").exists()
    toy.path("go").touch()
    assert toy_again.wait(120) == 0, log.read_text()
    assert run(toy, "-m", "dvc", "status", "prepare").stdout.strip().endswith("up to date.")


@pytest.mark.slow
def test_a_stage_whose_dvc_was_gone_before_it_looked_ends(toy: Project) -> None:
    """Whoever stands for DVC ends at once, the stage has yet to import what it needs: nothing is to be saved."""
    dvc = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-m', 'tasks.sft']).pid)"
    assert begin(toy, "-c", dvc, DVC_STAGE="prepare").wait(60) == 0
    stage = int(toy.path("output.txt").read_text().split()[0])
    wait_for(lambda: not runs(stage), log=toy.path("output.txt"))
    assert "Traceback" not in toy.path("output.txt").read_text() and not toy.path("data/clean").exists()
