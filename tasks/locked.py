"""What dvc.lock says about every stage, as plain data, with the files in DVC's cache behind it.

`register` reads this and not the workspace, so a stage that ran, was cached or was pulled looks the same to it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.dvcstage import key_of, open_locked_repo, open_repo, params_of, stages_of
from tasks.lineage import labels_of

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.stage import PipelineStage

TABLES = re.compile("data/(?!models|reports)")
FIGURES = ("metrics.json", "report.json", "methods.json")


@dataclass(frozen=True)
class LockedOut:
    """One output: its path, its hash, whether it holds metrics, and its files by relative name (None: not pulled)."""

    path: str
    md5: str
    metric: bool
    files: dict[str, Path] | None

    def json(self) -> Any:
        """The content of a single JSON file."""
        return json.loads(self.only_file().read_text(encoding="utf-8"))

    def only_file(self) -> Path:
        """The one file of an output that is no folder."""
        if not self.files:
            raise FileNotFoundError(self.path)
        return self.files[""]


@dataclass(frozen=True)
class LockedStage:
    """One stage as last recorded: what went in, what came out.

    `key` hashes its command, params and inputs (dvcstage.key_of); `tables` are the hashes of the data it read, models and
    reports left out; `labels` is what it learned from beside demonstrations (lineage.labels_of); `stale` says that it was made
    from other outputs than the stages before it have now.
    """

    name: str
    file: str
    labels: str
    description: str
    meta: dict[str, Any]
    key: str
    params: dict[str, Any]
    tables: dict[str, str]
    outs: tuple[LockedOut, ...]
    stale: bool

    @property
    def pulled(self) -> bool:
        """Whether every output is in DVC's cache."""
        return all(out.files is not None for out in self.outs)

    @property
    def metrics(self) -> LockedOut | None:
        """The output that holds its metrics."""
        return next((out for out in self.outs if out.metric), None)

    @property
    def history(self) -> LockedOut | None:
        """The output that holds its training curve."""
        return next((out for out in self.outs if Path(out.path).name == "history.csv"), None)

    @property
    def model(self) -> LockedOut | None:
        """The checkpoint it writes; of several the one that its alias in the registry names."""
        models = {Path(out.path).name: out for out in self.outs if Path(out.path).parent.name == "models"}
        return models.get(self.meta.get("register", ""), next(iter(models.values()), None))


def locked_stages() -> list[LockedStage]:
    """Every stage that a dvc.lock knows, in the order of the pipeline files."""
    with open_locked_repo() as repo:
        labels = labels_of(stages_of(repo))
        stages = [stage for stage in repo.index.stages if getattr(stage, "cmd", None) and _recorded(stage)]
        made = {out.def_path: out.hash_info.value for stage in stages for out in stage.outs}
        return [_read(stage, labels[stage.name], made) for stage in stages]


def git_commit() -> str | None:
    """The commit the workspace stands on; None without git or before the first commit."""
    with open_repo() as repo:
        try:
            return str(repo.scm.get_rev())
        except Exception:  # no git, no commit, or a git that DVC cannot read: a tag less, nothing more
            return None


def _recorded(stage: "PipelineStage") -> bool:
    return bool(stage.outs) and all(out.hash_info and out.hash_info.value for out in stage.outs)


def _read(stage: "PipelineStage", labels: str, made: dict[str, str]) -> LockedStage:
    return LockedStage(
        stage.name,
        stage.path_in_repo,
        labels,
        stage.desc or "",
        stage.meta or {},
        key_of(stage),
        params_of(stage),
        {dep.def_path: dep.hash_info.value for dep in stage.deps if TABLES.match(dep.def_path)},
        tuple(
            LockedOut(out.def_path, out.hash_info.value, Path(out.def_path).name in FIGURES, _files(out)) for out in stage.outs
        ),
        any(_outdated(dep, made) for dep in stage.deps),
    )


def _outdated(dep: "Output", made: dict[str, str]) -> bool:
    """Whether a dependency that other stages write had another content when the stage ran."""
    if dep.def_path in made:
        return dep.hash_info.value != made[dep.def_path]
    ours = any(_inside(dep.def_path, out) or _inside(out, dep.def_path) for out in made)
    if not ours or not dep.exists:
        return False
    recorded = dep.hash_info
    dep.save()
    fresh, dep.hash_info = dep.hash_info, recorded
    return fresh != recorded


def _inside(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/")


def _files(out: "Output") -> dict[str, Path] | None:
    """Relative name to file in DVC's cache ("" for an output that is a single file); None when any is missing."""
    if not out.use_cache:
        path = Path(out.fs_path)
        return {"": path} if path.is_file() else None
    tree = out.get_obj()
    if tree is None:
        return None
    files = {name: Path(out.cache.oid_to_path(value)) for name, value in _entries(out, tree)}
    return files if all(path.is_file() for path in files.values()) else None


def _entries(out: "Output", tree: Any) -> Iterator[tuple[str, str]]:
    if not out.is_dir_checksum:
        yield "", out.hash_info.value
        return
    for key, _meta, hash_info in tree:
        yield "/".join(key), hash_info.value
