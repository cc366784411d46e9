"""The benchmark of one device, tried on a CPU: what it counts, by hand, and what it writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_ours
from benchmarks.gpu_shapes import SHAPES

PARAMETERS = 64 * 16 + 2 * (2 * (16 * 16) + 2 * 16 * 8 + 16 + 2 * 8 + 3 * 16 * 32 + 2 * 16) + 16  # tied; q, k, v with biases
READ, DRAWN = 4 * (6 + 5), 4 * 5  # tokens of the rows, and of their responses


def tried(tmp_path: Path, *shapes: str) -> dict[str, Any]:
    """What the program writes of the shapes, measured once on a CPU."""
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--shapes", *shapes, "--runs", "1", "--out", str(out)])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def timed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run takes 2 seconds, on a device of 1e9 FLOP a second."""
    monkeypatch.setattr(gpu, "seconds", lambda work, device: (work(), 2.0)[1])
    monkeypatch.setattr(gpu, "products", lambda device: 1e9)


def check_counts(found: dict[str, Any], train: int, trained: int) -> None:
    """`train`: FLOP a parameter and trained token; `trained`: models that an update of PPO trains."""
    flop = {
        "sft": train * READ,
        "scoring": 2 * READ,
        "rollouts": 2 * READ,
        "ppo": (2 + 2 * 4 + 2 * train * trained) * READ,  # rollout; four models score; two epochs
    }
    assert found.keys() == flop.keys()
    for name, tokens in (("sft", READ), ("scoring", READ), ("rollouts", DRAWN), ("ppo", DRAWN)):
        assert found[name]["seconds"] == 2
        assert found[name]["tokens_per_second"] == tokens / 2
        assert found[name]["share_of_products"] == pytest.approx(flop[name] * PARAMETERS / 2 / 1e9)


@pytest.mark.parametrize(("shape", "train"), [("tiny", 6), ("tiny_adapters", 4)])
def test_work_is_counted_as_by_hand(
    shape: str, train: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed_by_hand(monkeypatch)
    found = tried(tmp_path, shape)
    assert found["machine"]["torch"] == torch.__version__
    check_counts(found[shape]["ours"], train, trained=1)
    assert "share_of_products" in capsys.readouterr().out


def test_without_trl_a_line_says_so_and_ours_alone_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "TRL", "0.0.1")  # which nobody has
    assert tried(tmp_path, "tiny")["tiny"].keys() == {"ours"}
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 1 and "pip install trl==0.0.1" in said[0] and "PYTHONPATH" in said[0]


def test_trl_does_the_same_kinds_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One optimiser step an epoch, in mixed precision, and the same counts but for a critic that is a model of its own."""
    PPOTrainer = pytest.importorskip("trl.experimental.ppo").PPOTrainer
    steps: list[object] = []
    updates: list[tuple[str, int]] = []
    step, train = torch.optim.AdamW.step, PPOTrainer.train

    def update(trainer: Any) -> None:
        steps.clear()
        train(trainer)
        updates.append((trainer.accelerator.mixed_precision, len(steps)))

    monkeypatch.setattr(PPOTrainer, "train", update)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *given: (steps.append(self), step(self, *given))[1])
    timed_by_hand(monkeypatch)
    found = tried(tmp_path, "tiny", "tiny_adapters")
    for shape, flop in (("tiny", 6), ("tiny_adapters", 4)):
        check_counts(found[shape]["trl"], flop, trained=2)
        assert found[shape]["ratio"] == dict.fromkeys(found[shape]["ours"], 1.0)
    assert updates == [("bf16", 2)] * 4  # of each shape one that is not counted, and one


def test_the_ratio_is_of_what_both_sides_measured() -> None:
    ours = {"sft": {"seconds": 2.0}, "ppo": {"seconds": 1.0}, "scoring": {"failed": "out of memory"}}
    trl = {"sft": {"seconds": 3.0}, "ppo": {"failed": "out of memory"}, "scoring": {"seconds": 1.0}}
    assert gpu.ratio(ours, trl) == {"sft": 1.5}


def test_the_table_has_a_line_for_each_kind_of_work_and_nothing_where_it_failed() -> None:
    ours = {"seconds": 0.66819, "tokens_per_second": 36779.8, "share_of_products": 0.14322, "peak_gib": 18.798}
    machine = {"card": "A card", "torch": "2.0", "transformers": "5.0"}
    one = {"ours": {"sft": ours}, "trl": {"sft": {"failed": "out of memory"}}, "ratio": {}}
    said = gpu.table({"machine": machine, "flop_per_second": 7.612e14, "tiny": one, "7b": {"ours": {"ppo": ours}}}).splitlines()
    assert said[0] == "A card, torch 2.0, transformers 5.0; products reach 7.61e+14 FLOP/s."
    assert said[4:] == [
        "| tiny | sft | 0.668 |  |  | 36,800 | 0.143 | 18.8 |  |",
        "| 7b | ppo | 0.668 |  |  | 36,800 | 0.143 | 18.8 |  |",
    ]


def test_the_table_on_record_is_that_of_the_figures() -> None:
    assert gpu.FILE.with_suffix(".md").read_text() == gpu.table(json.loads(gpu.FILE.read_text()))


def test_what_finds_no_memory_loses_only_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu_ours, "score", full)
    compute, shape = gpu_ours.computing("cpu"), SHAPES["tiny"]
    found = gpu.measured(gpu_ours.works(shape, compute), shape, compute.device, 1e9, 1)
    assert found["scoring"] == {"failed": "out of memory"}
    assert all("seconds" in found[name] for name in ("sft", "rollouts", "ppo"))
    assert "out of memory" in capsys.readouterr().out


def test_runs_end_when_they_took_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([9.0, 4.0, 1.0, 9.0, 2.0])  # the first is not counted
    monkeypatch.setattr(gpu, "seconds", lambda *_: next(taken))
    work = gpu_ours.works(SHAPES["tiny"], gpu_ours.computing("cpu"))["scoring"]
    assert gpu.timed(work, torch.device("cpu"), 9) == (4.0, 0.0)  # the median of three, 14 seconds in all
    taken = iter([12.0, 4.0])
    assert gpu.timed(work, torch.device("cpu"), 9) == (12.0, 0.0)  # long enough by itself


def test_it_needs_torch_and_transformers_alone() -> None:
    """And what these bring: YAML, by which the settings are read, among it."""
    code = "import sys, yaml\nfrom transformers import AutoTokenizer, Qwen2ForCausalLM\n"
    code += "before = {name.partition('.')[0] for name in sys.modules}\nimport benchmarks.gpu\n"
    code += "print(*sorted({name.partition('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=gpu_ours.PARAMS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["apprentice", "benchmarks"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no CUDA device here; --device cpu --shapes tiny tries the program itself"):
        gpu.main([])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_device_it_measures_memory_too(tmp_path: Path) -> None:
    gpu.main(["--shapes", "tiny", "--runs", "1", "--out", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text())["tiny"]["ours"]["ppo"]["peak_gib"] > 0
