"""A params.yaml from elsewhere: its values are refused by name, and none of them reaches a shell."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from apprentice.config import Params, ParamsError
from tests.conftest import ROOT, Project

COMMANDS = ["x; touch pwned", "$(touch pwned)", "`touch pwned`", "x' ; touch pwned; '", "x\ntouch pwned"]
WORDS = [*COMMANDS, "", "-h", "a b", "../../x", "/etc", ".hidden", "a/b", "é", "${seed}"]
ONE = ["srppo.init", "srppo.kl_anchor", "srppo.critic_init", "srppo.reward_target", "pairs.reward_baseline", "raft.init"]
ONE += ["vectors.plus", "vectors.minus", "vectors.target", "tilt.target", "tilt.baseline", "register.model"]
ONE += ["register.experiment"]
LISTS = ["evaluate.models", "evaluate_methods.models", "report.baselines"]


@pytest.mark.parametrize("word", WORDS)
def test_names_of_models_are_plain(params: Callable[..., Params], word: str) -> None:
    for key, value, told in [*((key, word, key) for key in ONE), *((key, [word], rf"{key}\[0\]") for key in LISTS)]:
        with pytest.raises(ParamsError, match=rf"^{told}: expected a name of letters, digits"):
            params(**{key: value})


def test_plain_names_are_taken(params: Callable[..., Params]) -> None:
    for name in ("sft_tuned", "Qwen2.5-0.5B", "3b"):
        assert params(**{"vectors.plus": name}).vectors.plus == name


@pytest.mark.parametrize("file", ["dvc.yaml", "methods/dvc.yaml"])
def test_no_command_holds_a_value(file: str) -> None:
    stages: dict[str, Any] = yaml.safe_load((ROOT / file).read_text())["stages"]
    commands = {name: stage.get("do", stage)["cmd"] for name, stage in stages.items()}
    assert commands and {name: cmd for name, cmd in commands.items() if "$" in cmd} == {}


@pytest.mark.slow
@pytest.mark.parametrize("word", COMMANDS[:3])
def test_dvc_runs_no_command_out_of_params(project: Project, word: str) -> None:
    """`dvc repro` reads params.yaml by itself, before any stage could refuse it."""
    project.without_git()
    project.set(evaluate__models=["base", "sft", "sft_tuned", word])
    for name in ("base", "sft", word):
        project.path(f"data/models/{name}").mkdir(parents=True)
        project.path(f"data/models/{name}/config.json").write_text("{}")
    project.path("data/clean").mkdir()
    for name in ("evaluation", "validation"):
        project.path(f"data/clean/{name}.jsonl").write_text("{}\n")
    done = project.run("-m", "dvc", "repro", "--single-item", f"evaluate@{word}")
    assert done.returncode != 0 and "evaluate.models[3]: expected a name of letters, digits" in done.stderr, done.stderr
    assert "Running stage" in done.stdout
    assert not list(project.root.rglob("pwned"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["dvc.yaml", "methods/dvc.yaml"])
def test_an_evaluation_knows_its_model_from_dvc(project: Project, file: str) -> None:
    """Its command names none; by hand one has to be named."""
    name = {"dvc.yaml": "evaluate", "methods/dvc.yaml": "evaluate_methods"}[file]
    model = {"evaluate": "srppo", "evaluate_methods": "raft"}[name]
    project.without_git()
    address = f"{name}@{model}" if file == "dvc.yaml" else f"{file}:{name}@{model}"
    assert project.run("-m", f"tasks.{name}", DVC_STAGE=address).returncode  # there is no data
    assert project.path(f".telemetry/{name}@{model}.jsonl").exists()
    assert "the following arguments are required: item" in project.run("-m", f"tasks.{name}").stderr
    assert "invalid choice: 'nothing'" in project.run("-m", f"tasks.{name}", DVC_STAGE=f"{name}@nothing").stderr
