"""MLflow mirrors the workspace: real DVC, a real MLflow database, fake checkpoints, `python -m tasks.register`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.utils.file_utils import local_file_uri_to_path

from tests.conftest import Project
from tests.toy import empty_store, knobs, make_toy, run

pytestmark = pytest.mark.slow
MODEL = "apprentice"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A toy after `dvc repro`; the tests that share it change nothing, or change it back."""
    toy = make_toy(tmp_path_factory.mktemp("register") / "toy")
    done = run(toy, "-m", "dvc", "repro")
    assert done.returncode == 0, done.stdout
    return toy


@pytest.fixture
def toy(made: Project, tmp_path: Path) -> Project:
    """A toy that was reproduced but never registered, for a test to change."""
    copy = Project(tmp_path / "toy")
    shutil.copytree(made.root, copy.root, ignore=shutil.ignore_patterns("mlflow.db*", "mlruns", ".telemetry"), symlinks=True)
    shutil.copy(empty_store(), copy.path("mlflow.db"))
    return copy


def client(toy: Project) -> MlflowClient:
    uri = f"sqlite:///{toy.root / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri, uri)


@pytest.fixture(autouse=True)
def _leave_no_address_behind() -> Any:
    yield
    mlflow.set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def register(toy: Project, **environment: str) -> str:
    done = run(toy, "-m", "tasks.register", **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def repro(toy: Project, **environment: str) -> str:
    done = run(toy, "-m", "dvc", "repro", **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def versions(toy: Project) -> list[ModelVersion]:
    return sorted(client(toy).search_model_versions(f"name = '{MODEL}'"), key=lambda version: int(version.version))


def aliases(toy: Project) -> dict[str, str]:
    """Alias to the hash of the checkpoint it names."""
    own = client(toy)
    by_version = {str(version.version): version.tags["dvc.md5"] for version in versions(toy)}
    return {alias: by_version[str(number)] for alias, number in own.get_registered_model(MODEL).aliases.items()}


def model_metrics(toy: Project, version: ModelVersion) -> list[tuple[str, float]]:
    model = client(toy).get_logged_model(version.source.removeprefix("models:/"))
    return sorted((metric.key, metric.value) for metric in model.metrics or [])


def snapshot(toy: Project) -> dict[str, Any]:
    """All that the store says, ids and times left out."""
    own = client(toy)
    runs = own.search_runs([own.get_experiment_by_name(MODEL).experiment_id])
    return {
        "versions": [(v.tags, model_metrics(toy, v), v.description, v.status) for v in versions(toy)],
        "aliases": aliases(toy),
        "runs": sorted((r.info.run_name, r.info.status, sorted({**r.data.tags, **r.data.params}.items())) for r in runs),
        "metrics": sorted(
            (r.info.run_name, name, [(m.step, m.value) for m in own.get_metric_history(r.info.run_id, name)])
            for r in runs
            for name in r.data.metrics
            if not name.startswith("runtime/")
        ),
    }


def locked_md5(toy: Project, stage: str) -> str:
    return json.loads(toy.path("data/reports/registry.json").read_text())[stage]


def test_a_version_for_each_checkpoint_under_its_methods_alias(made: Project) -> None:
    found = {version.tags["method"]: version for version in versions(made)}
    assert set(found) == {"base", "sft"}
    assert found["sft"].tags["dvc.stage"] == "sft" and found["sft"].tags["seed"] == "0"
    assert found["sft"].tags["dvc.md5"] == locked_md5(made, "sft") and len(found["sft"].tags["params_md5"]) == 32
    assert {name: aliases(made)[name] for name in ("base", "sft")} == {
        name: found[name].tags["dvc.md5"] for name in ("base", "sft")
    }


def test_the_champion_is_best_by_the_named_metric_and_says_so(made: Project) -> None:
    models = json.loads(made.path("data/reports/report.json").read_text())["models"]
    best = min(models, key=lambda name: models[name]["validation/held_out_loss"]["mean"])
    assert aliases(made)["champion"] == locked_md5(made, best)
    tagged = [v.tags["method"] for v in versions(made) if v.tags.get("selected_by") == "validation/held_out_loss (min)"]
    assert tagged == [best]


def test_a_run_for_every_stage_with_metrics_and_curves_where_there_was_training(made: Project) -> None:
    own = client(made)
    runs = {r.data.tags["dvc.stage"]: r for r in own.search_runs([own.get_experiment_by_name(MODEL).experiment_id])}
    assert set(runs) == {"prepare", "words", "base", "sft", "evaluate@base", "evaluate@sft", "report"}
    assert all(run.info.status == "FINISHED" for run in runs.values())
    losses = [float(line.split(",")[1]) for line in made.path("data/reports/sft/history.csv").read_text().splitlines()[1:]]
    curve = own.get_metric_history(runs["sft"].info.run_id, "curve/loss")
    assert [(m.step, m.value) for m in curve] == list(enumerate(losses, 1))
    assert runs["sft"].data.params == {"seed": "0", "sft.learning_rate": "0.0005"}
    assert (
        runs["prepare"].data.metrics["loss"] == json.loads(made.path("data/reports/prepare/metrics.json").read_text())["loss"]
    )
    assert {file.path for file in own.list_artifacts(runs["report"].info.run_id)} == {"report.md", "report.html"}


def test_evaluations_are_on_the_model_and_on_its_run(made: Project) -> None:
    mean = json.loads(made.path("data/reports/report.json").read_text())["models"]["sft"]["validation/held_out_loss"]["mean"]
    (version,) = [v for v in versions(made) if v.tags["method"] == "sft"]
    assert ("validation/held_out_loss", mean) in model_metrics(made, version)
    metrics = client(made).get_run(version.run_id).data.metrics
    assert metrics["validation/held_out_loss"] == mean and "validation/held_out_loss_high" not in metrics
    assert ("validation/held_out_loss_high", mean + 1) in model_metrics(made, version)


def test_weights_are_links_to_dvcs_cache(made: Project) -> None:
    (version,) = [v for v in versions(made) if v.tags["method"] == "sft"]
    place = client(made).get_logged_model(version.source.removeprefix("models:/")).artifact_location
    weights = Path(local_file_uri_to_path(place)) / "model" / "model.safetensors"
    assert weights.read_bytes() == made.path("data/models/sft/model.safetensors").read_bytes()
    cached = {path.stat().st_ino for path in made.path(".dvc/cache").rglob("*") if path.is_file()}
    assert weights.stat().st_ino in cached


def test_registering_again_changes_nothing(made: Project) -> None:
    before = snapshot(made)
    stamp, record = made.path("data/reports/complete"), made.path("data/reports/registry.json")
    hashes = record.read_bytes()
    register(made)
    assert snapshot(made) == before
    assert stamp.read_bytes() == b"ok\n" and record.read_bytes() == hashes
    status = run(made, "-m", "dvc", "status", "dvc.yaml").stdout
    assert "up to date" in status


def test_a_deleted_store_comes_back_in_full(made: Project) -> None:
    before = snapshot(made)
    mlflow.set_tracking_uri(None)
    made.path("mlflow.db").unlink()
    shutil.rmtree(made.path("mlruns"))
    register(made)
    assert snapshot(made) == before


def test_aliases_follow_params_there_and_back(toy: Project) -> None:
    register(toy)
    first = aliases(toy)
    toy.path("salt").write_text("b")
    repro(toy)
    second = aliases(toy)
    assert second["sft"] != first["sft"] and len(versions(toy)) == 4
    toy.path("salt").write_text("a")
    assert "is cached" in repro(toy)
    assert aliases(toy) == first and len(versions(toy)) == 4
    assert sum("selected_by" in version.tags for version in versions(toy)) == 1


def test_an_experiment_adds_versions_and_moves_nothing(toy: Project) -> None:
    register(toy)
    first, before = aliases(toy), versions(toy)
    toy.path("salt").write_text("b")
    repro(toy, DVC_EXP_NAME="bold-try")
    added = versions(toy)[2:]
    assert aliases(toy) == first
    assert [v.tags["method"] for v in added] == ["base", "sft"]
    assert all(v.tags["experiment"] == "bold-try" and v.tags["seed"] == "0" for v in added)
    assert [v.tags for v in versions(toy)[:2]] == [v.tags for v in before]
    register(toy)
    assert aliases(toy)["sft"] == added[1].tags["dvc.md5"]


def test_a_workspace_elsewhere_registers_in_the_projects_store_and_moves_nothing(toy: Project, tmp_path: Path) -> None:
    register(toy)
    first = aliases(toy)
    other = Project(tmp_path / "elsewhere")
    shutil.copytree(toy.root, other.root, ignore=shutil.ignore_patterns("mlflow.db*", "mlruns"), symlinks=True)
    other.path("salt").write_text("b")
    repro(other, DVC_ROOT=str(toy.root))
    assert not other.path("mlflow.db").exists()
    assert aliases(toy) == first and [v.tags.get("experiment") for v in versions(toy)] == [None, None, "elsewhere", "elsewhere"]


def test_a_new_evaluation_replaces_the_old_figures_unless_it_is_an_experiments(toy: Project) -> None:
    register(toy)
    (before,) = [v for v in versions(toy) if v.tags["method"] == "sft"]
    old = model_metrics(toy, before)
    worker = toy.path("worker.py")
    worker.write_text(worker.read_text().replace('v["loss"] - 1', 'v["loss"] - 5'))
    done = run(toy, "-m", "dvc", "repro", "--force", "--single-item", "report")
    assert done.returncode == 0, done.stdout
    repro(toy, DVC_EXP_NAME="bold-try")
    assert [(v.tags, model_metrics(toy, v)) for v in versions(toy) if v.tags["method"] == "sft"] == [(before.tags, old)]
    register(toy)
    assert len(versions(toy)) == 2
    (after,) = [v for v in versions(toy) if v.tags["method"] == "sft"]
    names = [name for name, _value in model_metrics(toy, after)]
    figures = dict(model_metrics(toy, after))
    assert len(names) == len(set(names))
    assert figures["validation/held_out_loss_low"] == figures["validation/held_out_loss"] - 5
    assert before.tags["metrics_md5"] != after.tags["metrics_md5"]


def test_data_that_is_not_here_is_named_and_left_out(toy: Project) -> None:
    md5 = locked_md5(toy, "sft")
    toy.path(f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}").unlink()
    said = register(toy)
    assert "sft: its data is not here" in said and "dvc pull" in said
    assert [version.tags["method"] for version in versions(toy)] == ["base"]


def test_a_report_on_other_models_leaves_champion_and_figures_alone(toy: Project) -> None:
    register(toy)
    first = aliases(toy)
    toy.path("salt").write_text("b")
    done = run(toy, "-m", "dvc", "repro", "sft")
    assert done.returncode == 0, done.stdout
    said = register(toy)
    assert "evaluate@sft" in said and "behind" in said
    assert aliases(toy)["champion"] == first["champion"] and aliases(toy)["sft"] != first["sft"]
    (new,) = [v for v in versions(toy) if v.tags["dvc.md5"] == aliases(toy)["sft"]]
    assert not any(name.startswith("validation/") for name, _value in model_metrics(toy, new))


def test_a_metric_that_the_report_has_not_is_a_clear_error(toy: Project) -> None:
    toy.set(register__champion_metric="accuracy")
    done = run(toy, "-m", "tasks.register")
    assert done.returncode == 2
    assert "register.champion_metric: report.json has no 'accuracy'; it has validation/held_out_loss" in done.stdout


@pytest.mark.parametrize("closed", [True, False])
def test_a_live_run_is_taken_over_if_nobody_may_write_to_it_any_more(toy: Project, closed: bool) -> None:
    own = client(toy)
    code = "import json; from tasks.dvcstage import current_key; print(json.dumps(current_key('sft')))"
    from tests.toy import ask

    key = ask(toy, code)
    group = own.create_experiment(MODEL)
    live = own.create_run(group, tags={"dvc.stage": "sft", "dvc.inputs": key}).info.run_id
    rows = toy.path("data/reports/sft/history.csv").read_text().splitlines()[1:]
    for line in rows[:2]:
        own.log_metric(live, "curve/loss", float(line.split(",")[1]), step=int(line.split(",")[0]))
    if closed:
        own.set_terminated(live, "KILLED")
    register(toy)
    (version,) = [v for v in versions(toy) if v.tags["method"] == "sft"]
    (run,) = own.search_runs([group], "tags.`dvc.stage` = 'sft'")
    assert version.run_id == run.info.run_id and (run.info.run_id == live) == closed
    assert [m.step for m in own.get_metric_history(version.run_id, "curve/loss")] == [1, 2, 3, 4, 5]


def test_an_attempt_that_was_killed_leaves_nothing_behind(toy: Project) -> None:
    own = client(toy)
    group = own.create_experiment(MODEL)
    tags = {"dvc.md5": locked_md5(toy, "sft"), "dvc.stage": "sft"}
    own.create_logged_model(group, f"{MODEL}-sft", tags=tags)
    register(toy)
    (model,) = own.search_logged_models([group], f"name = '{MODEL}-sft'")
    assert model.status == "READY"


def test_a_base_that_is_only_pinned_is_registered_with_its_files(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy")
    worker = toy.path("worker.py")
    pinned = '(model / "pinned.json").write_text("{}") if name == "base" else (model / "model.safetensors")'
    worker.write_text(worker.read_text().replace('(model / "model.safetensors")', pinned, 1))
    repro(toy)
    (version,) = [v for v in versions(toy) if v.tags["method"] == "base"]
    place = client(toy).get_logged_model(version.source.removeprefix("models:/")).artifact_location
    folder = Path(local_file_uri_to_path(place))
    assert (folder / "model" / "pinned.json").is_file() and "flavors: {}" in (folder / "MLmodel").read_text()


def test_a_registered_model_loads_and_generates(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy")
    knobs(toy, real=True)
    repro(toy)
    client(toy)
    pipeline = mlflow.transformers.load_model(f"models:/{MODEL}@sft")
    (answer,) = pipeline("a b", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("a b")


def best_of(toy: Project, *models: str) -> str:
    """Which of the models has the lowest held-out loss in the report."""
    found = json.loads(toy.path("data/reports/report.json").read_text())["models"]
    return min(models, key=lambda name: found[name]["validation/held_out_loss"]["mean"])


def test_a_model_that_learned_from_labels_is_no_champion(toy: Project) -> None:
    toy.set(register__champion_mode="max")
    worker = toy.path("worker.py")
    worker.write_text(worker.read_text().replace("loss = {m:", 'models["sft"]["loss"] = 10**6\n    loss = {m:'))
    done = run(toy, "-m", "dvc", "repro", "--force", "--single-item", "report")
    assert done.returncode == 0, done.stdout
    register(toy)
    assert aliases(toy)["champion"] == locked_md5(toy, "sft")
    path = toy.path("dvc.yaml")
    pipeline = yaml.safe_load(path.read_text())
    pipeline["stages"]["sft"]["deps"].append("data/clean/answers.jsonl")
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    done = run(toy, "-m", "dvc", "repro", "sft")
    assert done.returncode == 0, done.stdout
    register(toy)
    assert aliases(toy)["champion"] == locked_md5(toy, "base")
    assert {v.tags["method"]: v.tags["labels"] for v in versions(toy)} == {"base": "none", "sft": "verifier"}


@pytest.fixture(scope="module")
def all_made(made: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A toy after `dvc repro -P`, in stores of its own; the tests that share it change nothing."""
    copy = Project(tmp_path_factory.mktemp("methods") / "toy")
    shutil.copytree(made.root, copy.root, ignore=shutil.ignore_patterns("mlflow.db*", "mlruns", ".telemetry"), symlinks=True)
    shutil.copy(empty_store(), copy.path("mlflow.db"))
    register(copy)
    done = run(copy, "-m", "dvc", "repro", "-P")
    assert done.returncode == 0, done.stdout
    return copy


def test_the_further_methods_are_registered_as_the_main_line_is(all_made: Project) -> None:
    found = {version.tags["method"]: version for version in versions(all_made)}
    assert set(found) == {"base", "sft", "extra", "told"}
    assert {name: version.tags["labels"] for name, version in found.items()} == {
        "base": "none",
        "sft": "none",
        "extra": "none",
        "told": "verifier",
    }
    assert found["extra"].tags["dvc.stage"] == "extra"
    assert aliases(all_made)["extra"] == found["extra"].tags["dvc.md5"]
    mean = json.loads(all_made.path("data/reports/methods.json").read_text())["models"]["extra"]["validation/held_out_loss"]
    assert ("validation/held_out_loss", mean["mean"]) in model_metrics(all_made, found["extra"])
    own = client(all_made)
    assert [m.step for m in own.get_metric_history(found["extra"].run_id, "curve/loss")] == [1, 2, 3, 4, 5]
    runs = own.search_runs([own.get_experiment_by_name(MODEL).experiment_id])
    assert {run.data.tags["dvc.stage"] for run in runs} >= {"sft", "extra", "told", "evaluate_methods@extra", "report_methods"}


def test_each_of_the_two_writes_its_own_record_and_stamp(all_made: Project) -> None:
    main, further = (
        json.loads(all_made.path(f"data/reports/{name}").read_text()) for name in ("registry.json", "registry_methods.json")
    )
    assert set(main) == {"base", "sft"} and set(further) == {"extra", "told"}
    assert all_made.path("data/reports/complete").read_bytes() == all_made.path("data/reports/complete_methods").read_bytes()
    assert run(all_made, "-m", "dvc", "status").stdout.strip().endswith("up to date.")


def test_the_champion_stays_with_the_main_line_whichever_ran_last(all_made: Project, tmp_path: Path) -> None:
    toy = Project(tmp_path / "toy")
    shutil.copytree(all_made.root, toy.root, ignore=shutil.ignore_patterns("mlflow.db*", "mlruns"), symlinks=True)
    shutil.copy(empty_store(), toy.path("mlflow.db"))
    done = run(toy, "-m", "tasks.register_methods")
    assert done.returncode == 0, done.stdout
    assert set(aliases(toy)) == {"extra", "told"}
    register(toy)
    champion = aliases(toy)["champion"]
    assert champion == locked_md5(toy, best_of(toy, "base", "sft"))
    assert run(toy, "-m", "tasks.register_methods").returncode == 0
    assert aliases(toy)["champion"] == champion and set(aliases(toy)) == {"base", "sft", "extra", "told", "champion"}
    toy.path("salt").write_text("b")
    done = run(toy, "-m", "dvc", "repro", "sft")
    assert done.returncode == 0, done.stdout
    said = run(toy, "-m", "tasks.register_methods").stdout
    assert "no report on these models (evaluate@base, evaluate@sft behind)" in said and "see `dvc repro -P`" in said
