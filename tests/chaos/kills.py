"""Kill running stages by a seeded schedule, give the same command again, compare the outputs with the undisturbed ones.

`python -m tests.chaos.kills` builds a project of the smoke preset in a temporary folder, then kills and prints the table.
A killed process is no power cut: what it had written, the kernel still has. What is on disk when is tested with the writers.
"""

import argparse
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

from tasks.preset import apply
from tasks.stage import address_of
from tests.chaos.victim import LOCKS, Blow, Hit, Victim, Way, stages_in, went_on
from tests.conftest import ROOT, Project, copy_project

RESULTS = ROOT / "tests" / "chaos" / "results.md"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)  # drawn from: two in three leave the process no time to save
AT_ANY_MOMENT = 1 / 3  # share of the kills drawn over all the time that a stage takes, start and end too; the rest after saves
SOON = 0.1  # seconds after a save within which those fall
BY_DVC, TWICE = 5, 5  # every so many runs through DVC, or killed twice
WAYS: dict[Way, str] = {"python": "by hand", "dvc": "of DVC and its stage", "dvc alone": "of DVC alone"}
NO_STAGE_OF_BYTES = ("register", "register_methods")  # what they write holds ids that the registry gives


@dataclass(frozen=True)
class Run:
    """A stage's work from its first command to its end, with so many kills."""

    label: str
    way: Way
    kills: int
    rng: random.Random


@dataclass(frozen=True)
class Killed:
    """One kill of a run (by number). of: the saves of an undisturbed run. resumed: by unit, where what came next went on (0: it
    began anew). same: the run ended with the undisturbed bytes, and DVC recorded the same of them."""

    run: int
    stage: str
    way: Way
    hit: Hit
    of: int
    resumed: dict[str, int]
    same: bool

    @property
    def kept(self) -> bool:
        """Whether nothing was done again that had been saved (a kill may fall between a save and its note)."""
        return all(self.resumed.get(unit, done) >= done for unit, done in self.hit.saved.items())

    @property
    def good(self) -> bool:
        """The same bytes, and nothing that was saved done again; from zero only where nothing had been saved."""
        return self.same and self.kept


def draw(victim: Victim, way: Way, rng: random.Random) -> Blow:
    """Draw a kill."""
    sign = rng.choice(SIGNALS)
    if not victim.saves or rng.random() < AT_ANY_MOMENT:
        return Blow(sign, None, rng.uniform(0.0, victim.seconds(way)))
    return Blow(sign, rng.randrange(len(victim.saves)), rng.uniform(0.0, SOON))


def kill_run(number: int, victim: Victim, run: Run) -> list[Killed]:
    """Carry out a run; a record for each kill that fell, none where it ended before the first."""
    blows = [draw(victim, run.way, run.rng) for _ in range(run.kills)]
    undisturbed, begun = (victim.digest(), victim.recorded()), time.time()
    hits: list[Hit] = []
    with victim.new(run.way):
        for one in blows:
            hit = victim.strike(run.way, one, begun)
            if hit is None:
                break
            hits.append(hit)
        else:
            victim.finish(run.way)
        same = (victim.digest(), victim.recorded()) == undisturbed
    assert hits or same, f"{run.label} ended with other bytes undisturbed"
    resumed = [went_on(victim.executions(hit.at)) for hit in hits]
    return [
        Killed(number, run.label, run.way, hit, len(victim.saves), after, same)
        for hit, after in zip(hits, resumed, strict=True)
    ]


def schedule(labels: Sequence[str], seed: int) -> Iterator[Run]:
    """Runs of the stages in a drawn order, round after round, for ever: most with one kill, most by hand."""
    rng, number = random.Random(f"{seed}/chaos"), 0
    while True:
        for label in rng.sample(labels, len(labels)):
            way: Way = rng.choice(("dvc", "dvc alone")) if number % BY_DVC == BY_DVC - 1 else "python"
            yield Run(label, way, 2 if number % TWICE == 1 else 1, random.Random(f"{seed}/{label}/{rng.random()}"))
            number += 1


def chaos(project: Project, runs: int, seed: int, environment: dict[str, str], labels: Sequence[str]) -> Iterator[Killed]:
    """The kills of the schedule, up to so many runs that were killed."""
    done, plan = 0, schedule(labels, seed)
    while done < runs:
        run = next(plan)
        found = kill_run(done, Victim(project, run.label, environment), run)
        done += bool(found)
        bad = [record for record in found if not record.good]
        print(f"{done}/{runs} {run.label}: {bad or f'{len(found)} kills {WAYS[run.way]}, as undisturbed'}", flush=True)
        yield from found


def table(records: Sequence[Killed], seed: int) -> str:
    """The records in markdown, a line a stage."""
    runs = {record.run: record.same for record in records}
    saved = [record for record in records if record.hit.saved]
    ways = ", ".join(f"{sum(record.way == way for record in records)} {words}" for way, words in WAYS.items())
    lines = [
        f"Seed {seed}: {len(records)} kills ({ways}) in {len(runs)} runs. The final outputs of each run were compared with the "
        f"undisturbed ones: {sum(runs.values())} of {len(runs)} identical.",
        f"{len(saved)} kills fell after a save; after {sum(record.kept for record in saved)} of them nothing saved was done "
        "again.",
        "",
        "| stage | kills | runs compared | identical | saved at the kill | of saves | resumed at | most seconds lost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage in sorted({record.stage for record in records}):
        own = [record for record in records if record.stage == stage]
        kills = ", ".join(f"{record.hit.sign} {WAYS[record.way]}" for record in own)
        compared = {record.run: record.same for record in own}
        where = [(_places(record.hit.saved) + ", finished" * record.hit.finished, _places(record.resumed)) for record in own]
        at, resumed = ("; ".join(column) for column in zip(*where, strict=True))
        lost = f"{max(record.hit.lost for record in own):.2f}"
        cells = (stage, f"{len(own)} ({kills})", len(compared), sum(compared.values()), at, own[0].of, resumed, lost)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _places(done: dict[str, int]) -> str:
    return ", ".join(f"{unit} {number}" for unit, number in done.items()) or "-"


def labels_built(project: Project) -> list[str]:
    """The stages that were built and have bytes to compare."""
    return [label for lock in LOCKS for label in stages_in(project, lock) if label not in NO_STAGE_OF_BYTES]


def build(root: Path, stages: Sequence[str]) -> tuple[Project, dict[str, str]]:
    """A project of the smoke preset with these stages built (none: all), each step saved; one that stands there is brought up
    to date."""
    project = Project(root)
    if not root.exists():
        copy_project(root)
        apply("smoke", root)
        project.set(runtime__checkpoint_steps=1)
        project.without_git()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(root), "PATH": path, "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    targets = [address_of(stage) for stage in stages] or ["-P"]
    subprocess.run([sys.executable, "-m", "dvc", "repro", *targets], cwd=root, env=environment, check=True)
    return project, environment


def main() -> int:
    """Build, kill, write the table; 1 if any kill was not as undisturbed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kills", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="how many, each killed once or twice (default: 100, 120 kills)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument("--project", type=Path, help="a folder to build in, or one built so before (default: a temporary one)")
    parser.add_argument("--stages", nargs="+", default=[], help="build and kill these alone, e.g. judge evaluate@sft")
    options = parser.parse_args()
    root = options.project or Path(tempfile.mkdtemp(prefix="chaos-")) / "project"
    project, environment = build(root.resolve(), options.stages)
    records: list[Killed] = []
    for record in chaos(project, options.runs, options.seed, environment, options.stages or labels_built(project)):
        records.append(record)
        RESULTS.write_text(table(records, options.seed))
    print(table(records, options.seed), f"written to {RESULTS.relative_to(ROOT)}", sep="\n")
    return 0 if all(record.good for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
