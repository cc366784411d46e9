"""Locks in .dvc/tmp/rwlock whose holder is gone, and the wait for one that is not."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import dvclocks, process
from tasks.dvclocks import drop_stale, holders_in, wait_for_change
from tests.toy import make_toy, run


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the rwlock of an empty project."""
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    monkeypatch.setattr(dvclocks, "ROOT", tmp_path)
    monkeypatch.setattr(dvclocks, "PAUSE", 0.1)
    return tmp_path / ".dvc/tmp/rwlock"


@pytest.fixture
def holder() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that stands for `dvc repro sft`."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", "repro", "sft"])
    yield child
    child.kill()
    child.wait()


def entry(pid: int, cmd: str = "/venv/bin/dvc repro sft") -> dict[str, Any]:
    return {"pid": pid, "cmd": cmd}


def test_entries_of_processes_that_are_gone_or_others_by_now_go(locks: Path, holder: "subprocess.Popen[bytes]") -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    write = {"/a": entry(holder.pid), "/b": entry(gone.pid), "/c": entry(os.getpid()), "/d": entry(holder.pid, "dvc repro rso")}
    read = {"/e": [entry(holder.pid), entry(gone.pid)], "/f": [entry(os.getpid())]}
    locks.write_text(json.dumps({"write": write, "read": read}))
    drop_stale()
    left = json.loads(locks.read_text())
    assert left == {"write": {"/a": entry(holder.pid)}, "read": {"/e": [entry(holder.pid)]}}


@pytest.mark.parametrize("cut", ["", '{"write": {"/a'])
def test_a_file_that_was_cut_short_goes(locks: Path, cut: str) -> None:
    locks.write_text(cut)
    drop_stale()
    assert not locks.exists()


def test_no_file_is_no_lock(locks: Path) -> None:
    drop_stale()
    assert not locks.exists()


def test_the_command_says_what_it_took_out_and_who_holds_what(
    locks: Path, holder: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> list[str]:
        dvclocks.main()
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(sys, "argv", ["dvclocks"])
    write, read = {"/a": entry(holder.pid), "/b": entry(os.getpid())}, {"/c": [entry(os.getpid(), "dvc status")]}
    locks.write_text(json.dumps({"write": write, "read": read}))
    held = f"held: /a, written by `/venv/bin/dvc repro sft` (pid {holder.pid})"
    gone = f"taken out: /b, written by `/venv/bin/dvc repro sft` (pid {os.getpid()})"
    assert said() == [gone, f"taken out: /c, read by `dvc status` (pid {os.getpid()})", held]
    assert said() == [held]
    locks.write_text('{"write": {"/a')
    free = "no path is held: the next `dvc` is free to begin"
    assert said() == [f"taken out: the whole of {locks}, which was cut short", free]
    assert said() == [free]


@pytest.mark.slow
@pytest.mark.parametrize("left", ["another's id", "cut short"])
def test_a_dvc_by_hand_is_free_again_after_the_command(tmp_path: Path, left: str) -> None:
    """As after a power cut, or in a container that was started again."""
    toy = make_toy(tmp_path / "toy")
    stale = {"write": {str(toy.path("data/clean")): entry(os.getpid())}, "read": {}}
    toy.path(".dvc/tmp").mkdir(parents=True, exist_ok=True)
    toy.path(".dvc/tmp/rwlock").write_text(json.dumps(stale) if left == "another's id" else '{"write": {"/a')
    assert run(toy, "-m", "dvc", "repro", "prepare").returncode != 0
    assert run(toy, "-m", "tasks.dvclocks").stdout.startswith("taken out: ")
    done = run(toy, "-m", "dvc", "repro", "prepare")
    assert done.returncode == 0, done.stdout


def test_a_holder_is_told_with_its_command_and_since_when(holder: "subprocess.Popen[bytes]") -> None:
    printed = [
        "ERROR: failed to reproduce 'sft': '/p/data' is busy, it is being blocked by:",
        f"  (PID {holder.pid}): dvc repro",
    ]
    said = holders_in(printed)[holder.pid]
    assert said.startswith(f"`dvc repro` (pid {holder.pid}, since {time.strftime('%Y-%m-%d')}") and holders_in(["sft"]) == {}
    assert holders_in(["  (PID 999999999): dvc"])[999999999] == "`dvc` (pid 999999999, which has ended)"


def test_the_wait_ends_with_the_holder(locks: Path, holder: "subprocess.Popen[bytes]") -> None:
    locks.write_text(json.dumps({"write": {"/a": entry(holder.pid)}, "read": {}}))
    waiting = threading.Thread(target=wait_for_change)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    holder.kill()
    waiting.join(10)
    assert not waiting.is_alive() and json.loads(locks.read_text())["write"] == {}


def test_the_wait_ends_when_everything_is_stopped(locks: Path) -> None:
    process.stop_all()
    try:
        with pytest.raises(process.Stopped):
            wait_for_change()
    finally:
        process.allow()
