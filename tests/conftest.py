"""Fixtures of all tests: a project of their own in a temporary folder, and params with a few entries changed."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.config import Params, parse

ROOT = Path(__file__).parents[1]
PARTS = ["apprentice", "tasks", "flows", "methods", "presets", "data/raw", ".dvc/config", ".dvcignore", ".gitignore"]
PARTS += ["params.yaml", "dvc.yaml", "pipelines.dvc", "prefect.yaml", "kubernetes", "docs", "pyproject.toml"]


def changed(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of parsed params with entries such as {"ingest.source.kind": "jsonl"} set."""
    raw = copy.deepcopy(raw)
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = raw
        for part in sections:
            section = section[part]
        section[name] = value
    return raw


@dataclass
class Project:
    """A copy of the project's tracked files, with no data, store or history of the user's."""

    root: Path

    def path(self, name: str) -> Path:
        return self.root / name

    def without_git(self) -> None:
        """Let DVC do without a git repository."""
        self.path(".dvc/config.local").write_text("[core]\n    no_scm = true\n")

    def set(self, **changes: Any) -> None:
        """Change params.yaml; double underscores stand for dots: `ingest__source__kind="jsonl"`."""
        file = self.path("params.yaml")
        keys = {key.replace("__", "."): value for key, value in changes.items()}
        file.write_text(yaml.safe_dump(changed(yaml.safe_load(file.read_text()), keys), sort_keys=False))

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy, e.g. `run("-m", "tasks.ingest")` for Python."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for `python` of dvc.yaml
        own |= {"PYTHONPATH": str(self.root), "PATH": path, "DVC_NO_ANALYTICS": "1", **environment}
        return subprocess.run([sys.executable, *command], cwd=self.root, env=own, capture_output=True, text=True)


def copy_project(root: Path) -> Project:
    """Copy the project's tracked files to a folder."""
    for part in PARTS:
        source, target = ROOT / part, root / part
        if not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "dvc.lock"))
        else:
            shutil.copy(source, target)
    return Project(root)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that several processes end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    whole = ROOT / "tests" / "test_whole_pipeline.py"
    items.sort(key=lambda item: (item.path != whole, item.path not in slow))


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Stages flush denormal numbers to zero, for their whole process: of several in this one, the tests after it see none."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh copy of the project in a temporary folder."""
    return copy_project(tmp_path / "project")


@pytest.fixture
def params() -> Callable[..., Params]:
    """The shipped params, with changes: `params(**{"ingest.same_prompt": "first"})`."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    return lambda **changes: parse(changed(raw, changes))


@pytest.fixture
def stage_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: Callable[..., Params]) -> Iterator[Callable[..., Any]]:
    """Make a stage that reads and writes in a temporary folder: `stage_of("ingest", **{"ingest.same_prompt": "first"})`.

    It takes the place of the one before it, whose locks go, as they would with its process.
    """
    from tasks import stage
    from tests.main_line import end_of_process

    monkeypatch.setattr(stage, "ROOT", tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    made: list[Any] = []

    def make(name: str, **changes: Any) -> Any:
        for earlier in made:
            end_of_process(earlier)
        made.append(stage.Stage(name, params(**changes)))
        return made[-1]

    yield make
    for one in made:
        end_of_process(one)
