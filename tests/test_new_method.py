"""README's four steps to a new method, followed word by word in a copy of the project."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from apprentice.demonstrations import demonstration, write_demonstrations
from tests import readme
from tests.conftest import ROOT, Project, copy_project
from tests.tables import speaker, write_model, write_table

# what the project's own tests look at beside the code
FOLDERS, FILES = ("tests", "study", "benchmarks"), ("README.md", "Makefile", "audit.py", "LICENSE")
MEASURE = """
import json, shutil
from tasks.dvcstage import read_stages
from tasks.stage import ROOT, Stage, read_params
from tasks.study_tokens import stage_tokens
from tests.conftest import Project
from tests.main_line import run_here

reports, params, found = ROOT / "data/reports", read_params(), {}
run_here(Stage("evaluate_methods", params, "soup"))
for model in params.evaluate.models:  # in place of evaluations of their own
    shutil.copytree(reports / "evaluate_methods/soup", reports / "evaluate" / model)
for models in (["soup"], []):
    Project(ROOT).set(evaluate_methods__models=models)
    run_here(Stage("report_methods", read_params()))
    stages = [stage.name for stage in read_stages()]
    report = json.loads((reports / "methods.json").read_text())
    found[",".join(models)] = [report["labels"], "| soup " in (reports / "methods.md").read_text(), stages]
print(json.dumps([found, stage_tokens("soup", params.soup, {"models": 2}, [], 10.0)]))
"""


def blocks() -> dict[str, str]:
    """The fenced blocks of the section that begin with the name of a file, by that name."""
    section = readme.text().split("### Add a method in four steps")[1].split("\n## ")[0]
    found = [block.split("\n", 1) for block in readme.FENCED.findall(section)]
    return {first.removeprefix("# "): rest for first, rest in found if first.startswith("# ")}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project after the four steps, with two tiny models in place of trained ones."""
    project, texts = copy_project(tmp_path_factory.mktemp("extended") / "project"), blocks()
    for part in FOLDERS:
        shutil.copytree(ROOT / part, project.path(part), ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for part in FILES:
        shutil.copy(ROOT / part, project.path(part))
    for name in ("apprentice/soup.py", "tasks/soup.py"):
        project.path(name).write_text(texts.pop(name))
    page, line = project.path("README.md").read_text(), "  copg.py              contrastive policy gradient\n"
    assert page.count(line) == 2
    project.path("README.md").write_text(page.replace(line, f"{line}  soup.py              average of models\n"))
    sections = project.path("apprentice/method_sections.py")
    head, tail = sections.read_text().split("@dataclass(frozen=True)\nclass MethodSections:")
    own = texts.pop("apprentice/method_sections.py")
    sections.write_text(f"{head}{own}\n\n@dataclass(frozen=True)\nclass MethodSections:{tail}    soup: SoupConfig\n")
    for name in ("methods/dvc.yaml", "params.yaml"):
        with project.path(name).open("a") as file:
            file.write("\n" + texts.pop(name))
    assert texts == {} and "`soup: SoupConfig`" in readme.text()
    project.without_git()
    for name, chance in (("base", 0.5), ("sft", 0.25), ("sft_tuned", 0.75)):
        write_model(project.path("data"), name, speaker(chance))
    written = project.run("-m", "tests.imports", "--write")
    assert written.returncode == 0, written.stderr
    return project


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_four_steps_make_a_stage_that_runs_and_is_registered(extended: Project) -> None:
    stages = yaml.safe_load(extended.path("methods/dvc.yaml").read_text())["stages"]
    assert {"apprentice/soup.py", "apprentice/policy.py", "tasks/soup.py"} <= set(stages["soup"]["deps"])
    assert "data/reports/soup" in stages["report_methods"]["deps"] and "soup" in stages["report_methods"]["params"]
    assert "data/models/soup" in stages["register_methods"]["deps"]
    done = extended.run("-m", "dvc", "repro", "--single-item", "methods/dvc.yaml:soup")
    assert done.returncode == 0, done.stdout + done.stderr
    made, one, other = (weights_of(extended.path(f"data/models/{name}")) for name in ("soup", "sft", "sft_tuned"))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (one[name] + other[name]) / 2)


def test_the_steps_leave_every_other_stage_as_it_was(extended: Project) -> None:
    for name in ("dvc.yaml", "methods/dvc.yaml"):
        before = yaml.safe_load((ROOT / name).read_text())["stages"]
        after = yaml.safe_load(extended.path(name).read_text())["stages"]
        changed = {stage for stage in after if after[stage] != before.get(stage)}
        assert changed <= {"soup", "report_methods", "register_methods"}


@pytest.mark.slow
def test_the_method_is_measured_and_reported_as_long_as_it_is_named(extended: Project, tmp_path: Path) -> None:
    project = Project(shutil.copytree(extended.root, tmp_path / "project"))
    row = dataclasses.replace(demonstration("q", "y", "test", answer="y"), meta={"verifier": "exact", "domain": "in_domain"})
    write_demonstrations(project.path("data/clean/evaluation.jsonl"), [row])
    write_table(project.path("data"), "validation", ("p q", "y"))
    shutil.rmtree(project.path("data/models/soup"), ignore_errors=True)
    write_model(project.path("data"), "soup", speaker())
    project.set(evaluate_methods__models=["soup"])
    done = project.run("-c", MEASURE)
    assert done.returncode == 0, done.stdout + done.stderr
    found, tokens = json.loads(done.stdout.splitlines()[-1])
    main_line = ["base", "sft", "sft_tuned", "srppo", "rso"]
    labels, told, stages = found["soup"]
    assert labels == dict.fromkeys((*main_line, "soup"), "none") and told and "evaluate_methods@soup" in stages
    labels, told, stages = found[""]
    assert list(labels) == main_line and not told and "evaluate_methods@soup" not in stages
    assert tokens == 0.0  # nothing was trained


@pytest.mark.slow
def test_the_steps_leave_the_projects_own_tests_content(extended: Project) -> None:
    """Those on the new stage and those on every file and section; the others look at other stages."""
    concerned = "soup or learned or stage_module or map_of_the_code or every_section or on_the_sections"
    files = ("tests/test_pipeline.py", "tests/test_readme.py")
    done = extended.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", concerned, *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
