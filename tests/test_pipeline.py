"""dvc.yaml, methods/dvc.yaml, params.yaml, the configs and the modules say the same."""

import ast
import copy
import dataclasses
import hashlib
import typing
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.config import Params, ParamsError, parse
from tasks.dvcstage import StageInfo, read_stages
from tasks.lineage import labels_of
from tasks.stage import MAIN_LINE, METHODS, SETTINGS
from tests.imports import BOOKKEEPING, NO_VALUES, ROOT, body_of, closure, is_code, module_file, our_imports, pipelines, sources

WITHOUT_REPORTS = {"report", "register", "report_methods", "register_methods"}
MERGED = {"fine_tuning", "ppo", "preference"}  # sections that others take over by a merge key
LAST = {"dvc.yaml": "register", "methods/dvc.yaml": "register_methods"}  # writes the file's stamp
# What each stage that trains or writes training data learned from beside demonstrations. Those not named here: nothing.
LABELLED = {
    **dict.fromkeys(("rft", "rft_long", "verifier_ppo", "whole_pairs", "perstep", "donor_ppo", "vectors"), "verifier"),
    "direct": "preferences",
    "crlft": "qualities",
}
NO_LESSON = {"tokenizer", "validate"}  # read every table, and hand on words and a verdict only (tasks/lineage.py)
AFTER = {"calibration", "evaluate", "report", "register", "evaluate_methods", *SETTINGS}  # measure
Stage = dict[str, Any]


def raw_params() -> dict[str, Any]:
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    return params


def stages_in(path: Path) -> dict[str, Stage]:
    """The stages of one pipeline file by name, with what stands under `do` for a foreach stage."""
    return {name: body_of(stage) for name, stage in yaml.safe_load(path.read_text())["stages"].items()}


def stages() -> dict[str, Stage]:
    """Every stage by name."""
    return {name: stage for path in pipelines() for name, stage in stages_in(path).items()}


@cache
def resolved() -> list[StageInfo]:
    """Every stage as DVC has it, templates filled in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # DVC's own
        return read_stages()


def outputs(stage: Stage) -> Iterator[str]:
    for kind in ("outs", "metrics", "plots"):
        for one in stage.get(kind, []):
            yield one if isinstance(one, str) else next(iter(one))


EVERY = pytest.mark.parametrize("name", stages())


def test_the_two_files_share_no_name_and_are_where_the_tasks_look() -> None:
    assert [str(path.relative_to(ROOT)) for path in pipelines()] == [MAIN_LINE, METHODS]
    assert sum(len(stages_in(path)) for path in pipelines()) == len(stages())


def test_further_methods_work_from_the_root() -> None:
    assert {name: stage.get("wdir") for name, stage in stages_in(ROOT / METHODS).items() if stage.get("wdir") != ".."} == {}


@EVERY
def test_one_name_in_five_places(name: str) -> None:
    stage, section = stages()[name], SETTINGS.get(name, name)
    assert stage["cmd"].split() == ["python", "-m", f"tasks.{name}"]
    assert (ROOT / "tasks" / f"{name}.py").is_file()
    assert section in raw_params()
    assert dataclasses.is_dataclass(typing.get_type_hints(Params)[section])
    if name not in WITHOUT_REPORTS:
        assert any(path.startswith(f"data/reports/{name}/") for path in outputs(stage))


def test_every_section_and_every_stage_module_is_a_stage() -> None:
    assert set(raw_params()) - {"seed", "compute", "lora", "runtime"} - MERGED == set(stages()) - set(SETTINGS)
    modules = {path[6:-3] for path in sources("tasks") if "\nrun(__name__, main" in (ROOT / path).read_text()}
    assert modules == set(stages())


def test_sections_that_no_stage_has_are_merged_into_others() -> None:
    text = (ROOT / "params.yaml").read_text()
    assert {name for name in MERGED if f"\n{name}: &{name} " in text and f"<<: *{name}\n" in text} == MERGED


def sections_of(kind: Any) -> Iterator[type]:
    """Every dataclass that params.yaml is read into."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        if dataclasses.is_dataclass(hint):
            yield from sections_of(hint)


def test_the_sections_hold_no_value_so_that_no_stage_depends_on_them() -> None:
    kinds = set(sections_of(Params))
    assert {kind.__module__.replace(".", "/") + ".py" for kind in kinds} == NO_VALUES - {"apprentice/schema.py"}
    for kind in kinds:
        missing = dataclasses.MISSING
        fields = dataclasses.fields(kind)
        assert [f.name for f in fields if (f.default, f.default_factory) != (missing, missing)] == [], kind.__name__


@pytest.mark.parametrize("path", ["apprentice/sections.py", "apprentice/method_sections.py"])
def test_the_modules_of_sections_hold_nothing_but_fields_and_their_types(path: str) -> None:
    for node in ast.parse((ROOT / path).read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert docstring or isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef), ast.unparse(node)
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            field = isinstance(inner, ast.AnnAssign) and inner.value is None
            assert field or isinstance(inner, ast.Expr | ast.Pass), ast.unparse(inner)


def test_no_stage_depends_on_the_sections() -> None:
    assert {name for name, stage in stages().items() if NO_VALUES & set(stage["deps"])} == set()


@EVERY
def test_code_dependencies_are_the_import_closure(name: str) -> None:
    stage = stages()[name]
    listed = [dep for dep in stage["deps"] if is_code(dep)]
    assert sorted(listed) == closure(module_file(stage)), "python -m tests.imports --write mends it"


def test_the_imports_left_out_of_the_closure_are_there() -> None:
    assert all(imported in our_imports(path) for path, imported in BOOKKEEPING)
    assert {path for path in NO_VALUES if (ROOT / path).is_file()} == NO_VALUES


@EVERY
def test_outputs_lie_under_data_and_only_the_registers_keep_their_own(name: str) -> None:
    assert [path for path in outputs(stages()[name]) if not path.startswith("data/") or path.startswith("data/raw")] == []
    assert name in LAST.values() or "persist" not in str(stages()[name])


def test_no_output_is_written_twice() -> None:
    every = [path for stage in stages().values() for path in outputs(stage)]
    assert sorted(every) == sorted(set(every))
    assert [(a, b) for a in every for b in every if b.startswith(f"{a}/")] == []


@EVERY
def test_a_stage_depends_on_its_params_and_on_no_runtime(name: str) -> None:
    depended = {entry.split(".")[0] for entry in stages()[name]["params"]}
    section = "evaluate" if name == "evaluate_methods" else SETTINGS.get(name, name)
    assert section in depended and "runtime" not in depended
    if stages()[name].get("meta", {}).get("torch"):
        assert {"seed", "compute"} <= depended


@EVERY
def test_a_stage_that_trains_from_a_checkpoint_depends_on_lora_and_on_the_trunk(name: str) -> None:
    stage, trains = stages()[name], "tasks/roles.py" in closure(f"tasks/{name}.py")
    assert ("lora" in stage["params"]) == trains
    assert not trains or "data/models/base" in stage["deps"] or "data/models/foreign_base" in outputs(stage)


def test_both_evaluations_depend_on_all_that_is_set_of_one_but_whose_it_is() -> None:
    wanted = {f"evaluate.{entry}" for entry in raw_params()["evaluate"] if entry != "models"}
    for name in ("evaluate", "evaluate_methods"):
        assert {entry for entry in stages()[name]["params"] if entry.startswith("evaluate")} == wanted, name


@EVERY
def test_params_that_a_stage_names_exist(name: str) -> None:
    for entry in stages()[name]["params"]:
        section: Any = raw_params()
        for part in entry.split("."):
            assert part in section, f"{name} names {entry}, which params.yaml lacks"
            section = section[part]


@EVERY
def test_a_stage_with_torch_in_its_core_says_so(name: str) -> None:
    """Another one that loads models may say so too."""
    uses = {f"apprentice/{module}.py" for module in ("pretrain", "epochs", "ppo", "sampling", "evaluation")}
    assert stages()[name].get("meta", {}).get("torch") or not uses & set(closure(f"tasks/{name}.py"))


def test_aliases_in_the_registry_are_unique_and_name_models() -> None:
    aliases = [stage["meta"]["register"] for stage in stages().values() if "register" in stage.get("meta", {})]
    assert len(aliases) == len(set(aliases)) > 0 and "champion" not in aliases
    every = {path for stage in stages().values() for path in outputs(stage)}
    assert {f"data/models/{alias}" for alias in aliases} <= every


@pytest.mark.parametrize("file", LAST)
def test_registering_waits_for_every_registered_model_of_its_file(file: str) -> None:
    own = stages_in(ROOT / file)
    models = {f"data/models/{stage['meta']['register']}" for stage in own.values() if "register" in stage.get("meta", {})}
    assert {dep for dep in own[LAST[file]]["deps"] if dep.startswith("data/models/")} == models


def test_the_report_of_every_method_waits_for_all_that_it_may_show() -> None:
    own = stages_in(ROOT / METHODS)
    folders = {f"data/reports/{name}" for name in own if name not in WITHOUT_REPORTS} | {"data/reports/evaluate"}
    assert {dep for dep in own["report_methods"]["deps"] if dep.startswith("data/")} == folders


def test_models_that_are_measured_are_written_by_a_stage_of_their_file() -> None:
    written = {file: {path for stage in stages_in(ROOT / file).values() for path in outputs(stage)} for file in LAST}
    params = raw_params()
    for file, section in ((MAIN_LINE, "evaluate"), (METHODS, "evaluate_methods")):
        assert {f"data/models/{model}" for model in params[section]["models"]} <= written[file]


def test_what_a_stage_learned_from_beside_demonstrations() -> None:
    taught = {name: label for name, label in labels_of(resolved()).items() if name.split("@")[0] not in NO_LESSON | AFTER}
    assert {name: label for name, label in taught.items() if label != "none"} == LABELLED


def test_the_main_line_learns_from_demonstrations_only() -> None:
    labels = labels_of(resolved())
    main_line = [stage.name for stage in resolved() if stage.file == MAIN_LINE and stage.name not in NO_LESSON]
    assert "register" in main_line and {labels[name] for name in main_line} == {"none"}


def test_pipelines_dvc_depends_on_the_constant_stamp() -> None:
    (stamp,) = yaml.safe_load((ROOT / "pipelines.dvc").read_text())["deps"]
    assert stamp["path"] == "data/reports/complete" and stamp["path"] in outputs(stages()["register"])
    assert stamp["md5"] == hashlib.md5(b"ok\n").hexdigest() and stamp["size"] == 3


@pytest.mark.parametrize("file", LAST)
def test_everything_is_upstream_of_its_files_stamp(file: str) -> None:
    needed = {LAST[file]}
    for stage in reversed(resolved()):
        if stage.name in needed:
            needed.update(stage.upstream)
    assert [stage.name for stage in resolved() if stage.file == file and stage.name not in needed] == []


def test_no_stage_of_the_main_line_waits_for_a_further_method() -> None:
    files = {stage.name: stage.file for stage in resolved()}
    mixed = [(stage.name, need) for stage in resolved() for need in stage.upstream if stage.file == MAIN_LINE != files[need]]
    assert mixed == []


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
