"""Kill running stages by a seeded schedule, run the same command again, compare the outputs with the undisturbed ones.

`python -m tests.chaos.kills` builds a project of the smoke preset in a temporary folder, then kills and prints the table.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.preset import apply
from tasks.telemetry import Execution, executions_of
from tests.conftest import ROOT, Project, copy_project

RESULTS = ROOT / "tests" / "chaos" / "results.md"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)  # drawn from: two in three like a power cut
PATIENCE = 300.0  # seconds for a stage to come to a point of the schedule
NO_STAGE_OF_BYTES = ("register", "register_methods")  # what they write holds ids that the registry gives


@dataclass(frozen=True)
class Killed:
    """One kill. saved: the last step (or piece) saved before it, None where nothing is saved on the way. resumed: what the next
    run said it goes on after. lost: seconds from that save to the kill. same: whether the bytes in the end were the same."""

    stage: str
    sign: str
    saved: int | None
    total: int
    resumed: int | None
    lost: float
    same: bool

    @property
    def good(self) -> bool:
        """The same bytes, and nothing done again that had been saved (a kill may fall between a save and its note)."""
        return self.same and (self.saved is None or (self.resumed is not None and self.resumed >= self.saved))


class Victim:
    """A stage of a built project, started and killed by hand."""

    def __init__(self, project: Project, label: str, environment: dict[str, str]) -> None:
        self.project, self.label, self.environment = project, label, environment
        self.outputs = outputs_in_lock(project, label)
        undisturbed = [one for one in executions_of(project.root, label) if one.finished and _resumed(one.events) is None]
        self.points = [event["step"] for event in undisturbed[-1].events if event["event"] == "saved"]
        self.seconds = undisturbed[-1].ended - undisturbed[-1].began

    def last(self) -> Execution:
        """The execution begun last."""
        return list(executions_of(self.project.root, self.label))[-1]

    def since(self, begun: float) -> Sequence[dict[str, Any]]:
        """The events of the execution begun last, if that was not before; killed early, it has told nothing."""
        last = self.last()
        return last.events if last.began >= begun else ()

    def start(self) -> subprocess.Popen[str]:
        """The command that a user would give: the stage's outputs go first."""
        name, _, item = self.label.partition("@")
        command = [sys.executable, "-m", f"tasks.{name}", *filter(None, [item])]
        return subprocess.Popen(
            command, cwd=self.project.root, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kill_at(self, point: int | None, wait: float, sign: signal.Signals) -> tuple[int | None, float] | None:
        """Run up to a save (or for a while), then kill; the step saved last and the seconds lost. None: it ended before."""
        begun = round(time.time(), 3)  # as the telemetry has it
        child = self.start()
        while child.poll() is None and time.time() - begun < PATIENCE:
            done = [event for event in self.since(begun) if event["event"] == "saved"]
            if point is None or any(event["step"] >= point for event in done):
                break
            time.sleep(0.005)
        time.sleep(wait)
        child.send_signal(sign)
        said, _ = child.communicate()
        if child.returncode not in (-sign, 128 + sign):
            assert child.returncode == 0, said
            return None
        events = self.since(begun)
        saves = [event for event in events if event["event"] == "saved"]
        if saves:
            return saves[-1]["step"], max(0.0, time.time() - saves[-1]["time"])
        return _resumed(events), time.time() - begun

    def finish(self) -> None:
        """The same command to its end."""
        child = self.start()
        said, _ = child.communicate()
        assert child.returncode == 0, said

    def resumed_at(self) -> int | None:
        """What the execution begun last went on after."""
        return _resumed(self.last().events)

    def digest(self) -> str:
        """One hash of all outputs, names and bytes; of a missing one too."""
        total = hashlib.sha256()
        for output in self.outputs:
            for path in sorted([output, *output.rglob("*")] if output.is_dir() else [output]):
                total.update(str(path.relative_to(self.project.root)).encode())
                total.update(path.read_bytes() if path.is_file() else b"")
        return total.hexdigest()


def _resumed(events: Sequence[dict[str, Any]]) -> int | None:
    """The step an execution went on after."""
    return next((event["resumed_at"] for event in events if event["event"] == "resumed"), None)


def outputs_in_lock(project: Project, label: str) -> list[Path]:
    """The outputs of a stage, as the lock files of the build have them."""
    for name in ("dvc.lock", "methods/dvc.lock"):
        path = project.path(name)
        stages = yaml.safe_load(path.read_text())["stages"] if path.is_file() else {}
        if label in stages:
            return [project.path(out["path"]) for out in stages[label]["outs"]]
    raise ValueError(f"no stage {label!r} was built")


def labels_built(project: Project) -> list[str]:
    """The stages that were built and have bytes to compare."""
    names = [name for name in ("dvc.lock", "methods/dvc.lock") if project.path(name).is_file()]
    found = [label for name in names for label in yaml.safe_load(project.path(name).read_text())["stages"]]
    return [label for label in found if label not in NO_STAGE_OF_BYTES]


def kill_stage(victim: Victim, kills: int, rng: random.Random) -> list[Killed]:
    """Kill one run of a stage several times, each a while later in its work, then let it end; a record for each kill."""
    undisturbed = victim.digest()
    records: list[dict[str, Any]] = []
    for point in sorted(rng.sample(victim.points, min(kills, len(victim.points)))) or [None] * kills:
        sign = rng.choice(SIGNALS)
        wait = rng.uniform(0.0, 0.1) if point is not None else rng.uniform(0.0, max(0.5, victim.seconds))
        killed = victim.kill_at(point, wait, sign)
        if records:  # the run just killed is the one that went on from the kill before
            records[-1]["resumed"] = victim.resumed_at()
        if killed is None:
            break
        saved, lost = killed
        records.append({"sign": sign.name, "saved": saved, "lost": lost})
    victim.finish()
    if records and "resumed" not in records[-1]:
        records[-1]["resumed"] = victim.resumed_at()
    same = victim.digest() == undisturbed
    return [Killed(victim.label, **record, total=len(victim.points), same=same) for record in records]


def schedule(labels: Sequence[str], most: int, seed: int) -> Iterator[tuple[str, int, random.Random]]:
    """Stages in a drawn order, round after round, one to `most` kills each, for ever."""
    rng = random.Random(f"{seed}/chaos")
    while True:
        for label in rng.sample(labels, len(labels)):
            yield label, rng.randint(1, most), random.Random(f"{seed}/{label}/{rng.random()}")


def chaos(
    project: Project, kills: int, seed: int, environment: dict[str, str], labels: Sequence[str], most: int
) -> list[Killed]:
    """That many kills over stages of a built project, at most so many of one run."""
    records: list[Killed] = []
    for label, count, rng in schedule(labels, most, seed):
        if len(records) >= kills:
            return records
        records += kill_stage(Victim(project, label, environment), min(count, kills - len(records)), rng)
        bad = [record for record in records if record.stage == label and not record.good]
        print(f"{len(records)}/{kills} {label}: {bad or 'as undisturbed'}", flush=True)
    raise AssertionError("the schedule has no end")


def table(records: Sequence[Killed], seed: int) -> str:
    """The records in markdown, a line a stage."""
    good = sum(record.good for record in records)
    lines = [
        f"{len(records)} kills, seed {seed}: {good} ended with the undisturbed bytes and did nothing again that was saved.",
        "",
        "| stage | kills | saved at the kill | of saves | resumed at | most seconds lost | same bytes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage in sorted({record.stage for record in records}):
        own = [record for record in records if record.stage == stage]
        signs = ", ".join(sorted({record.sign for record in own}))
        saved, resumed = (
            ", ".join("-" if value is None else str(value) for value in column)
            for column in ([record.saved for record in own], [record.resumed for record in own])
        )
        lost, same = max(record.lost for record in own), "yes" if all(record.same for record in own) else "NO"
        lines.append(f"| {stage} | {len(own)} ({signs}) | {saved} | {own[0].total} | {resumed} | {lost:.2f} | {same} |")
    return "\n".join(lines) + "\n"


def build(root: Path) -> tuple[Project, dict[str, str]]:
    """A project of the smoke preset with every stage built, each step saved; one that stands there is brought up to date."""
    project = Project(root)
    if not root.exists():
        copy_project(root)
        apply("smoke", root)
        project.set(runtime__checkpoint_steps=1)
        project.path(".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(root), "PATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-P"], cwd=root, env=environment, check=True)
    return project, environment


def main() -> int:
    """Build, kill, write the table; 1 if any kill was not as undisturbed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kills", description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=120, help="how many (default 120: each stage once or twice, about an hour)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument("--project", type=Path, help="a folder to build in, or one built so before (default: a temporary one)")
    options = parser.parse_args()
    root = options.project or Path(tempfile.mkdtemp(prefix="chaos-")) / "project"
    project, environment = build(root)
    records = chaos(project, options.kills, options.seed, environment, labels_built(project), most=2)
    RESULTS.write_text(table(records, options.seed))
    print(table(records, options.seed), f"written to {RESULTS.relative_to(ROOT)}", sep="\n")
    return 0 if all(record.good for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
