"""The MLflow store: where it is, how it is opened, and the shapes in which it takes params and metrics."""

import logging
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Container, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.alone import hold
from tasks.stage import StageError, stores_root

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KIND = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's UI shows its pages for agents
BATCH = 1000  # metrics MLflow takes at once
_opening = threading.Lock()


class StoreError(StageError):
    """MLflow's store cannot be reached, or does not do what it is asked; the message says where it was sought."""


def store_uri() -> str:
    """MLFLOW_TRACKING_URI, or the database at the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{stores_root() / 'mlflow.db'}"


def masked(text: str) -> str:
    """A text fit to be printed: names, passwords and tokens in the addresses in it are left out."""
    text = re.sub(r"://[^/?#\s]*@", "://***@", text)  # to the last @: a password may hold one
    return re.sub(r"(?i)([?&][^=&\s]*(?:password|passwd|pwd|token|secret|key)=)[^&\s]*", r"\1***", text)


@contextmanager
def told_by_store() -> Iterator[None]:
    """Say in a line, without passwords, what MLflow or its database raises."""
    try:
        yield
    except Exception as error:  # theirs share no class
        theirs = type(error).__module__.partition(".")[0] in ("mlflow", "requests", "sqlalchemy")
        if not theirs and not isinstance(error, ModuleNotFoundError):  # a database's driver is not installed
            raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise StoreError(masked(f"MLflow at {store_uri()} (MLFLOW_TRACKING_URI) failed: {reason}")) from None


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Let one process of the project at a time do this."""
    file, _waited = hold(stores_root() / ".telemetry" / f"{name}.lock", lambda _: None)
    with file:
        yield


def open_store(experiment: str) -> tuple["MlflowClient", str]:
    """A client and the experiment's id; makes both database and experiment when they are not there yet.

    Two processes that first open a database together would race in its migration, hence the lock.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # MLflow would send a write again that may have arrived: a second run, a second version. Who writes here looks first.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it prints the address as it is, passwords too
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = store_uri()
    _check_answers(uri)
    with _opening, alone("mlflow"):
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return client, client.create_experiment(experiment, artifact_location=_artifacts(uri, experiment), tags=KIND)
        if found.lifecycle_stage != "active":
            client.restore_experiment(found.experiment_id)
    return client, str(found.experiment_id)


def _check_answers(uri: str) -> None:
    """Raise at once when a server is named that is not there; MLflow itself would try for minutes."""
    if not uri.startswith("http"):
        return
    parts = urllib.parse.urlsplit(uri)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # urllib takes a name for a part of the host
    try:
        urllib.request.urlopen(bare, timeout=10).close()
    except urllib.error.HTTPError:
        return  # it answers, be it with "not allowed"
    except (OSError, ValueError, HTTPException) as error:
        raise StoreError(masked(f"MLflow does not answer at {uri} (MLFLOW_TRACKING_URI): {error}")) from None


def _artifacts(uri: str, experiment: str) -> str | None:
    """Beside a database that is a file; a server decides for itself."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlruns" / experiment).as_uri()


def find_run(client: "MlflowClient", experiment_id: str, tags: dict[str, str]) -> "list[Run]":
    """Runs that carry these tags, the newest first."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(client.search_runs([experiment_id], wanted, order_by=["attributes.start_time DESC"]))


def flat(values: dict[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one; {"mean", "low", "high"} becomes `name`, `name_low`, `name_high`."""
    if "mean" in values and set(values) >= {"low", "high"} and prefix:
        return {prefix: values["mean"], f"{prefix}_low": values["low"], f"{prefix}_high": values["high"]}
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{separator}{key}" if prefix else str(key)
        found |= flat(value, separator, name) if isinstance(value, dict) else {name: value}
    return found


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The figures among nested values, as MLflow takes them: flat, finite."""
    found = {key: value for key, value in flat(values, "/").items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in found.items() if abs(value) < float("inf")}


def log_params(client: "MlflowClient", run_id: str, params: dict[str, Any], known: Container[str] = ()) -> None:
    """Log nested params under dotted names, those left out that the run has."""
    from mlflow.entities import Param

    found = [Param(key, str(value)[:6000]) for key, value in flat(params, ".").items() if key not in known]
    for start in range(0, len(found), 100):
        client.log_batch(run_id, params=found[start : start + 100])
