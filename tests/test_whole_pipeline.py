"""The whole pipeline once, at the size of the smoke preset, through the real flow, in a project and stores of its own."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.demonstrations import prompt_id, read_jsonl
from tasks.preset import apply
from tasks.report_metrics import METRICS, TRAINING
from tasks.stage import read_params
from tests.chaos.kills import chaos, table
from tests.conftest import Project, copy_project

pytestmark = pytest.mark.slow
MODELS = ["base", "sft", "sft_tuned", "srppo", "rso"]
MEASURED = ["continued_sft", "tilt", "perstep", "crlft", "pairwise_ppo", "vectors"]  # a further model of each kind


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, subprocess.CompletedProcess[str]]]:
    """The project after `python -m flows.align`, with what the command printed."""
    project = copy_project(tmp_path_factory.mktemp("whole") / "project")
    apply("smoke", project.root)
    project.set(runtime__checkpoint_steps=1, evaluate_methods__models=MEASURED)
    project.path("methods/dvc.lock").unlink(missing_ok=True)  # of another size, as the main line's
    project.without_git()
    yield project, project.run("-m", "flows.align", **own_stores(project))


def own_stores(project: Project) -> dict[str, str]:
    """No server or store of the user's is ever met."""
    return {
        "PREFECT_HOME": str(project.root / ".prefect"),
        "PREFECT_API_URL": "",
        "MLFLOW_TRACKING_URI": f"sqlite:///{project.root}/mlflow.db",
    }


def dvc(project: Project, *words: str) -> subprocess.CompletedProcess[str]:
    done = project.run("-m", "dvc", *words, **own_stores(project))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_flow_ends_well_and_says_where_to_look(built: Any) -> None:
    _, done = built
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(f"| {model} " in done.stdout for model in MODELS)
    assert "data/reports/report.html" in done.stdout and "make ui" in done.stdout


def test_the_report_has_its_form(built: Any) -> None:
    report = json.loads((built[0].root / "data/reports/report.json").read_text())
    assert report.keys() == {"seed", "models", "differences"} and list(report["models"]) == MODELS
    for figures in report["models"].values():
        for domain in ("in_domain", "out_of_domain", "long"):
            for metric in ("greedy_accuracy", "sampled_accuracy", "pass_at_2", "self_reward", "kl_to_sft", "kl_to_base"):
                assert figures[f"{domain}/{metric}"].keys() == {"mean", "low", "high"}
        assert figures["validation/held_out_loss"]["mean"] > 0
    assert report["models"]["sft"]["in_domain/kl_to_sft"]["mean"] == 0  # exactly: the same weights, scored alike
    pairs = {(d["model"], d["baseline"]) for d in report["differences"]}
    assert pairs == {(model, baseline) for model in MODELS for baseline in ("sft", "sft_tuned") if model != baseline}


def test_no_held_out_prompt_is_in_any_training_table(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import corpus, stage

    root = built[0].root
    tables = {path.stem: read_jsonl(path) for path in (root / "data/clean").glob("*.jsonl")}
    held_out = {row["prompt"] for name in ("validation", "evaluation") for row in tables[name]}
    seen = {row["prompt"] for name in ("demonstrations", "prompts", "suboptimal", "preferences") for row in tables[name]}
    seen |= {row["prompt"] for row in read_jsonl(root / "data/pairs/pairs.jsonl")}
    assert held_out and seen and not held_out & seen
    assert not {prompt_id(prompt) for prompt in held_out} & {row["prompt_id"] for row in tables["answers"]}
    monkeypatch.setattr(stage, "ROOT", root)
    made = corpus.documents(stage.Stage("pretrain", stage.read_params(root / "params.yaml")))
    rng = random.Random(0)
    corpus = [made(rng) for _ in range(5000)]
    assert not held_out & {prompt for prompt, _ in corpus}
    assert not any(prompt in response for _, response in corpus[:500] for prompt in held_out)


def test_versions_are_registered_and_generate(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", own_stores(built[0])["MLFLOW_TRACKING_URI"])
    mlflow.set_tracking_uri(own_stores(built[0])["MLFLOW_TRACKING_URI"])
    client = mlflow.MlflowClient()
    aliases = client.get_registered_model("apprentice").aliases
    assert aliases.keys() == {*MODELS, "champion"}
    pipeline = mlflow.transformers.load_model("models:/apprentice@srppo")
    text = pipeline([{"role": "user", "content": "total of 2 3 ?"}], max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"][-1]["role"] == "assistant"


def test_a_second_repro_runs_nothing_even_without_bytecode(built: Any) -> None:
    project = built[0]
    before = {path: path.stat().st_mtime_ns for path in (project.root / "data").rglob("*") if path.is_file()}
    for cache in list(project.root.rglob("__pycache__")):
        shutil.rmtree(cache)
    assert "Data and pipelines are up to date." in dvc(project, "repro").stdout
    assert "Running stage" not in dvc(project, "repro", "pipelines.dvc").stdout
    assert "up to date" in dvc(project, "status", "dvc.yaml").stdout
    assert before == {path: path.stat().st_mtime_ns for path in (project.root / "data").rglob("*") if path.is_file()}


def test_push_and_pull_bring_everything_back(built: Any, tmp_path: Path) -> None:
    project = built[0]
    dvc(project, "remote", "add", "--local", "-d", "box", str(tmp_path / "remote"))
    dvc(project, "push")
    elsewhere = Project(tmp_path / "elsewhere")
    ignored = shutil.ignore_patterns("data", "cache", "tmp", ".prefect", ".resume", "mlruns", "mlflow.db*")
    shutil.copytree(project.root, elsewhere.root, ignore=ignored)
    shutil.copytree(project.root / "data/raw", elsewhere.root / "data/raw")
    dvc(elsewhere, "pull", "-d", "pipelines.dvc")
    assert "up to date" in dvc(elsewhere, "status", "dvc.yaml").stdout
    for name in ("data/reports/report.html", "data/models/srppo/model.safetensors"):
        assert (elsewhere.root / name).read_bytes() == (project.root / name).read_bytes()


def test_killed_stages_go_on_and_end_with_the_same_bytes(built: Any) -> None:
    """A short schedule; `make chaos` carries out a long one over every stage."""
    project = built[0]
    lock = project.path("dvc.lock").read_bytes()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **own_stores(project), "PYTHONPATH": str(project.root), "PATH": path}
    stages = ["pretrain", "sft", "srppo", "pairs", "rso", "evaluate@srppo"]
    records = list(chaos(project, len(stages), 0, environment, stages))
    assert all(record.good for record in records) and any(record.hit.saved for record in records), table(records, 0)
    assert project.path("dvc.lock").read_bytes() == lock and "up to date" in dvc(project, "status", "dvc.yaml").stdout


def test_every_further_method_after_the_main_line(built: Any) -> None:
    """Both pipeline files through the flow; nothing of the main line runs again."""
    import mlflow

    project = built[0]
    before = {name: (project.root / f"data/reports/{name}").read_bytes() for name in ("report.html", "registry.json")}
    done = project.run("-m", "flows.align", "--methods", **own_stores(project))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "up to date" in dvc(project, "status").stdout
    assert before == {name: (project.root / f"data/reports/{name}").read_bytes() for name in before}
    further = read_params(project.root / "params.yaml").evaluate_methods.models
    report = json.loads((project.root / "data/reports/methods.json").read_text())
    assert list(report["models"]) == list(report["labels"]) == [*MODELS, *further]
    stages = yaml.safe_load((project.root / "methods/dvc.yaml").read_text())["stages"].values()
    wanted = {stage["meta"]["register"] for stage in stages if "register" in stage.get("meta", {})}
    client = mlflow.MlflowClient(own_stores(project)["MLFLOW_TRACKING_URI"], own_stores(project)["MLFLOW_TRACKING_URI"])
    assert client.get_registered_model("apprentice").aliases.keys() == {*MODELS, "champion", *wanted}
    columns = {name for path in (project.root / "data/reports").glob("*/history.csv") for name in next(csv.reader(path.open()))}
    assert columns - METRICS.keys() - TRAINING.keys() == {"step"}, "explain them in tasks/report_metrics.py"
