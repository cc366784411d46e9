"""What we ask of DVC: the graph of stages, one stage brought up to date, and what dvc.lock knows. No Prefect, no MLflow.

DVC is imported inside the functions, so that a stage that needs none of it starts fast.
"""

import hashlib
import json
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import process
from tasks.alone import KEPT
from tasks.dvclocks import holders_in, wait_for_change
from tasks.stage import MAIN_LINE, METHODS, ROOT, StageError, address_of, read_params

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

MACHINERY = re.compile(r"^ERROR: .*(unable to acquire lock|is busy|database is locked|resource temporarily)", re.I)
CHATTER = (  # DVC's advice after every stage
    "Updating lock file",
    "Generating lock file",
    "Use `dvc push`",
    "To track the changes",
    "To enable auto staging",
    "git add ",
    "dvc config core.autostage",
)
BUSY = "is busy, it is being blocked by:"  # the beginning of DVC's last words; said in ours
OWN_FAULT = "failed to run:"  # DVC's words when the stage's own command failed
ASKED = re.compile(r"failed to run:.*, exited with (?:(?:130|-2)|(143|-15))$")  # and when Ctrl-C or SIGTERM ended it
SHARING = ("processes", "sharding")  # entries of `compute`
_dvc = threading.RLock()  # DVC's objects are not meant for threads; one at a time in this process


@dataclass(frozen=True)
class StageInfo:
    """A stage as DVC has it: its name with its item, its pipeline file, the stages it needs, the paths it reads and writes."""

    name: str
    file: str
    upstream: tuple[str, ...]
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict, hash=False)


class StageFailed(RuntimeError):
    """`dvc repro` of a stage failed; the message ends with the last lines it printed."""


class StageStopped(process.Stopped):
    """The stage alone was asked to stop, by Ctrl-C (SIGINT) or SIGTERM, which the message says."""


class MachineryFailed(StageFailed):
    """The stage itself did not fail: a lock or the like did, so trying again may help."""


@contextmanager
def open_repo() -> "Iterator[Repo]":
    """The workspace's DVC repository; for one thread at a time. Raises StageError where there is no git and DVC expects it."""
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:  # not $DVC_ROOT, which is another folder inside `dvc exp run --temp`
        with _dvc, Repo(str(ROOT), _wait_for_lock=True) as repo:
            yield repo
    except SCMError as error:
        raise StageError(f"{error}; `git init` makes one, `dvc config --local core.no_scm true` does without") from error


@contextmanager
def open_locked_repo() -> "Iterator[Repo]":
    """The same under DVC's own lock: nobody writes a dvc.lock meanwhile, which DVC does in place."""
    from dvc.repo import lock_repo

    with open_repo() as repo, lock_repo(repo):
        yield repo


def read_stages() -> list[StageInfo]:
    """Every stage of both pipeline files, each after what it needs."""
    with open_locked_repo() as repo:
        return stages_of(repo)


def stages_of(repo: "Repo") -> list[StageInfo]:
    """Every stage of an open repository, each after what it needs."""
    import networkx as nx
    from dvc.dependency import ParamsDependency
    from dvc.stage import PipelineStage

    graph = repo.index.graph  # an edge points at what a stage needs
    stages = [stage for stage in nx.dfs_postorder_nodes(graph) if isinstance(stage, PipelineStage)]
    return [
        StageInfo(
            stage.name,
            stage.path_in_repo,
            tuple(sorted(need.name for need in graph.successors(stage) if isinstance(need, PipelineStage))),
            tuple(dep.def_path for dep in stage.deps if not isinstance(dep, ParamsDependency)),
            tuple(out.def_path for out in stage.outs),
            stage.meta or {},
        )
        for stage in stages
    ]


def repro(name: str, say: Callable[[str], None], force: bool = False, place: dict[str, str] | None = None) -> str | None:
    """Bring one stage up to date; None when it ran, otherwise DVC's line that says why it did not need to.

    Waits while another process has one of its paths, and says which. `place` is added to the stage's environment. Raises
    `StageFailed`, `MachineryFailed`, `StageStopped` or, when everything is being stopped, `process.Stopped`.
    """
    # Without --wait-for-lock a stage that ends while another one holds DVC's lock loses its finished work.
    item = ["--single-item", address_of(name), *["--force"] * force]
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", *item]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # `python` of dvc.yaml
    env = {**os.environ, "PATH": path, **KEPT, **(place or {})}
    told: set[int] = set()
    while True:
        lines: deque[str] = deque(maxlen=200)

        def hear(line: str, lines: deque[str] = lines) -> None:
            lines.append(line)
            if not line.strip().startswith(CHATTER) and not any(BUSY in line for line in lines):
                say(line)

        code = process.run(command, ROOT, env, hear, read_params().runtime.stop_seconds)
        if code == 0:
            return next((line for line in lines if _is_skip(line)), None)
        raise_if_asked(lines)
        own = any(OWN_FAULT in line for line in lines)
        holders = {} if own else holders_in(lines)
        if not holders:
            machinery = not own and (code < 0 or any(MACHINERY.search(line) for line in lines))
            kind = MachineryFailed if machinery else StageFailed
            raise kind(f"stage {name} failed (dvc repro ended with {code}): " + " | ".join(list(lines)[-6:]))
        for pid in holders.keys() - told:
            say(f"waiting for {name}: in use by {holders[pid]}")
        told |= holders.keys()
        wait_for_change()


def raise_if_asked(lines: Iterable[str]) -> None:
    """Raise StageStopped when DVC's lines say that the command it ran was asked to stop, and did."""
    if asked := next(filter(None, map(ASKED.search, lines)), None):
        raise StageStopped("stopped by SIGTERM" if asked[1] else "stopped by Ctrl-C")


def _is_skip(line: str) -> bool:
    return line.endswith("didn't change, skipping") or "is cached - skipping run" in line


def _stage(repo: "Repo", label: str) -> "PipelineStage":
    """A stage as its pipeline file has it; dvc.lock is not read, for another DVC may be writing it just now."""
    from dvc.dvcfile import load_file

    name = METHODS if address_of(label) != label else MAIN_LINE
    file = load_file(repo, str(ROOT / name))
    file.lockfile_contents = {}
    if label not in file.stages:
        raise StageError(f"{name}: no stage {label!r}; it has " + ", ".join(file.stages))
    return file.stages[label]


def outputs_of(label: str) -> list[Path]:
    """What DVC would remove before it runs the stage: its outputs, `persist` ones left out."""
    with open_repo() as repo:
        return [Path(out.fs_path) for out in _stage(repo, label).outs if not out.persist]


def current_inputs(label: str) -> tuple[str, dict[str, Any]]:
    """Key and params of a stage as it would run now: its dependencies are hashed afresh (cheap: DVC remembers).

    Raises StageError when one of them is not there.
    """
    from dvc.exceptions import DvcException

    with open_repo() as repo:
        stage = _stage(repo, label)
        for dep in stage.deps:
            try:
                dep.save()
            except DvcException as error:
                hint = f"`dvc repro {address_of(label)}` makes what this stage needs first"
                raise StageError(f"{error}; {hint}") from error
        return key_of(stage), params_of(stage)


def current_key(label: str) -> str:
    """Hash of a stage's command, params and inputs: equal keys mean equal work."""
    return current_inputs(label)[0]


def recorded_keys(labels: Collection[str]) -> dict[str, str]:
    """The key of the work that dvc.lock has of a stage, for those of these stages that there are."""
    from dvc.dvcfile import load_file

    with open_locked_repo() as repo:
        files = [load_file(repo, str(ROOT / name)) for name in (MAIN_LINE, METHODS) if (ROOT / name).is_file()]
        return {label: key_of(file.stages[label]) for file in files for label in labels if label in file.stages}


def key_of(stage: "PipelineStage") -> str:
    """The same key for a stage whose dependencies carry hashes already: just saved, or as dvc.lock has them. Work is the same
    whoever shares it."""
    inputs = [stage.cmd, {dep.def_path: _apart_from(SHARING, dep.hash_info.value) for dep in stage.deps}]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _apart_from(entries: Collection[str], params: Any) -> Any:
    """Params without these entries of the section `compute`; what is no params, as it is."""
    if not isinstance(params, dict) or not isinstance(params.get("compute"), dict):
        return params
    return {**params, "compute": {name: value for name, value in params["compute"].items() if name not in entries}}


def params_of(stage: "PipelineStage") -> dict[str, Any]:
    """The params a stage depends on, by their names in dvc.yaml."""
    from dvc.dependency import ParamsDependency

    values: dict[str, Any] = {}
    for dep in stage.deps:
        if isinstance(dep, ParamsDependency):
            values.update(dep.hash_info.value or {})
    return values
