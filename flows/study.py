"""The study as a Prefect flow: `python -m flows.study --seeds 5` runs study/claims.yaml and publishes what came of it.

One task per run and seed, a DVC experiment each. What was run before stands and is not run again; a study that was stopped
goes on from there.
"""

import argparse
from signal import SIGINT

from flows.command import STOPPED, exit_code, study_options, use_running_server

if __name__ == "__main__":
    OPTIONS = study_options()  # before the slow imports: --help answers at once
    if not OPTIONS.report_only:
        use_running_server()  # before Prefect reads its settings

from prefect import allow_failure, flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture, wait
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.server import ServerError, ensure_server
from tasks.dvcstage import StageStopped
from tasks.process import Stopped, stop_all
from tasks.stage import StageError
from tasks.study_figures import record
from tasks.study_plan import Job, jobs_of, read_study
from tasks.study_report import headline, publish, published
from tasks.study_runs import RunFailed, Workspace, workspace
from tasks.study_session import Session, prepare

SEEDS = 5


@task(task_run_name="{job.name}", persist_result=False, cache_policy=NO_CACHE)
def run_job(job: Job, session: Session, place: Workspace) -> State:
    """Run one job as a DVC experiment; its time and what is left go to the log, of one that failed the last lines too."""
    log = get_run_logger()
    try:
        session.run(job, place, log.info)
    except StageStopped as stop:
        return Cancelled(message=str(stop))
    except Stopped:
        return Cancelled(message="stopped with the flow")
    except RunFailed as error:  # as a state, not a traceback: what the run printed says more
        log.error("%s", error)
        return Failed(message=str(error).splitlines()[0])
    return Completed(message="ran")


@flow(name="study")
def study(seeds: int = SEEDS, runs: list[str] | None = None, jobs: int | None = None) -> list[State] | State:
    """Run what does not stand yet, then record the figures of all that does and publish."""
    session, log = prepare(seeds, runs or [], jobs), get_run_logger()
    log.info(session.outlook())
    states: list[State] = []
    if session.todo:
        try:
            with workspace(session.experiments) as place:
                states = run_all(session, place)
        except (KeyboardInterrupt, TerminationSignal) as stop:
            return Cancelled(message=STOPPED[getattr(stop, "signal", SIGINT)])
    record(jobs_of(read_study(), seeds), runs or [], session.experiments, log.info)
    create_markdown_artifact(publish(seeds), key="claims", description="claims of the papers, tested")
    return states


def run_all(session: Session, place: Workspace) -> list[State]:
    """Run the session's jobs in their order, as many side by side as it has places; one that fails stops no other."""
    futures: dict[str, PrefectFuture] = {}
    try:
        for job in session.todo:
            first = session.waits_for(job)
            futures[job.name] = run_job.submit(job, session, place, wait_for=[allow_failure(futures[first])] if first else [])
        wait(list(futures.values()))
    except BaseException:  # Ctrl-C, a termination, a cancelled run
        stop_all()
        raise
    return [future.state for future in futures.values()]


def main(options: argparse.Namespace) -> int:
    """Run and publish, or only publish; returns the exit code."""

    def run() -> State:
        if options.report_only:
            publish(options.seeds)
            return Completed()
        asked = (SEEDS if options.seeds is None else options.seeds, options.runs, options.jobs)
        runner = ThreadPoolTaskRunner(max_workers=len(prepare(*asked).slots.places))
        ensure_server()
        return study.with_options(task_runner=runner)(*asked, return_state=True)

    code = exit_code(run, StageError, ServerError, ValueError)
    if not code:
        print(f"\n{headline(published())}")
    return code


if __name__ == "__main__":
    raise SystemExit(main(OPTIONS))
