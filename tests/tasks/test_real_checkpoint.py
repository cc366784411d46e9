"""A real checkpoint in place of the tiny base: by params alone, pinned and never copied."""

import json
from pathlib import Path

import pytest

from apprentice.config import Params
from apprentice.policy import PINNED, load_policy
from apprentice.pretrain import build_base
from apprentice.tokens import train_word_tokenizer
from apprentice.world import WORDS
from tasks.preset import apply
from tasks.stage import read_params
from tests.conftest import Project


@pytest.fixture
def small(project: Project) -> Params:
    apply("smoke", project.root)
    project.without_git()
    return read_params(project.path("params.yaml"))


@pytest.fixture
def checkpoint(small: Params, tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    tokenizer = train_word_tokenizer([], 200, WORDS)
    build_base(small.pretrain, tokenizer, 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_folder_replaces_the_base_by_params_alone(project: Project, checkpoint: Path) -> None:
    project.set(pretrain__checkpoint=str(checkpoint), runtime__outside_project=True)
    done = project.run("-m", "dvc", "repro", "srppo")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    base = project.path("data/models/base")
    assert [path.name for path in base.iterdir()] == [PINNED]
    pinned = json.loads((base / PINNED).read_text())
    assert pinned["checkpoint"] == str(checkpoint) and "model.safetensors" in pinned["files"]
    tuned = load_policy(project.path("data/models/srppo"))
    assert tuned.config.hidden_size == load_policy(base).config.hidden_size

    with (checkpoint / "generation_config.json").open("a") as file:
        file.write(" ")
    done = project.run("-m", "tasks.sft")
    assert done.returncode != 0 and "has changed since it was pinned" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_elsewhere_needs_an_opt_in(project: Project, checkpoint: Path) -> None:
    project.set(pretrain__checkpoint=str(checkpoint))
    for stage in ("tokenizer", "pretrain"):
        done = project.run("-m", f"tasks.{stage}")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"pretrain.checkpoint: expected a path inside the project, got {str(checkpoint)!r}" in done.stderr


def test_a_hub_name_needs_its_commit(project: Project, small: Params) -> None:
    project.set(pretrain__checkpoint="some/model")
    done = project.run("-m", "tasks.pretrain")
    assert done.returncode == 2 and "pretrain.revision: expected the commit of 'some/model'" in done.stderr


def test_the_tiny_base_knows_the_world_only(project: Project, small: Params) -> None:
    project.set(ingest__source__kind="jsonl", ingest__source__path="data/raw/gsm8k.jsonl")
    for stage in ("ingest", "tokenizer"):
        assert project.run("-m", f"tasks.{stage}").returncode == 0
    done = project.run("-m", "tasks.pretrain")
    assert done.returncode == 2 and "Name a real checkpoint" in done.stderr and "Traceback" not in done.stderr
