"""The study, run for real on a toy: real git, DVC experiments and flow, around stages that take a moment."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import Project, copy_project
from tests.toy import PROC, begin, begun_in, load_little, run, runs, wait_for, with_stores

# Accuracy is strength / 4: of sft its epochs less the seed. What ran is noted in $RUNS.
WORKER = """
import json, os, pathlib, sys, time
import yaml

name, item = sys.argv[1], (sys.argv + [""])[2]
params = yaml.safe_load(pathlib.Path("params.yaml").read_text())
with open(os.environ["RUNS"], "a") as file:
    print(os.environ["DVC_EXP_NAME"], name, item, os.getpid(), file=file)
if os.environ.get("FAIL") == f"{os.environ['DVC_EXP_NAME']} {name}":
    sys.exit("the stage cannot")
while pathlib.Path(os.environ["RUNS"] + ".hold").exists():
    time.sleep(0.1)
reports = pathlib.Path("data/reports", name, item)
reports.mkdir(parents=True, exist_ok=True)
if item:
    strength = int(pathlib.Path("data/models", item, "strength").read_text())
    rows = [f"p{i},{domain},{int(i < strength)},0.5,10" for domain in ("in_domain", "out_of_domain_pool") for i in range(4)]
    (reports / "prompts.csv").write_text("\\n".join(["id,domain,greedy_accuracy,kl_to_sft,length", *rows, ""]))
else:
    strength = {"pretrain": 0, "sft": params["sft"]["epochs"] - params["seed"], "raft": 4}[name]
    model = pathlib.Path("data/models", {"pretrain": "base"}.get(name, name))
    model.mkdir(parents=True)
    (model / "strength").write_text(str(strength))
    (model / "weights").write_text(f"{name} {params['seed']} {params['sft']['epochs']}")
    (reports / "metrics.json").write_text(json.dumps({"rows": 8}))
    (reports / "history.csv").write_text("step,epoch\\n1,1\\n2,2\\n")
"""
CLAIM = {"paper": "2510.21090", "published": "yes", "metric": {"out_of_domain/greedy_accuracy": 1}}
CLAIMS = {
    "metrics": {},
    "runs": {"main": {"set": {}, "measure": "all"}, "longer": {"set": {"sft.epochs": 4}, "measure": ["sft"]}},
    "claims": [
        {**CLAIM, "claim": "longer is better", "effect": {"longer:sft": 1, "sft": -1}, "above": 0.0},
        {**CLAIM, "claim": "shorter is better", "effect": {"longer:sft": -1, "sft": 1}, "above": 0.0},
        {**CLAIM, "claim": "raft is better", "effect": {"raft": 1, "sft": -1}, "above": 0.0},
    ],
    "plots": {"accuracy_against_tokens": {"x": "tokens", "y": "in_domain/greedy_accuracy", "models": "all", "run": "main"}},
}
COMMAND = ("-m", "flows.study", "--jobs", "2")


def stage(name: str, model: str, needs: str | None, wdir: dict[str, str]) -> dict[str, object]:
    reports = [f"data/reports/{name}/{file}" for file in ("metrics.json", "history.csv")]
    deps = ["worker.py", *([f"data/models/{needs}"] if needs else [])]
    outs = [f"data/models/{model}", *reports]
    return {**wdir, "cmd": f"python worker.py {name}", "deps": deps, "params": ["seed", f"{name}.epochs"], "outs": outs}


def evaluation(name: str, wdir: dict[str, str]) -> dict[str, object]:
    do = {"cmd": f"python worker.py {name} ${{item}}", "deps": ["data/models/${item}", "worker.py"]}
    return {
        "foreach": f"${{{name}.models}}",
        "do": {**wdir, **do, "outs": [f"data/reports/{name}/${{item}}/prompts.csv"]},
    }


@pytest.fixture
def toy(tmp_path: Path) -> Project:
    """A committed project: pretrain -> sft -> evaluate@..., and raft with its evaluation in methods/dvc.yaml."""
    toy = copy_project(tmp_path / "toy")
    toy.set(evaluate__models=["base", "sft"], evaluate_methods__models=["raft"], report__baselines=["sft"])
    up = {"wdir": ".."}
    base = {**stage("pretrain", "base", None, {}), "params": ["seed"]}
    main = {"pretrain": base, "sft": stage("sft", "sft", "base", {}), "evaluate": evaluation("evaluate", {})}
    further = {"raft": stage("raft", "raft", "sft", up), "evaluate_methods": evaluation("evaluate_methods", up)}
    files = {
        "dvc.yaml": {"stages": main},
        "methods/dvc.yaml": {"vars": ["../params.yaml"], "stages": further},
        "study/claims.yaml": CLAIMS,
    }
    toy.path("study").mkdir()
    for name, content in files.items():
        toy.path(name).write_text(yaml.safe_dump(content, sort_keys=False))
    toy.path("worker.py").write_text(WORKER)
    load_little(toy)
    toy.path("README.md").write_text("before\n<!-- study:begin -->\nold\n<!-- study:end -->\nafter\n")
    toy.path("pipelines.dvc").unlink()
    toy.path(".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    git(toy, "init", "-q")
    git(toy, "config", "user.name", "a")
    git(toy, "config", "user.email", "a@b.c")
    commit(toy)
    return with_stores(toy)


def git(toy: Project, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=toy.root, check=True, capture_output=True, text=True).stdout


def commit(toy: Project) -> None:
    git(toy, "add", "-A")
    git(toy, "commit", "-q", "-m", "a commit")


def study(toy: Project, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    return run(toy, *COMMAND, *options, **places(toy), **more)


def places(toy: Project) -> dict[str, str]:
    return {"RUNS": str(toy.root.parent / "runs"), "PREFECT_HOME": str(toy.root / ".prefect")}


def ran(toy: Project) -> list[str]:
    """What ran since this was last asked: `<experiment> <stage> <item>`."""
    path = toy.root.parent / "runs"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [" ".join(line.split()[:-1]) for line in lines]


def experiments(toy: Project) -> list[str]:
    return sorted(line.rpartition("/")[2] for line in git(toy, "for-each-ref", "--format=%(refname)", "refs/exps").splitlines())


@pytest.mark.slow
def test_a_study_from_the_first_run_to_the_published_claims(toy: Project) -> None:
    before = toy.path("params.yaml").read_text()
    done = study(toy, "--seeds", "2")
    assert done.returncode == 0, done.stdout
    first = ran(toy)
    assert experiments(toy) == ["study-longer-1", "study-longer-2", "study-main-1", "study-main-2"]
    each = ["pretrain", "sft", "raft", "evaluate base", "evaluate sft", "evaluate_methods raft"]
    own = {f"study-main-{seed} {what}" for seed in (1, 2) for what in each}
    own |= {f"study-longer-{seed} {what}" for seed in (1, 2) for what in ("sft", "evaluate sft")}
    assert len(first) == len(own) and set(first) == own  # no stage twice: `longer` has its base from the main run's cache
    assert toy.path("params.yaml").read_text() == before
    changed = {line.split()[-1] for line in git(toy, "status", "--porcelain").splitlines()}
    assert changed == {
        "README.md",
        *(f"study/{name}" for name in ("accuracy_against_tokens.svg", "claims.json", "claims.md", "figures.json", "made.json")),
    }
    check_what_was_published(toy)

    commit(toy)  # of results only: the experiments stand
    again = study(toy, "--seeds", "2")
    assert again.returncode == 0 and "4 stand, 0 to run" in again.stdout and ran(toy) == []
    alone = run(toy, "-m", "flows.study", "--report-only", **places(toy))
    assert alone.returncode == 0 and "3 claims: holds 1, does not hold 1, not settled 1" in alone.stdout
    assert git(toy, "status", "--porcelain") == ""  # twice the same to the byte
    check_what_a_clone_without_experiments_makes_of_it(toy)


def check_what_a_clone_without_experiments_makes_of_it(toy: Project) -> None:
    for ref in git(toy, "for-each-ref", "--format=%(refname)", "refs/exps").split():
        git(toy, "update-ref", "-d", ref)
    made = json.loads(toy.path("study/made.json").read_text())
    toy.path("study/made.json").write_text(json.dumps({**made, "study-longer-2": "of other code"}))
    commit(toy)
    done = study(toy, "--seeds", "2")
    assert done.returncode == 0 and "3 stand, 1 to run" in done.stdout and experiments(toy) == ["study-longer-2"]
    assert json.loads(toy.path("study/made.json").read_text()) == made  # and the figures are those of before
    assert git(toy, "status", "--porcelain", "study/figures.json") == ""


def check_what_was_published(toy: Project) -> None:
    figures = json.loads(toy.path("study/figures.json").read_text())
    assert figures["longer"]["2"]["sft"]["in_domain/greedy_accuracy"] == 0.5  # 4 epochs less seed 2, of 4
    assert figures["main"]["2"]["sft"]["out_of_domain/greedy_accuracy"] == 0.25
    assert figures["main"]["1"]["raft"]["tokens"] == 320  # sft and raft: 2 epochs x 8 rows x 10 tokens each
    claims = json.loads(toy.path("study/claims.json").read_text())
    assert [one["verdict"] for one in claims] == ["holds", "does not hold", "not settled"]
    assert [one["effect"] for one in claims] == [0.25, -0.25, 0.625] and claims[2]["by_seed"] == [0.5, 0.75]
    readme = toy.path("README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "| `raft` | none | 100 [100, 100] |" in readme


@pytest.mark.slow
def test_a_run_that_fails_is_shown_and_the_rest_goes_on(toy: Project) -> None:
    done = study(toy, "--seeds", "1", FAIL="study-main-1 raft")
    assert done.returncode == 1, done.stdout
    assert "study-main-1 failed" in done.stdout and "the stage cannot" in done.stdout
    assert experiments(toy) == ["study-longer-1"]
    claims = json.loads(toy.path("study/claims.json").read_text())
    assert claims[0]["verdict"] == "not settled" and "main of seed 1" in claims[0]["note"]
    assert "the table of results needs the main run" in done.stdout
    ran(toy)
    done = study(toy, "--seeds", "1", "--runs", "main")
    assert done.returncode == 0, done.stdout
    assert ran(toy) == ["study-main-1 raft", "study-main-1 evaluate_methods raft"]  # what it had done is not done again


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_where_it_was(toy: Project) -> None:
    hold, log = toy.root.parent / "runs.hold", toy.root.parent / "runs"
    hold.touch()
    child = begin(toy, *COMMAND, "--seeds", "2", "--runs", "main", **places(toy))
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) == 2)
    pids = [int(line.split()[-1]) for line in log.read_text().splitlines()]
    os.kill(child.pid, signal.SIGINT)
    assert child.wait(90) == 130, toy.path("output.txt").read_text()
    assert not any(map(runs, pids)) and experiments(toy) == []
    assert not toy.path(".dvc/tmp/study/workspace").exists()
    hold.unlink()
    assert study(toy, "--seeds", "2", "--runs", "main").returncode == 0
    assert experiments(toy) == ["study-main-1", "study-main-2"]


@pytest.mark.slow
@pytest.mark.skipif(not PROC.exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_study_that_is_killed_leaves_nothing_running(toy: Project, sign: signal.Signals, code: int) -> None:
    """Its server, its warm Python, the experiments and their stages end with it."""
    hold, log = toy.root.parent / "runs.hold", toy.root.parent / "runs"
    hold.touch()
    child = begin(toy, *COMMAND, "--seeds", "1", "--runs", "main", **places(toy))
    wait_for(lambda: log.exists() and log.read_text(), 240)
    assert len(begun_in(toy)) > 4
    os.kill(child.pid, sign)
    assert child.wait(90) == code, toy.path("output.txt").read_text()
    wait_for(lambda: not begun_in(toy))


def test_uncommitted_code_or_params_are_refused(toy: Project) -> None:
    toy.path("params.yaml").write_text(toy.path("params.yaml").read_text() + "\n")
    toy.path("tasks/new.py").write_text("")
    done = study(toy, "--seeds", "1")
    assert done.returncode == 2 and " M params.yaml" in done.stdout and "?? tasks/new.py" in done.stdout, done.stdout
    assert experiments(toy) == [] and ran(toy) == []
