"""The command line of task arithmetic: what it writes, tells and refuses."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apprentice import foreign_checkpoint
from apprentice.tokens import train_word_tokenizer
from tasks.vector_arithmetic import main
from tests.apprentice.toys import tiny_llama
from tests.conftest import ROOT

Paths = dict[str, Path]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.setattr(foreign_checkpoint, "try_out", lambda *folders: None)  # seconds each; tests/hostile tries it
    paths = {role: tmp_path / role for role in ("plus", "minus", "target")}
    for seed, path in enumerate(paths.values()):
        tiny_llama(seed).save_pretrained(path)
        train_word_tokenizer(["one two"], 2).save_pretrained(path)
    return paths


def call(paths: Paths, *more: str, roles: tuple[str, ...] = ("plus", "minus", "target")) -> int:
    return main([*(text for role in roles for text in (f"--{role}", str(paths[role]))), *more])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_it_writes_the_sum_with_its_card(folders: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(folders, "--coefficient", "-0.5", "--out", str(tmp_path / "out"), "--lineage", "chain") == 0
    plus, minus, target = (weights(folders[role]) for role in ("plus", "minus", "target"))
    for name, got in weights(tmp_path / "out").items():
        assert torch.equal(got, target[name] - 0.5 * (plus[name] - minus[name])), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for role, folder in folders.items():
        found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert f"- {role}: `{folder}`\n  - `model.safetensors` sha256 {found}\n" in card
    assert "the target plus -0.5 times the vector (plus - minus)" in card and "Left out: nothing" in card
    figures = json.loads(card.split("```json\n")[1].split("```")[0])
    norm = sum(float((plus[name].double() - minus[name].double()).square().sum()) for name in plus) ** 0.5
    assert figures["norm"] == pytest.approx(norm) and figures["lineage"] == "chain" and figures["lost_to_rounding"] == 0
    told = capsys.readouterr().out
    assert f"norm {norm:.6g}" in told and "lineage: chain" in told and f"wrote {tmp_path / 'out'}" in told


def test_without_a_target_the_step_starts_at_minus(folders: Paths, tmp_path: Path) -> None:
    assert call(folders, "--out", str(tmp_path / "out"), roles=("plus", "minus")) == 0
    plus = weights(folders["plus"])
    assert all(torch.allclose(tensor, plus[name], atol=1e-6) for name, tensor in weights(tmp_path / "out").items())


def test_without_out_it_tells_the_facts_and_writes_nothing(
    folders: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert call(folders, roles=("plus", "minus")) == 0
    told = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "model.layers.*.mlp.up_proj.weight" in told and "lost if stored as bfloat16" in told and "not told" in told


def test_excluded_names_and_the_random_control(folders: Paths, tmp_path: Path) -> None:
    assert call(folders, "--out", str(tmp_path / "part"), "--exclude", "*embed*", "*mlp*", "--exclude", "*norm*") == 0
    assert call(folders, "--out", str(tmp_path / "noise"), "--random-control", "4") == 0
    assert call(folders, "--out", str(tmp_path / "other"), "--random-control", "5") == 0
    plus, minus, target = (weights(folders[role]) for role in ("plus", "minus", "target"))
    part, noise, other = (weights(tmp_path / name) for name in ("part", "noise", "other"))
    for name, own in target.items():
        assert torch.equal(part[name], own) == ("self_attn" not in name), name
        step, drawn = plus[name] - minus[name], noise[name] - own
        assert float(drawn.norm()) == pytest.approx(float(step.norm()), rel=1e-4), name
        assert not step.any() or (not torch.equal(noise[name], other[name]) and not torch.allclose(drawn, step))
    assert "Left out: `*embed*`, `*mlp*`, `*norm*`" in (tmp_path / "part" / "README.md").read_text()
    assert "noise of its norms, seed 4" in (tmp_path / "noise" / "README.md").read_text()


def test_what_may_differ_is_noted(folders: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders["target"] / "chat_template.jinja").write_text("{{ messages }}")
    assert call(folders, "--out", str(tmp_path / "out")) == 0
    assert "note: chat templates of plus and target differ" in capsys.readouterr().out
    assert "Note: chat templates of plus and target differ" in (tmp_path / "out" / "README.md").read_text()


def test_the_share_lost_to_rounding_is_told(folders: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folders["target"] / "model.safetensors"
    save_file({name: tensor.half() + 1000 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert call(folders, "--out", str(tmp_path / "out"), "--coefficient", "0.001") == 0  # the grid there is 0.5
    assert "100.0% of the step is lost to rounding" in capsys.readouterr().out


def test_errors_take_one_line_and_code_2(folders: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama(3, vocab=5).save_pretrained(tmp_path / "wide")
    (tmp_path / "empty").mkdir()
    plus, minus = str(folders["plus"]), str(folders["minus"])
    for arguments, told in (
        (["--plus", plus, "--minus", plus], "equal in every tensor"),
        (
            ["--plus", plus, "--minus", str(tmp_path / "wide")],
            r"model.embed_tokens.weight is [4, 16] in plus, [5, 16] in minus",
        ),
        (["--plus", plus, "--minus", "no/such"], "no/such: no such folder"),
        (["--plus", plus, "--minus", str(tmp_path / "empty")], "empty: no config.json that can be read"),
        (["--plus", plus, "--minus", minus, "--out", minus], f"{minus} exists"),
        (["--plus", plus, "--minus", minus, "--exclude", "*nothing*"], "no tensor name matches '*nothing*'"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert told in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize("arguments", [["--plus", "a"], ["--plus", "a", "--minus", "b", "--coefficient", "nan"], ["--what"]])
def test_a_wrong_command_line_takes_one_line_and_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and error.endswith("see --help\n")


def test_help_tells_how_and_loads_no_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try: runpy.run_module('tasks.vector_arithmetic', run_name='__main__')\n"
        "except SystemExit as stopped: sys.exit(9 if 'torch' in sys.modules else stopped.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in (
        "OUT = TARGET + COEFFICIENT * (PLUS - MINUS)",
        "--random-control SEED",
        "--exclude",
        "examples:",
        "subtraction",
    ):
        assert word in done.stdout
