"""The study's DVC experiments: which of them stand already, and running one away from the user's workspace.

`dvc exp run --temp` takes along what is uncommitted in the workspace it is called in, and for a moment rewrites params.yaml
there. So a study calls it in a clone of HEAD under .dvc/tmp, which shares the project's cache, stores and unfinished work, and
fetches each finished experiment into the project.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apprentice.config import Params
from apprentice.demonstrations import digest
from tasks import process
from tasks.alone import KEPT
from tasks.dvcstage import open_repo, raise_if_asked
from tasks.stage import MAIN_LINE, METHODS, ROOT
from tasks.store import masked, store_uri
from tasks.study_plan import CLAIMS, Job, StudyError, targets_of, with_changes, written
from tasks.warm import warm_python

SOURCES = ("apprentice", "tasks", "params.yaml", MAIN_LINE, METHODS, "data/raw", ".dvc/config", str(CLAIMS))
SHARED = (".resume", ".telemetry")  # folders of the project that the clone uses too
STARTED = "Reproducing experiment"  # DVC prints it once its temporary workspace stands by itself
TAIL = 15  # lines shown of a run that failed


class RunFailed(RuntimeError):
    """A run of the study failed; the message names its log and ends with the last lines."""


@dataclass(frozen=True)
class Experiment:
    """A DVC experiment: its git ref, its commit and the commit it started from."""

    ref: str
    commit: str
    baseline: str


def git(*words: str, cwd: Path | None = None) -> str:
    """What a git command prints. Raises StudyError with git's own words when it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=cwd or ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise StudyError(f"the study needs git: {error}") from error
    if done.returncode:
        raise StudyError(f"git {' '.join(words)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


def refuse_uncommitted() -> None:
    """Raise StudyError when code, params or claims differ from HEAD: published numbers come from a commit."""
    if found := git("status", "--porcelain", "--untracked-files=all", "--", *SOURCES).rstrip():
        raise StudyError(
            "code, params and claims must be committed before a study, so that its numbers can be made again. Commit these "
            f"first, or `git stash` them:\n{found}"
        )


def experiments_named(name: str) -> list[Experiment]:
    """Every DVC experiment of this name, whatever it started from."""
    found = []
    for line in git("for-each-ref", "--format=%(refname) %(objectname)", f"refs/exps/**/{name}").splitlines():
        ref, commit = line.split()
        found.append(Experiment(ref, commit, "".join(ref.split("/")[2:4])))
    return found


class Experiments:
    """The study's experiments at HEAD: one stands when it was made from the code, params and targets of now."""

    def __init__(self, params: Params) -> None:
        self.params, self.head = params, git("rev-parse", "HEAD").strip()
        self.raw = _yaml_at(self.head, "params.yaml")
        self._named = {MAIN_LINE, METHODS, params.ingest.source.path, *_code_of(self.head)}
        self._code: dict[str, dict[str, str]] = {}

    def message(self, job: Job) -> str:
        """The experiment's commit message; it says what was asked for."""
        return f"study: {job.run.name}, seed {job.seed}: {' '.join(targets_of(job.run, self.params))}"

    def key(self, job: Job) -> str:
        """A hash of all that a job's figures follow from: code, params and targets."""
        return digest([self._code_at(self.head), with_changes(self.raw, job.values), self.message(job)])

    def ref(self, job: Job) -> str:
        """Where git keeps the job's experiment when it starts from HEAD."""
        return f"refs/exps/{self.head[:2]}/{self.head[2:]}/{job.name}"

    def standing(self, job: Job) -> Experiment | None:
        """The job's experiment, if it was made from the same code, params and targets."""
        wanted = with_changes(self.raw, job.values)
        for found in experiments_named(job.name):
            if (
                git("log", "-1", "--format=%B", found.commit).strip() == self.message(job)
                and self._code_at(found.baseline) == self._code_at(self.head)
                and _yaml_at(found.commit, "params.yaml") == wanted
            ):
                return found
        return None

    def _code_at(self, commit: str) -> dict[str, str]:
        """Path to git's hash, in a commit, of every file of code that the two pipeline files name, and of those two."""
        if commit not in self._code:
            entries = (line.split("\t", 1) for line in git("ls-tree", "-r", commit).splitlines())
            self._code[commit] = {path: about.split()[2] for about, path in entries if path in self._named}
        return self._code[commit]


def _yaml_at(commit: str, path: str) -> Any:
    return yaml.safe_load(git("show", f"{commit}:{path}"))


def _code_of(commit: str) -> set[str]:
    """The files of code that the stages depend on."""
    stages = [stage for path in (MAIN_LINE, METHODS) for stage in _yaml_at(commit, path)["stages"].values()]
    deps = [dep for stage in stages for dep in stage.get("do", stage).get("deps", [])]
    return {dep for dep in deps if isinstance(dep, str) and dep.endswith(".py") and "${" not in dep}


class Workspace:
    """The clone in which experiments are started; `python` is the folder of the Python that their stages run with."""

    def __init__(self, root: Path, experiments: Experiments, python: Path) -> None:
        self.root, self.experiments, self.python = root, experiments, python
        self._starting, self._fetching = threading.Lock(), threading.Lock()

    def run(self, job: Job, place: Mapping[str, str]) -> Experiment:
        """Run a job and fetch its experiment into the project, in the place of older ones of its name.

        `place` is added to its environment. Raises RunFailed, StageStopped when a stage of it alone was asked to stop, or
        process.Stopped when everything is being stopped.
        """
        log = ROOT / ".telemetry" / "study" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        tail: deque[str] = deque(maxlen=TAIL)
        with log.open("w", encoding="utf-8") as file, self._turn() as started:

            def hear(line: str) -> None:
                line = masked(line)
                print(line, file=file, flush=True)
                tail.append(line)
                if line.startswith(STARTED):
                    started()

            patience = self.experiments.params.runtime.stop_seconds
            code = process.run(self._command(job), self.root, {**self._environment(), **place}, hear, patience)
        if code:
            raise_if_asked(tail)
            raise RunFailed("\n".join([f"{job.name} failed; the whole log: {log.relative_to(ROOT)}", *tail]))
        return self._fetch(job)

    @contextmanager
    def _turn(self) -> Iterator[Callable[[], None]]:
        """Let experiments start one after the other: until it says STARTED, DVC keeps one where every other would find it."""
        self._starting.acquire()
        held = [self._starting]

        def started() -> None:
            if held:
                held.pop().release()

        try:
            yield started
        finally:
            started()

    def _command(self, job: Job) -> list[str]:
        sets = [word for key, value in job.values.items() for word in ("--set-param", f"{key}={written(value)}")]
        named = ["--temp", "--name", job.name, "--message", self.experiments.message(job)]
        targets = targets_of(job.run, self.experiments.params)
        return [sys.executable, "-m", "dvc", "--wait-for-lock", "exp", "run", *named, *sets, *targets]

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.python), os.environ.get("PATH", "")])  # `python` of dvc.yaml
        return {**os.environ, **KEPT, "PATH": path, "MLFLOW_TRACKING_URI": store_uri()}

    def _fetch(self, job: Job) -> Experiment:
        ref = self.experiments.ref(job)
        with self._fetching:
            git("fetch", "--quiet", "--no-tags", str(self.root), f"+{ref}:{ref}")
            for old in experiments_named(job.name):
                if old.ref != ref:
                    git("update-ref", "-d", old.ref)
        found = self.experiments.standing(job)
        if found is None:
            raise RunFailed(
                f"{job.name}: the experiment's params are not those asked for; compare `git show {ref}:params.yaml`"
            )
        return found


@contextmanager
def workspace(experiments: Experiments) -> Iterator[Workspace]:
    """A fresh clone of HEAD, removed at the end; one study of a project at a time has it.

    Raises StudyError when another one is running, or one that was killed left something running.
    """
    place = ROOT / ".dvc" / "tmp" / "study"
    place.mkdir(parents=True, exist_ok=True)
    root = place / "workspace"
    with (place / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError("another study is running in this project: wait for its end, or stop it") from error
        if left := processes_in(root):
            raise StudyError(f"a study that was killed left processes behind; end them first: kill {' '.join(map(str, left))}")
        shutil.rmtree(root, ignore_errors=True)
        _clone(root, experiments.head)
        try:
            with warm_python(experiments.params.runtime.stop_seconds) as python:
                yield Workspace(root, experiments, python)
        finally:
            shutil.rmtree(root, ignore_errors=True)


def processes_in(folder: Path) -> list[int]:
    """Ids of the processes that work inside a folder, where /proc tells."""
    found = []
    for link in process.PROC.glob("[0-9]*/cwd"):
        try:
            inside = Path(os.readlink(link)).is_relative_to(folder)
        except OSError:  # gone by now, or another user's
            continue
        if inside:
            found.append(int(link.parent.name))
    return sorted(found)


def _clone(root: Path, commit: str) -> None:
    git("clone", "--quiet", "--local", "--no-checkout", str(ROOT), str(root))
    git("checkout", "--quiet", "--detach", commit, cwd=root)
    for name in SHARED:
        (ROOT / name).mkdir(exist_ok=True)
        (root / name).symlink_to(ROOT / name)
    with (root / ".git" / "info" / "exclude").open("a") as file:
        file.writelines(f"/{name}\n" for name in SHARED)
    with open_repo() as repo:
        cache = str(repo.cache.local_cache_dir)
    own = ROOT / ".dvc" / "config.local"
    if own.is_file():
        shutil.copy(own, root / ".dvc" / "config.local")
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", "cache.dir", cache], cwd=root, check=True)
    for key in ("user.name", "user.email"):  # DVC commits experiments
        if value := subprocess.run(
            ["git", "config", key], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip():
            git("config", key, value, cwd=root)
