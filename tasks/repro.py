"""The Prefect task that brings one DVC stage up to date, and what a flow needs around it.

Nothing is cached or persisted by Prefect: DVC alone knows whether a stage has to run.
"""

import difflib
from collections.abc import Sequence
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Cancelled, Completed, Failed

from tasks import process
from tasks.dvclocks import drop_stale
from tasks.dvcstage import MachineryFailed, StageFailed, StageInfo, StageStopped, read_stages, repro
from tasks.slots import Slots, slots_of
from tasks.stage import MAIN_LINE, ROOT, read_params
from tasks.store import masked
from tasks.tracking import followed

MACHINERY = "MachineryFailed"  # name of the failed state after which a retry may help


class PlanError(ValueError):
    """The flow cannot begin; the message says why and what to do."""


def plan(only: Sequence[str] = (), methods: bool = False) -> tuple[list[StageInfo], Slots, int]:
    """Check params, read the graph from DVC: the stages in order, places for the torch ones, retries.

    The stages are those of the main line, with `methods` those of methods/dvc.yaml too. `only` names stages of either
    (`evaluate` stands for all of `evaluate@...`); what they need is then taken as it is.
    """
    params = read_params()
    process.allow()
    drop_stale()
    try:
        stages = read_stages()
    except Exception as error:  # DVC's own errors share no class with what YAML and templating raise
        raise PlanError(f"DVC cannot read the pipeline: {error}") from error
    names = [stage.name for stage in stages]
    for name in only:
        if not any(_named(stage, name) for stage in names):
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise PlanError(f"no stage {name!r}{hint}; there are {', '.join(names)}")
    if only:
        chosen = [stage for stage in stages if any(_named(stage.name, name) for name in only)]
    else:
        chosen = [stage for stage in stages if methods or stage.file == MAIN_LINE]
    return chosen, slots_of(params), params.runtime.retries


def _named(stage: str, name: str) -> bool:
    return stage == name or stage.startswith(f"{name}@")


def _is_machinery(task: Any, run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again may help: never when the stage itself failed."""
    return state.name == MACHINERY


@task(
    task_run_name="{stage.name}",
    persist_result=False,
    cache_policy=NO_CACHE,
    retry_delay_seconds=5,
    retry_condition_fn=_is_machinery,
)
def bring_up_to_date(stage: StageInfo, slots: Slots, force: bool = False) -> State[Any]:
    """Run one stage through DVC, its lines in the task's log, its training curve in MLflow as it grows."""
    log = get_run_logger()
    torch = bool(stage.meta.get("torch"))
    try:
        with slots.take(torch, log.info) as place, followed(stage.name, stage.outs, log.warning) as listen:

            def say(line: str) -> None:
                log.info("%s", masked(line))
                listen(line)

            skipped = repro(stage.name, say, force, place)
    except StageStopped as stop:
        return Cancelled(message=str(stop))
    except process.Stopped:
        return Cancelled(message="stopped with the flow")
    except StageFailed as error:  # as a state, not a traceback: what the stage printed says more
        return Failed(name=MACHINERY if isinstance(error, MachineryFailed) else "Failed", message=masked(str(error)))
    return Completed(name="Cached", message=skipped) if skipped else Completed(message="ran")


def tell(states: dict[str, State[Any]]) -> None:
    """Log which stages ran, were cached, failed or could not begin."""
    named: dict[str, list[str]] = {}
    for name, state in states.items():
        kind = {"Completed": "ran", "NotReady": "not begun"}.get(state.name or "", (state.name or "").lower())
        named.setdefault(kind, []).append(name)
    get_run_logger().info("; ".join(f"{kind}: {', '.join(names)}" for kind, names in named.items()))


def stop_all() -> None:
    """End every stage that runs, its processes included; DVC stays usable."""
    process.stop_all()


def comparison(methods: bool = False) -> str | None:
    """The report in markdown, of the main line or of every method, when there is one."""
    path = ROOT / "data" / "reports" / ("methods.md" if methods else "report.md")
    return path.read_text(encoding="utf-8") if path.is_file() else None


def first_table(markdown: str) -> str:
    """The first table of a markdown text, its heading line included."""
    lines = markdown.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("|")), len(lines))
    end = next((i for i in range(begin, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[begin:end])
