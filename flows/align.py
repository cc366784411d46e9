"""The main line as a Prefect flow: `python -m flows.align`; with `--methods` every further method too.

One task per DVC stage, under the stage's name. DVC's graph is the only source of the order; independent stages go side by
side. What a stage does is in tasks/, with which settings in params.yaml, and whether it has to run only DVC knows.
"""

from signal import SIGINT

from flows.command import STOPPED, align_options, exit_code, use_running_server

if __name__ == "__main__":
    OPTIONS = align_options()  # before the slow imports: --help answers at once
    use_running_server()  # before Prefect reads its settings

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture, wait
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner

from flows.server import ServerError, ensure_server
from tasks.dvcstage import StageInfo
from tasks.repro import PlanError, bring_up_to_date, comparison, first_table, plan, stop_all, tell
from tasks.slots import Slots

NEXT = """
Look next at
  data/reports/{page:<21}the whole report, opens offline
  make ui                           runs and model versions in MLflow, the flow in Prefect
  dvc metrics show, dvc plots show  the figures and curves as DVC has them
  models:/apprentice@champion       the best model, for mlflow.transformers.load_model"""


@flow(name="align", task_runner=ThreadPoolTaskRunner(max_workers=64))
def align(only: list[str] | None = None, force: bool = False, methods: bool = False) -> list[State] | State:
    """Bring the main line, with `methods` every further method too, or only the stages named, up to date."""
    stages, slots, retries = plan(only or [], methods)
    try:
        with slots.warm():
            states = run_all(stages, slots, retries, force)
    except (KeyboardInterrupt, TerminationSignal) as stop:
        return Cancelled(message=STOPPED[getattr(stop, "signal", SIGINT)])
    tell(states)
    if (text := comparison(methods)) and all(state.is_completed() for state in states.values()):
        create_markdown_artifact(text, key="comparison", description="every model, with 95% intervals")
    return list(states.values())


def run_all(stages: list[StageInfo], slots: Slots, retries: int, force: bool) -> dict[str, State]:
    """Run the stages, each once those it needs are up to date; one that fails stops only what needs it."""
    futures: dict[str, PrefectFuture] = {}
    try:
        for stage in stages:
            needs = [futures[name] for name in stage.upstream if name in futures]
            one = bring_up_to_date.with_options(name=stage.name, retries=retries)
            futures[stage.name] = one.submit(stage, slots, force, wait_for=needs)
        wait(list(futures.values()))
    except BaseException:  # Ctrl-C, a termination, a cancelled run
        stop_all()
        raise
    return {name: future.state for name, future in futures.items()}


def main(only: list[str], force: bool, methods: bool) -> int:
    """Run the flow, print the table and where to look next; returns the exit code."""

    def run() -> State:
        plan(only, methods)
        ensure_server()
        return align(only, force, methods, return_state=True)

    if code := exit_code(run, PlanError, ServerError, ValueError):
        return code
    if text := comparison(methods):
        print(f"\n{first_table(text)}\n{NEXT.format(page='methods.html' if methods else 'report.html')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(OPTIONS.only, OPTIONS.force, OPTIONS.methods))
