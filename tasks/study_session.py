"""One session of the study: what there is to run, in which order, how many at a time, and how far it has come."""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from apprentice.config import Params
from tasks import process
from tasks.dvcstage import StageStopped, read_stages
from tasks.slots import Slots, slots_of
from tasks.stage import read_params
from tasks.study_figures import recorded
from tasks.study_plan import Job, StudyError, check_named, jobs_of, params_of, read_study
from tasks.study_runs import Experiments, RunFailed, Workspace, refuse_uncommitted


class Session:
    """`jobs` are all that were asked for; `todo` those without an experiment or a record that stands, in the order to begin.

    Runs of one seed share stages. So the first run of a seed goes ahead of the others of that seed, which then find its
    stages in DVC's run cache; `waits_for` names it.
    """

    def __init__(self, jobs: Sequence[Job], experiments: Experiments, slots: Slots) -> None:
        self.experiments, self.slots, self.jobs = experiments, slots, jobs
        here = {job.name for job in jobs if experiments.standing(job)}
        self.standing = here | {job.name for job in jobs if recorded(job, experiments)}
        todo = [job for job in jobs if job.name not in self.standing]
        shared = {job.seed for job in jobs if job.name in here and job.run.measure is None}
        self._first = {job.seed: job.name for job in reversed(todo) if job.seed not in shared}
        self.todo = sorted(todo, key=lambda job: job.name not in self._first.values())
        self._lock, self._began, self._ended = threading.Lock(), time.monotonic(), 0

    def outlook(self) -> str:
        """What is to be done, in a line."""
        places = len(self.slots.places)
        return f"{len(self.jobs)} runs asked for; {len(self.standing)} stand, {len(self.todo)} to run, {places} at a time"

    def waits_for(self, job: Job) -> str | None:
        """The name of the job whose end this one waits for, however it ends."""
        first = self._first.get(job.seed)
        return None if first == job.name else first

    def run(self, job: Job, place: Workspace, say: Callable[[str], None]) -> None:
        """Run one job when there is a place for it; says how long it took and what is left.

        Raises RunFailed, StageStopped when a stage of it alone was asked to stop, or process.Stopped when everything is.
        """
        with self.slots.take(True, say) as device:
            began = time.monotonic()
            try:
                place.run(job, device)
            except RunFailed:
                say(self._line(job, "failed", began))
                raise
            except StageStopped:
                say(self._line(job, "stopped", began))
                raise
            say(self._line(job, "done", began))

    def _line(self, job: Job, how: str, began: float) -> str:
        with self._lock:
            self._ended += 1
            now, ended = time.monotonic(), self._ended
        left = len(self.todo) - ended
        took, rest = (timedelta(seconds=round(seconds)) for seconds in (now - began, (now - self._began) / ended * left))
        return f"{job.name} {how} in {took}; {left} of {len(self.jobs)} runs left" + (f", about {rest}" if left else "")


def prepare(seeds: int, runs: Sequence[str] = (), jobs: int | None = None) -> Session:
    """Check claims, params and commits, and see which experiments stand.

    `jobs` experiments go side by side; None: as many as torch stages in a flow. Raises StudyError for whatever stands in the
    way, before anything is run.
    """
    if seeds < 1 or (jobs is not None and jobs < 1):
        raise StudyError(f"expected at least one seed and one job, got --seeds {seeds} and --jobs {jobs}")
    study, params = read_study(), read_params()
    refuse_uncommitted()
    check_named(study, params, read_stages())
    experiments = Experiments(params)
    asked = jobs_of(study, seeds, runs)
    for job in asked:
        params_of(job, experiments.raw)
        experiments.message(job)
    process.allow()
    return Session(asked, experiments, _places(params, jobs))


def _places(params: Params, jobs: int | None) -> Slots:
    found = slots_of(params).places
    return Slots([found[i % len(found)] for i in range(jobs or len(found))])
