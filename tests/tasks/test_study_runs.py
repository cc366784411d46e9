"""Which experiments stand, on a small git repository; the order of a session."""

import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.config import Params
from tasks import study_runs
from tasks.dvcstage import StageStopped
from tasks.slots import Slots
from tasks.study_plan import Job, Run, StudyError, seeds_of
from tasks.study_report import committed
from tasks.study_runs import (
    STARTED,
    Experiments,
    RunFailed,
    Workspace,
    experiments_named,
    git,
    processes_in,
    refuse_uncommitted,
)
from tasks.study_session import Session

RUN = Run("a", {"sft.epochs": 2}, ("sft",), None)
FILES = {
    "params.yaml": "seed: 0\nsft: {epochs: 3}\n",
    "dvc.yaml": "stages: {sft: {cmd: x, deps: [tasks/sft.py, data/x, '${a.b}.py']}}\n",
    "methods/dvc.yaml": "stages: {raft: {foreach: [a], do: {cmd: x, deps: [tasks/raft.py]}}}\n",
    "tasks/sft.py": "1\n",
    "tasks/raft.py": "1\n",
    "tasks/study.py": "1\n",
    "apprentice/world.py": "1\n",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed project of a few files, which the module takes for its own."""
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    for name in ("NAME", "EMAIL"):
        monkeypatch.setenv(f"GIT_AUTHOR_{name}", "a")
        monkeypatch.setenv(f"GIT_COMMITTER_{name}", "a")
    git("init", "-q")
    change(tmp_path, FILES)
    return tmp_path


def change(root: Path, files: dict[str, str], message: str = "a commit") -> str:
    """Write files and commit; the commit's hash."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git("add", "-A")
    git("commit", "-q", "--allow-empty", "-m", message)
    return git("rev-parse", "HEAD").strip()


def experiment(root: Path, params: dict[str, Any], message: str, name: str = "study-a-1") -> str:
    """Make an experiment at HEAD as DVC does; its commit."""
    head = git("rev-parse", "HEAD").strip()
    commit = change(root, {"params.yaml": yaml.safe_dump(params)}, message)
    git("update-ref", f"refs/exps/{head[:2]}/{head[2:]}/{name}", commit)
    git("reset", "-q", "--hard", head)
    return commit


MESSAGE = "study: a, seed 1: evaluate@sft"
WANTED = {"seed": 1, "sft": {"epochs": 2}}


def test_an_experiment_stands_whatever_else_is_committed_after_it(root: Path, params: Callable[..., Params]) -> None:
    commit = experiment(root, WANTED, MESSAGE)
    head = git("rev-parse", "HEAD").strip()
    change(root, {"tasks/study.py": "2\n", "README.md": "new\n"})
    found = Experiments(params()).standing(Job(RUN, 1))
    assert found is not None and (found.commit, found.baseline) == (commit, head)


def test_a_missing_experiment_does_not_stand(root: Path, params: Callable[..., Params]) -> None:
    experiment(root, WANTED, MESSAGE, "study-a-10")
    experiment(root, WANTED, MESSAGE, "study-aa-1")
    assert experiments_named("study-a-1") == [] and Experiments(params()).standing(Job(RUN, 1)) is None


@pytest.mark.parametrize(
    "files",
    [
        {"tasks/sft.py": "2\n"},
        {"tasks/raft.py": "2\n"},
        {"apprentice/world.py": "2\n"},  # ingest.source.path
        {"dvc.yaml": FILES["dvc.yaml"] + "\n# more\n"},
        {"params.yaml": "seed: 0\nsft: {epochs: 3, more: 1}\n"},
    ],
)
def test_after_a_change_of_code_or_params_it_does_not_stand(
    root: Path, params: Callable[..., Params], files: dict[str, str]
) -> None:
    experiment(root, WANTED, MESSAGE)
    assert Experiments(params()).standing(Job(RUN, 1))
    change(root, files)
    assert Experiments(params()).standing(Job(RUN, 1)) is None


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({**WANTED, "seed": 2}, MESSAGE),
        ({**WANTED, "sft": {"epochs": 3}}, MESSAGE),
        (WANTED, "study: a, seed 1: evaluate@rso"),
    ],
)
def test_other_params_or_targets_make_another_experiment(
    root: Path, params: Callable[..., Params], wanted: dict[str, Any], message: str
) -> None:
    experiment(root, wanted, message)
    assert Experiments(params()).standing(Job(RUN, 1)) is None


def test_a_job_has_another_key_with_other_code_params_or_targets(root: Path, params: Callable[..., Params]) -> None:
    job = Job(RUN, 1)
    key = Experiments(params()).key(job)
    change(root, {"README.md": "new\n", "params.yaml": FILES["params.yaml"] + "# a comment\n"})
    others = [Job(RUN, 2), Job(replace(RUN, changes={}), 1), Job(replace(RUN, measure=("rso",)), 1)]
    assert Experiments(params()).key(job) == key
    assert len({key, *(Experiments(params()).key(other) for other in others)}) == 4
    change(root, {"tasks/raft.py": "2\n"})
    assert Experiments(params()).key(job) != key


def test_a_comment_in_params_changes_nothing(root: Path, params: Callable[..., Params]) -> None:
    experiment(root, WANTED, MESSAGE)
    change(root, {"params.yaml": FILES["params.yaml"] + "# a comment\n"})
    assert Experiments(params()).standing(Job(RUN, 1))


@pytest.mark.parametrize("name", ["params.yaml", "tasks/sft.py", "tasks/new.py", "study/claims.yaml", "methods/dvc.yaml"])
def test_what_is_uncommitted_is_refused_by_name(root: Path, name: str) -> None:
    refuse_uncommitted()
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("changed")
    with pytest.raises(StudyError, match=name):
        refuse_uncommitted()


def test_results_and_locks_may_be_uncommitted(root: Path) -> None:
    for name in ("dvc.lock", "methods/dvc.lock", "README.md", "study/figures.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("changed")
    refuse_uncommitted()
    assert "figures.json" in git("status", "--porcelain", "-uall")


def test_a_file_is_known_by_its_first_and_last_commit(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "study" / "claims.yaml"
    assert committed(path) == "not committed"
    first = change(root, {"study/claims.yaml": "a"})[:7]
    assert committed(path) == f"commit {first}"
    last = change(root, {"study/claims.yaml": "b"})[:7]
    assert committed(path) == f"first in commit {first}, now {last}"
    path.write_text("c")
    assert committed(path) == f"first in commit {first}, now {last}, with uncommitted changes"


def test_git_says_what_went_wrong(root: Path) -> None:
    with pytest.raises(StudyError, match="git rev-parse none"):
        git("rev-parse", "none")


def test_processes_left_in_a_folder_are_found(tmp_path: Path) -> None:
    if not Path("/proc/self/cwd").exists():
        pytest.skip("needs /proc")
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    child = subprocess.Popen(["sleep", "60"], cwd=inside)
    try:
        assert processes_in(tmp_path / "a") == [child.pid] and processes_in(tmp_path / "c") == []
    finally:
        child.kill()
        child.wait()


def test_experiments_start_one_after_the_other_and_then_run_side_by_side(
    root: Path, params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    go_on, end = threading.Event(), threading.Event()

    def fake(command: list[str], cwd: Path, env: dict[str, str], say: Callable[[str], None], patience: float) -> int:
        begun.append(command[command.index("--name") + 1])
        go_on.wait(10)
        say(f"{STARTED} 'x'")
        end.wait(10)
        return 1

    monkeypatch.setattr(study_runs.process, "run", fake)
    place, failed = Workspace(root, Experiments(params()), root), list[str]()

    def run(seed: int) -> None:
        with pytest.raises(RunFailed) as error:
            place.run(Job(RUN, seed), {})
        failed.append(str(error.value))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert len(begun) == 1
    go_on.set()
    while len(begun) < 2:
        time.sleep(0.01)
    assert sorted(begun) == ["study-a-1", "study-a-2"] and all(thread.is_alive() for thread in threads)
    end.set()
    for thread in threads:
        thread.join(10)
    assert len(failed) == 2 and all(f"{STARTED} 'x'" in text and ".telemetry/study/study-a-" in text for text in failed)


def test_a_job_whose_stage_alone_was_asked_to_stop_did_not_fail(
    root: Path, params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(command: list[str], cwd: Path, env: dict[str, str], say: Callable[[str], None], patience: float) -> int:
        say("ERROR: failed to reproduce 'sft': failed to run: python -m tasks.sft, exited with 143")
        return 255

    monkeypatch.setattr(study_runs.process, "run", fake)
    place = Workspace(root, Experiments(params()), root)
    with pytest.raises(StageStopped, match="stopped by SIGTERM"):
        place.run(Job(RUN, 1), {})


def test_a_job_is_one_dvc_experiment_with_its_params_and_targets(root: Path, params: Callable[..., Params]) -> None:
    place = Workspace(root, Experiments(params()), root)
    words = place._command(Job(RUN, 1))
    assert words[1:7] == ["-m", "dvc", "--wait-for-lock", "exp", "run", "--temp"] and words[-1] == "evaluate@sft"
    assert [words[i + 1] for i, word in enumerate(words) if word == "--set-param"] == ["seed=1", "sft.epochs=2"]
    assert words[words.index("--message") + 1] == MESSAGE and "--force" not in words


class Standing:
    """Experiments of which some stand."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def standing(self, job: Job) -> bool:
        return job.name in self.names

    def key(self, job: Job) -> str:
        return "of no record"


def session(*standing: str, runs: tuple[str, ...] = ("main", "a", "b"), seeds: int = 2) -> Session:
    measure = {"main": None, "a": ("sft",), "b": ("sft",)}
    jobs = [Job(Run(name, {}, measure[name], None), seed) for seed in seeds_of(seeds) for name in runs]
    return Session(jobs, Standing(*standing), Slots([{}]))  # type: ignore[arg-type]


def order(one: Session) -> list[tuple[str, str | None]]:
    return [(job.name, one.waits_for(job)) for job in one.todo]


def test_the_main_run_of_a_seed_goes_before_its_other_runs() -> None:
    assert order(session()) == [
        ("study-main-1", None),
        ("study-main-2", None),
        ("study-a-1", "study-main-1"),
        ("study-b-1", "study-main-1"),
        ("study-a-2", "study-main-2"),
        ("study-b-2", "study-main-2"),
    ]


def test_where_the_main_run_stands_nothing_waits() -> None:
    assert order(session("study-main-1", "study-a-2")) == [
        ("study-main-2", None),
        ("study-a-1", None),
        ("study-b-1", None),
        ("study-b-2", "study-main-2"),
    ]


def test_without_the_main_run_the_first_of_a_seed_leads() -> None:
    assert order(session(runs=("a", "b"))) == [
        ("study-a-1", None),
        ("study-a-2", None),
        ("study-b-1", "study-a-1"),
        ("study-b-2", "study-a-2"),
    ]
