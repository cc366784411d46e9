"""Who may import what, read with `ast`."""

import subprocess
import sys

import pytest

from tests import readme
from tests.imports import (
    ROOT,
    closure,
    file_of,
    imported_at_start,
    imported_by,
    module_file,
    our_imports,
    pipelines,
    sources,
)

CORE = {"torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft"}
HEAVY = CORE | {"datasets", "dvc", "great_expectations", "mlflow", "pandas", "prefect", "scipy"}
# Each tool of the pipeline, and the modules that may use it; what they import may too, unless a stage reaches it as well.
OWNERS = {
    "dvc": {"dvcstage", "repro", "register", "register_methods", "report_methods", "tracking", "warm", "study_figures"},
    "great_expectations": {"validate"},
    "mlflow": {"register", "register_methods", "tracking"},
    "pandas": {"validate", "report"},
    "prefect": {"repro", "tracking"},
}
ORDER = ["demonstrations", "tokens", "policy", "sampling", "rewards", "advantages", "losses", "evaluation"]


def stage_files() -> list[str]:
    import yaml

    stages = [stage for path in pipelines() for stage in yaml.safe_load(path.read_text())["stages"].values()]
    return [module_file(stage) for stage in stages]


def libraries(path: str) -> set[str]:
    """What a file imports from neither the standard library nor us."""
    names = {name.split(".")[0] for name in imported_by(path)}
    return {name for name in names if name not in sys.stdlib_module_names and not file_of(name)}


def test_the_core_imports_torch_and_transformers_only() -> None:
    assert {path: libraries(path) - CORE for path in sources("apprentice") if libraries(path) - CORE} == {
        "apprentice/vllm_process.py": {"vllm"}
    }


def test_the_core_imports_nothing_of_the_pipeline() -> None:
    outside = {
        path: {name for name in our_imports(path) if not name.startswith("apprentice/")} for path in sources("apprentice")
    }
    assert {path: names for path, names in outside.items() if names} == {}


def test_a_core_file_imports_only_files_above_it_in_the_map() -> None:
    order = [path for path in readme.code_map() if path.startswith("apprentice/") and path.endswith(".py")]
    place = {path: i for i, path in enumerate(order)}
    files = [path for path in sources("apprentice") if not path.endswith("__init__.py")]
    assert set(files) <= set(order), "the map of the code in README.md lacks core files"
    wrong = [(path, name) for path in files for name in our_imports(path) if place[name] >= place[path]]
    assert wrong == [], "imports from below: reorder the map, or the code"
    assert [path for path in order if path[11:-3] in ORDER] == [f"apprentice/{name}.py" for name in ORDER]


@pytest.mark.parametrize("library", OWNERS)
def test_a_tool_is_imported_only_by_its_owners_and_their_helpers(library: str) -> None:
    allowed = {name for owner in OWNERS[library] for name in closure(f"tasks/{owner}.py")}
    allowed |= set(sources("flows")) if library == "prefect" else set()
    users = {path for path in sources("apprentice", "tasks", "flows") if library in libraries(path)}
    assert users - allowed == set()


@pytest.mark.parametrize("library", OWNERS)
def test_no_other_stage_reaches_a_tool_through_a_helper(library: str) -> None:
    for stage in stage_files():
        if stage[6:-3] not in OWNERS[library]:
            assert [path for path in closure(stage) if library in libraries(path)] == [], stage


def test_a_stage_imports_no_other_stage() -> None:
    stages = set(stage_files())
    assert {path: found for path in stages if (found := stages & set(closure(path)) - {path})} == {}


def test_flows_import_prefect_and_no_stage() -> None:
    own = {"prefect", "rich", "fastapi", "starlette"}  # Prefect's server is an app of the last two
    assert {path: libraries(path) - own for path in sources("flows") if libraries(path) - own} == {}
    wrong = set(stage_files()) | {path for path in sources("apprentice") if not path.endswith("__init__.py")}
    assert {path: found for path in sources("flows") if (found := our_imports(path) & wrong)} == {}


def test_a_stage_starts_without_heavy_libraries() -> None:
    for stage in stage_files():
        found, waiting = set(), [stage]
        while waiting:
            path = waiting.pop()
            if path not in found:
                found.add(path)
                waiting += [file for name in imported_at_start(path) if (file := file_of(name))]
        heavy = {(path, name) for path in found for name in imported_at_start(path) if name.split(".")[0] in HEAVY}
        assert heavy == set(), stage


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, apprentice; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
