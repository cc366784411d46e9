"""README's four steps to a new method, followed word by word in a copy of the project."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from apprentice.policy import save_policy
from apprentice.tokens import train_word_tokenizer
from tests import readme
from tests.apprentice.toys import tiny_llama
from tests.conftest import ROOT, Project


def blocks() -> dict[str, str]:
    """The fenced blocks of the section that begin with the name of a file, by that name."""
    section = readme.text().split("### Add a method in four steps")[1].split("\n## ")[0]
    found = [block.split("\n", 1) for block in readme.FENCED.findall(section)]
    return {first.removeprefix("# "): rest for first, rest in found if first.startswith("# ")}


@pytest.fixture
def extended(project: Project) -> Project:
    """The project after the four steps, with two tiny models in place of trained ones."""
    texts = blocks()
    for name in ("apprentice/soup.py", "tasks/soup.py"):
        project.path(name).write_text(texts.pop(name))
    sections = project.path("apprentice/method_sections.py")
    head, tail = sections.read_text().split("@dataclass(frozen=True)\nclass MethodSections:")
    own = texts.pop("apprentice/method_sections.py")
    sections.write_text(f"{head}{own}\n\n@dataclass(frozen=True)\nclass MethodSections:{tail}    soup: SoupConfig\n")
    for name in ("methods/dvc.yaml", "params.yaml"):
        with project.path(name).open("a") as file:
            file.write("\n" + texts.pop(name))
    assert texts == {} and "`soup: SoupConfig`" in readme.text()
    shutil.copytree(ROOT / "tests", project.path("tests"), ignore=shutil.ignore_patterns("__pycache__"))
    project.path(".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    for seed, name in enumerate(("sft", "sft_tuned")):
        folder = project.path(f"data/models/{name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_policy(tiny_llama(seed), train_word_tokenizer(["a b"], 10), folder, "")
    return project


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_four_steps_make_a_stage_that_runs_and_is_registered(extended: Project) -> None:
    written = extended.run("-m", "tests.imports", "--write")
    assert written.returncode == 0, written.stderr
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
    extended.run("-m", "tests.imports", "--write")
    for name in ("dvc.yaml", "methods/dvc.yaml"):
        before = yaml.safe_load((ROOT / name).read_text())["stages"]
        after = yaml.safe_load(extended.path(name).read_text())["stages"]
        changed = {stage for stage in after if after[stage] != before.get(stage)}
        assert changed <= {"soup", "report_methods", "register_methods"}
