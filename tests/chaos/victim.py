"""A stage of a built project that is started, killed and started again, by hand or by DVC, as a user would do it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from tasks.stage import write_json
from tasks.telemetry import Execution, executions_of
from tests.conftest import Project

LOCKS = {"dvc.lock": "", "methods/dvc.lock": "methods/dvc.yaml:"}  # lock files, and how DVC names the stages of each
PATIENCE = 600.0  # seconds for a stage to end, or to come to a point of the schedule
SECONDS = "seconds.json"  # in the project: how long each stage takes undisturbed, measured once
# How the command is given and what the kill hits: the stage; DVC with its whole group; DVC alone, and the stage stays behind.
Way = Literal["python", "dvc", "dvc alone"]
Place = tuple[str, int]  # a save: its unit (step or piece) and how many of them were done


@dataclass(frozen=True)
class Blow:
    """A kill to come: `wait` seconds after the save of number `save` (or a later one); None: after the command was given."""

    sign: signal.Signals
    save: int | None
    wait: float


@dataclass(frozen=True)
class Hit:
    """A kill that fell. saved: what was saved last of each unit, the last save last. at: when it was over, seconds since 1970;
    lost: seconds since the last save of the killed process, or since its start. finished: the stage was, and DVC at work."""

    sign: str
    at: float
    saved: dict[str, int]
    lost: float
    finished: bool


class Victim:
    """One stage, started and killed."""

    def __init__(self, project: Project, label: str, environment: dict[str, str]) -> None:
        self.project, self.label, self.environment = project, label, environment
        self.lock = lock_of(project, label)
        self.outputs = [project.path(out["path"]) for out in self.recorded()["outs"]]
        undisturbed = [one for one in self.executions() if one.finished and not _told(one.events, "resumed")]
        if not undisturbed:
            raise ValueError(f"{label}: .telemetry tells of no run that was not interrupted; `dvc repro --force` makes one")
        self.saves: list[Place] = [(event["unit"], event["step"]) for event in _told(undisturbed[-1].events, "saved")]

    def recorded(self) -> Any:
        """What DVC's lock file says of the stage."""
        return stages_in(self.project, self.lock).get(self.label)

    def executions(self, since: float = 0.0) -> list[Execution]:
        """Those begun since then; one killed early has told nothing."""
        return [one for one in executions_of(self.project.root, self.label) if one.began >= round(since, 3)]

    def digest(self) -> str:
        """One hash of all outputs, names and bytes; of a missing one too."""
        total = hashlib.sha256()
        for output in self.outputs:
            for path in sorted([output, *output.rglob("*")] if output.is_dir() else [output]):
                total.update(str(path.relative_to(self.project.root)).encode())
                total.update(path.read_bytes() if path.is_file() else b"")
        return total.hexdigest()

    def start(self, way: Way) -> subprocess.Popen[str]:
        """The command that a user would give: the stage's outputs go first."""
        name, _, item = self.label.partition("@")
        by_hand, by_dvc = ["-m", f"tasks.{name}", *filter(None, [item])], ["-m", "dvc", "repro", LOCKS[self.lock] + self.label]
        with self.project.path("chaos.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, *(by_hand if way == "python" else by_dvc)],
                cwd=self.project.root,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def finish(self, way: Way) -> float:
        """The same command to its end; the seconds it took."""
        begun = time.time()
        self._ended(self.start(way), 0)
        return time.time() - begun

    def seconds(self, way: Way) -> float:
        """How long the command takes undisturbed; the first time it is asked it is measured, with the bytes compared."""
        path, key = self.project.path(SECONDS), f"{self.label} {way.split()[0]}"
        known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        if key not in known:
            before = self.digest()
            with self.new(way):
                known[key] = round(self.finish(way), 3)
            assert self.digest() == before, f"{self.label} ended with other bytes undisturbed"
            write_json(path, known)
        return known[key]

    @contextmanager
    def new(self, way: Way) -> Iterator[None]:
        """A stage without unfinished work, and for DVC one that it has never run, or it would not run it; its lock file is put
        back in the end."""
        shutil.rmtree(self.project.path(f".resume/{self.label}"), ignore_errors=True)
        path = self.project.path(self.lock)
        before = path.read_bytes()
        if way != "python":
            content = yaml.safe_load(before)
            del content["stages"][self.label]
            path.write_text(yaml.safe_dump(content, sort_keys=False))
            shutil.rmtree(self.project.path(".dvc/cache/runs"), ignore_errors=True)
        try:
            yield
        finally:
            path.write_bytes(before)

    def strike(self, way: Way, blow: Blow, since: float) -> Hit | None:
        """Give the command and kill what it started, in a run that began at `since`. None: it ended before."""
        begun = time.time()
        child = self.start(way)
        self._come_to(blow, child, begun)
        if child.poll() is None:
            os.killpg(child.pid, blow.sign) if way == "dvc" else child.send_signal(blow.sign)
        killed = self._ended(child, 0, -blow.sign, 128 + blow.sign) != 0
        at, own = time.time(), [event for one in self.executions(begun) for event in one.events]
        finished = bool(_told(own, "finished"))
        if not killed or (finished and way == "python"):  # by hand nothing is left to do
            return None
        saved = {}
        for event in _told([event for one in self.executions(since) for event in one.events], "saved", "resumed"):
            saved.pop(event["unit"], None)
            saved[event["unit"]] = event.get("step", event.get("resumed_at"))
        last = max([begun, *(event["time"] for event in _told(own, "saved"))])
        return Hit(blow.sign.name, at, saved, max(0.0, at - last), finished)

    def _come_to(self, blow: Blow, child: subprocess.Popen[str], begun: float) -> None:
        """Wait for the point of a kill, or the end."""
        if blow.save is not None:
            wanted = set(self.saves[blow.save :])
            while child.poll() is None and time.time() - begun < PATIENCE:
                events = [event for one in self.executions(begun) for event in one.events]
                if any((event["unit"], event["step"]) in wanted for event in _told(events, "saved")):
                    break
                time.sleep(0.01)
        try:
            child.wait(blow.wait)
        except subprocess.TimeoutExpired:
            return

    def _ended(self, child: subprocess.Popen[str], *codes: int) -> int:
        """Wait for a child that has to end with one of some codes."""
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        assert child.returncode in codes, f"{child.args} ended with {child.returncode}; {self._said()}"
        return child.returncode

    def _said(self) -> str:
        return self.project.path("chaos.log").read_text(errors="replace")[-3000:]


def _told(events: Sequence[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """The events of some kinds."""
    return [event for event in events if event.get("event") in kinds]


def went_on(later: Sequence[Execution]) -> dict[str, int]:
    """By unit, where the executions after a kill went on: 0 where they saved one before they said so, and so began anew.

    What was finished already is neither saved nor resumed again.
    """
    first: dict[str, int] = {}
    for event in _told([event for one in later for event in one.events], "saved", "resumed"):
        first.setdefault(event["unit"], event.get("resumed_at", 0))
    return first


def stages_in(project: Project, lock: str) -> dict[str, Any]:
    """The stages of a lock file, none where there is no file."""
    path = project.path(lock)
    return yaml.safe_load(path.read_text())["stages"] if path.is_file() else {}


def lock_of(project: Project, label: str) -> str:
    """The lock file that has a stage."""
    for lock in LOCKS:
        if label in stages_in(project, lock):
            return lock
    raise ValueError(f"no stage {label!r} was built")
