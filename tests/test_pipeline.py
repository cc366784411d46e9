"""dvc.yaml, params.yaml, the configs and the modules say the same."""

import copy
import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from apprentice import config
from apprentice.config import ParamsError, parse
from tests.imports import BOOKKEEPING, ROOT, body_of, closure, is_code, module_file, our_imports, pipelines, sources

WITHOUT_REPORTS = {"report", "register"}
Stage = dict[str, Any]


def raw_params() -> dict[str, Any]:
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    return params


def stages() -> dict[str, Stage]:
    """Every stage by name, with what stands under `do` for a foreach stage."""
    files = [yaml.safe_load(path.read_text())["stages"] for path in pipelines()]
    return {name: body_of(stage) for file in files for name, stage in file.items()}


def outputs(stage: Stage) -> Iterator[str]:
    for kind in ("outs", "metrics", "plots"):
        for one in stage.get(kind, []):
            yield one if isinstance(one, str) else next(iter(one))


EVERY = pytest.mark.parametrize("name", stages())


@EVERY
def test_one_name_in_five_places(name: str) -> None:
    stage, short = stages()[name], name.replace("_", "")
    assert stage["cmd"].split() == ["python", "-m", f"tasks.{name}", *(["${item}"] if "${item}" in stage["cmd"] else [])]
    assert (ROOT / "tasks" / f"{name}.py").is_file()
    assert name in raw_params()
    configs = [found for found, _ in inspect.getmembers(config, inspect.isclass) if found.lower() == f"{short}config"]
    assert len(configs) == 1, f"apprentice/config.py has no {short}Config, whatever its capitals"
    assert type(getattr(parse(raw_params()), name)).__name__ == configs[0]
    if name not in WITHOUT_REPORTS:
        assert any(path.startswith(f"data/reports/{name}/") for path in outputs(stage))


def test_every_section_and_every_stage_module_is_a_stage() -> None:
    assert set(raw_params()) - {"seed", "compute", "runtime"} == set(stages())
    modules = {path[6:-3] for path in sources("tasks") if "\nrun(__name__, main" in (ROOT / path).read_text()}
    assert modules == set(stages())


@EVERY
def test_code_dependencies_are_the_import_closure(name: str) -> None:
    stage = stages()[name]
    listed = [dep for dep in stage["deps"] if is_code(dep)]
    assert sorted(listed) == closure(module_file(stage)), "python -m tests.imports --write mends it"


def test_the_imports_left_out_of_the_closure_are_there() -> None:
    assert all(imported in our_imports(path) for path, imported in BOOKKEEPING)


@EVERY
def test_outputs_lie_under_data_and_only_register_keeps_its_own(name: str) -> None:
    assert [path for path in outputs(stages()[name]) if not path.startswith("data/") or path.startswith("data/raw")] == []
    assert name == "register" or "persist" not in str(stages()[name])


def test_no_output_is_written_twice() -> None:
    every = [path for stage in stages().values() for path in outputs(stage)]
    assert sorted(every) == sorted(set(every))
    assert [(a, b) for a in every for b in every if b.startswith(f"{a}/")] == []


@EVERY
def test_a_stage_depends_on_its_params_and_on_no_runtime(name: str) -> None:
    depended = {entry.split(".")[0] for entry in stages()[name]["params"]}
    assert name in depended and "runtime" not in depended
    if stages()[name].get("meta", {}).get("torch"):
        assert {"seed", "compute"} <= depended


@EVERY
def test_params_that_a_stage_names_exist(name: str) -> None:
    for entry in stages()[name]["params"]:
        section: Any = raw_params()
        for part in entry.split("."):
            assert part in section, f"{name} names {entry}, which params.yaml lacks"
            section = section[part]


@EVERY
def test_a_stage_with_torch_in_its_core_says_so(name: str) -> None:
    trains = {"apprentice/pretrain.py", "apprentice/sft.py", "apprentice/ppo.py", "apprentice/preference.py"}
    uses = trains | {"apprentice/sampling.py", "apprentice/evaluation.py"}
    assert bool(stages()[name].get("meta", {}).get("torch")) == bool(uses & set(closure(f"tasks/{name}.py")))


def test_aliases_in_the_registry_are_unique_and_name_models() -> None:
    aliases = [stage["meta"]["register"] for stage in stages().values() if "register" in stage.get("meta", {})]
    assert len(aliases) == len(set(aliases)) > 0
    every = {path for stage in stages().values() for path in outputs(stage)}
    assert {f"data/models/{alias}" for alias in aliases} <= every


def test_pipelines_dvc_depends_on_the_constant_stamp() -> None:
    (stamp,) = yaml.safe_load((ROOT / "pipelines.dvc").read_text())["deps"]
    assert stamp["path"] == "data/reports/complete" and stamp["path"] in outputs(stages()["register"])
    assert stamp["md5"] == hashlib.md5(b"ok\n").hexdigest() and stamp["size"] == 3


def test_everything_is_upstream_of_the_stamp() -> None:
    needed, waiting = set(), ["register"]
    writers = {path: name for name, stage in stages().items() for path in outputs(stage)}
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            reads = [dep for dep in stages()[name]["deps"] if isinstance(dep, str)]
            waiting += [writer for path, writer in writers.items() if any(_overlap(path, dep) for dep in reads)]
    main_line = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(main_line) - needed == set()


def _overlap(path: str, dep: str) -> bool:
    """Whether one lies inside the other; `${item}` and the like stand for anything."""
    a, b = path.split("/"), dep.split("/")
    return all(x == y or "${" in x or "${" in y for x, y in zip(a, b, strict=False))


def test_bytecode_and_stores_are_outside_what_dvc_watches() -> None:
    ignored = (ROOT / ".dvcignore").read_text().split()
    assert {"__pycache__/", ".resume", ".telemetry", ".venv"} <= set(ignored)


def test_params_yaml_is_valid() -> None:
    assert parse(raw_params()).seed == raw_params()["seed"]


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("srppo", "kl_coeff", 0.5, "srppo.kl_coeff: no such entry in srppo; did you mean 'kl_coef'?"),
        ("srppo", "kl_coef", "high", "srppo.kl_coef: expected a number, got str 'high'"),
        ("srppo", "kl_coef", -1, "srppo.kl_coef: expected a number at least 0, got -1"),
        ("rso", "loss", "hinge_nrom", "rso.loss: expected one of .*; got 'hinge_nrom'; did you mean 'hinge_norm'?"),
    ],
)
def test_a_wrong_entry_is_named_with_a_suggestion(section: str, key: str, value: Any, said: str) -> None:
    params = copy.deepcopy(raw_params())
    params[section][key] = value
    with pytest.raises(ParamsError, match=said.replace("?", r"\?")):
        parse(params)


def test_a_missing_section_is_named() -> None:
    params = raw_params()
    del params["pairs"]
    with pytest.raises(ParamsError, match=r"pairs: missing from params\.yaml"):
        parse(params)
