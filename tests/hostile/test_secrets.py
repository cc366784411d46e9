"""Tokens and passwords in the environment and in DVC's local settings reach nothing that is written, printed or listed."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import ui
from flows.command import answers
from tasks import store
from tests.conftest import Project
from tests.toy import empty_store, environment, free_port, knobs, make_toy, run, wait_for, with_stores

TOKEN, PASSWORD, REMOTE = "hf_t0ken0ftheh0ub", "s3cret-0f-the-st0re", "s3cret-0f-the-rem0te"
SECRETS = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": REMOTE}


@pytest.fixture
def toy(tmp_path: Path) -> Project:
    toy = with_stores(make_toy(tmp_path / "toy"), mlflow=False)
    with toy.path(".dvc/config.local").open("a") as file:
        file.write(f"    remote = far\n['remote \"far\"']\n    url = ssh://ann:{REMOTE}@192.0.2.1/store\n")
    return toy


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An MLflow server that a name and a password stand before; its address with both."""
    port = free_port()
    shutil.copy(empty_store(), tmp_path / "mlflow.db")
    child = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), 300)
        yield f"http://ann:{PASSWORD}@127.0.0.1:{port}"
    finally:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(60)


def leaks(root: Path, said: str) -> list[str]:
    """Where a secret stands: files under a folder (DVC's own settings left out), or what was said."""
    words = [word.encode() for word in (TOKEN, PASSWORD, REMOTE)]
    settings = root / "toy/.dvc/config.local"
    files = [path for path in root.rglob("*") if path.is_file() and path != settings]
    found = [str(path.relative_to(root)) for path in files if any(word in path.read_bytes() for word in words)]
    return found + [line for line in said.splitlines() if any(word.decode() in line for word in words)]


def test_a_leak_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/log").write_bytes(b"\x00at http://ann:" + PASSWORD.encode() + b"@host\x00")
    assert leaks(tmp_path, f"one\ntoken {TOKEN}") == ["deep/log", f"token {TOKEN}"]


@pytest.mark.slow
def test_a_flow_and_what_it_leaves_hold_no_secret(toy: Project, server: str) -> None:
    """Stages, live charts, versions with their cards and Prefect's database; MLflow behind a name and a password."""
    knobs(toy, real=True)
    secrets = {**SECRETS, "MLFLOW_TRACKING_URI": server, "HOME": str(toy.root.parent / "home")}
    done = run(toy, "-m", "flows.align", **secrets)
    assert done.returncode == 0, done.stdout
    assert "MLflow: http://***@127.0.0.1:" in done.stdout
    for kept, word in ((".prefect", b"align"), ("../mlflow.db", b"apprentice")):  # what was looked through holds something
        assert any(word in path.read_bytes() for path in [toy.path(kept), *toy.path(kept).rglob("*")] if path.is_file())
    assert leaks(toy.root.parent, done.stdout) == []


@pytest.mark.slow
@pytest.mark.parametrize("address", ["http://ann:{}@127.0.0.1:9", "postgresql://ann:{}@127.0.0.1:9/x"])
def test_a_store_that_fails_tells_no_secret(toy: Project, address: str) -> None:
    """In its own words, not in MLflow's traceback."""
    assert run(toy, "-m", "dvc", "repro", "report", **SECRETS).returncode == 0
    done = run(toy, "-m", "flows.align", **SECRETS, MLFLOW_TRACKING_URI=address.format(PASSWORD))
    assert done.returncode == 1, done.stdout
    assert "[register] StoreError: MLflow" in done.stdout and "://***@127.0.0.1" in done.stdout
    assert "Traceback" not in done.stdout
    assert leaks(toy.root.parent, done.stdout) == []


def test_every_secret_of_an_address_is_masked() -> None:
    for text, told in (
        ("at postgresql://ann:pw@host:5432/db now", "at postgresql://***@host:5432/db now"),
        ("http://ann:p@ss:w@rd@host/x", "http://***@host/x"),
        ("mssql+pyodbc://host/db?user=ann&Password=pw&x=1", "mssql+pyodbc://host/db?user=ann&Password=***&x=1"),
        ("s3://bucket/x?secret_key=pw&sslpassword=pw end", "s3://bucket/x?secret_key=***&sslpassword=*** end"),
        ("sqlite:////a@b/c.db, ann@host", "sqlite:////a@b/c.db, ann@host"),
    ):
        assert store.masked(text) == told


def test_a_server_is_asked_without_the_name_and_password() -> None:
    """urllib would take both for a part of the host, and tell them when it fails."""
    for port in ("", ":9"):
        with pytest.raises(store.StoreError, match=r"does not answer at http://\*\*\*@127\.0\.0\.1") as error:
            store._check_answers(f"http://ann:{PASSWORD}@127.0.0.1{port}")
        assert PASSWORD not in str(error.value) and "refused" in str(error.value)


def test_the_stores_address_stands_in_no_command() -> None:
    """Which every user of the machine can list."""
    server = ui.mlflow_server(5000, f"postgresql://ann:{PASSWORD}@host/db", "1")
    assert not any(PASSWORD in word for word in server.command)
    assert server.env["MLFLOW_BACKEND_STORE_URI"] == f"postgresql://ann:{PASSWORD}@host/db"


def test_a_servers_last_words_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.server.answers", lambda url: False)
    server = ui.mlflow_server(5000, "x", "1")
    server.lines.append(f"cannot open postgresql://ann:{PASSWORD}@host/db")
    with pytest.raises(ui.ServerError, match=r"postgresql://\*\*\*@host/db"):
        server.wait_until_it_answers()


@pytest.mark.slow
def test_mlflows_server_serves_the_store_of_its_environment(toy: Project) -> None:
    place = toy.root / "elsewhere.db"
    words = ["-m", "flows.ui", "--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    own = environment(toy, MLFLOW_TRACKING_URI=f"sqlite:///{place}")
    with toy.path("log").open("w") as log:
        child = subprocess.Popen([sys.executable, *words], cwd=toy.root, env=own, stdout=log, stderr=log)
    try:
        wait_for(lambda: "Ctrl-C" in toy.path("log").read_text() or child.poll() is not None, 300)
        assert child.poll() is None, toy.path("log").read_text()
        page = next(line for line in toy.path("log").read_text().splitlines() if line.startswith("MLflow"))
        address = page.split()[1].partition("/#")[0]
        search = (
            "import json, sys, mlflow\n"
            f"found = mlflow.MlflowClient({address!r}).search_experiments()\n"
            "print(json.dumps(sorted(experiment.name for experiment in found)))"
        )
        assert run(toy, "-c", search).stdout.splitlines()[-1] == '["Default", "apprentice"]'
        assert place.exists() and not (toy.root / "mlflow.db").exists()
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(60)
