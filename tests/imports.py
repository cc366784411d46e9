"""Who imports what, read with `ast`: nothing is run, imports inside functions count.

`python -m tests.imports` prints the code that each DVC stage must depend on; `--write` puts it into the pipeline files.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("apprentice", "tasks", "flows")
# Imports that make no dependency: through these a stage finds its key and its outputs and sweeps, and no byte of a result.
BOOKKEEPING = {
    ("tasks/stage.py", "tasks/dvcstage.py"),
    ("tasks/stage.py", "tasks/unfinished.py"),
    ("tasks/unfinished.py", "tasks/dvcstage.py"),
}
# Files that make none either: they hold names, types and ranges of params.yaml and no value (tests/test_pipeline.py sees to
# it), and values are dependencies by themselves. Or else another method's section would retrain everything.
NO_VALUES = {f"apprentice/{name}.py" for name in ("schema", "sections", "method_sections", "config")}


def sources(*packages: str) -> list[str]:
    """Every Python file of the packages, as paths from the root."""
    return sorted(str(path.relative_to(ROOT)) for name in packages for path in (ROOT / name).rglob("*.py"))


@cache
def tree_of(path: str) -> ast.Module:
    """The parsed file."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def file_of(module: str) -> str | None:
    """The file of one of our modules, or None for a library's."""
    base = ROOT.joinpath(*module.split("."))
    if module.split(".")[0] not in PACKAGES:
        return None
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return str(candidate.relative_to(ROOT))
    return None


@cache
def imported_by(path: str) -> frozenset[str]:
    """Modules a file imports anywhere, ours by their full name: `from tasks import stage` gives tasks and tasks.stage."""
    return frozenset(name for node in ast.walk(tree_of(path)) for name in _names(node))


@cache
def imported_at_start(path: str) -> frozenset[str]:
    """Modules a file imports when it is itself imported: those outside functions and `if TYPE_CHECKING`."""
    return frozenset(name for node in _outside_functions(tree_of(path)) for name in _names(node))


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _outside_functions(child)


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            raise ValueError(f"line {node.lineno}: relative import; write the full name")
        yield node.module or ""
        yield from (name for alias in node.names if file_of(name := f"{node.module}.{alias.name}"))
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        if not (node.args and isinstance(node.args[0], ast.Constant)):
            raise ValueError(f"line {node.lineno}: an import by a computed name hides a dependency")
        yield str(node.args[0].value)


@cache
def our_imports(path: str) -> frozenset[str]:
    """Our files a file imports. A package's `__init__.py` counts when it holds more than a docstring."""
    files = {file_of(part) for name in imported_by(path) for part in _with_parents(name)}
    return frozenset(file for file in files if file and file != path and not _is_bare_package(file))


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_bare_package(path: str) -> bool:
    body = tree_of(path).body
    return path.endswith("__init__.py") and all(isinstance(node, ast.Expr) for node in body)


def closure(path: str) -> list[str]:
    """The file and all of ours that it imports, directly or through others, what makes no dependency left out; sorted."""
    found, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += [name for name in our_imports(file) - NO_VALUES if (file, name) not in BOOKKEEPING]
    return sorted(found)


def pipelines() -> list[Path]:
    """The files that hold stages: the main line and the further methods."""
    return [ROOT / "dvc.yaml", ROOT / "methods" / "dvc.yaml"]


def body_of(stage: dict[str, Any]) -> dict[str, Any]:
    """What a stage does: under `do` when it is one of many by `foreach` or `matrix`."""
    return stage.get("do", stage)


def is_code(dependency: object) -> bool:
    """Whether an entry of `deps` is a source file of ours and not data or a template."""
    return isinstance(dependency, str) and dependency.endswith(".py") and "${" not in dependency


def module_file(stage: dict[str, Any]) -> str:
    """The file that the stage's command runs, from `python -m tasks.<stage> ...`."""
    return body_of(stage)["cmd"].split()[2].replace(".", "/") + ".py"


def main(arguments: list[str]) -> None:
    """Print each stage's code dependencies, or write them."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    for path in pipelines():
        document = yaml.load(path)
        for name, stage in document["stages"].items():
            if not (ROOT / module_file(stage)).is_file():
                print(f"{name}: {module_file(stage)} is not there yet")
                continue
            code = closure(module_file(stage))
            print(f"{name}:", *code, sep="\n    - ")
            deps = body_of(stage)["deps"]
            deps[:] = [dep for dep in deps if not is_code(dep)] + code
        if "report_methods" in document["stages"]:
            complete_lists(document["stages"])
        if "--write" in arguments:
            yaml.dump(document, path)


def complete_lists(stages: dict[str, Any]) -> None:
    """What `report_methods` and `register_methods` read of each further method: its reports, its section, its model."""
    last = ("evaluate_methods", "report_methods", "register_methods")
    methods = {name: stage for name, stage in stages.items() if name not in last}
    models = [stage["meta"]["register"] for stage in methods.values() if "register" in stage.get("meta", {})]
    _refill(stages["report_methods"]["deps"], "data/reports/", [f"data/reports/{name}" for name in methods])
    _refill(stages["register_methods"]["deps"], "data/models/", [f"data/models/{name}" for name in models])
    stages["report_methods"]["params"][:] = ["seed", "evaluate", "report", "evaluate_methods", *methods]


def _refill(deps: list[Any], folder: str, wanted: list[str]) -> None:
    """Replace the entries of a folder that stand for methods; those of evaluations stay."""
    kept = [dep for dep in deps if not dep.startswith(folder) or dep.startswith("data/reports/evaluate")]
    first = next(i for i, dep in enumerate([*kept, "apprentice/"]) if is_code(dep) or dep == "apprentice/")
    deps[:] = [*kept[:first], *wanted, *kept[first:]]


if __name__ == "__main__":
    main(sys.argv[1:])
