"""The benchmark of one device, tried on a CPU: what it counts, by hand, and what it writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

PARAMETERS = 64 * 16 + 2 * (2 * (16 * 16) + 2 * 16 * 8 + 16 + 2 * 8 + 3 * 16 * 32 + 2 * 16) + 16  # tied; q, k, v with biases
READ, DRAWN = 4 * (6 + 5), 4 * 5  # tokens of the rows, and of their responses


@pytest.mark.parametrize(("shape", "train"), [("tiny", 6), ("tiny_adapters", 4)])
def test_work_is_counted_as_by_hand(
    shape: str, train: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "seconds", lambda work, device: (work(), 2.0)[1])
    monkeypatch.setattr(gpu, "products", lambda device: 1e9)
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--shapes", shape, "--runs", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["machine"]["torch"] == torch.__version__
    flop = {
        "sft": train * READ,
        "scoring": 2 * READ,
        "rollouts": 2 * READ,
        "ppo": (2 + 2 * 4 + 2 * train) * READ,  # rollout; both scorers, policy and critic; two epochs
    }
    assert found[shape].keys() == flop.keys()
    for name, tokens in (("sft", READ), ("scoring", READ), ("rollouts", DRAWN), ("ppo", DRAWN)):
        assert found[shape][name]["tokens_per_second"] == tokens / 2
        assert found[shape][name]["share_of_products"] == pytest.approx(flop[name] * PARAMETERS / 2 / 1e9)
    assert "share_of_products" in capsys.readouterr().out


def test_it_needs_torch_and_transformers_alone() -> None:
    """And what these bring: YAML, by which the settings are read, among it."""
    code = "import sys, yaml\nfrom transformers import AutoTokenizer, Qwen2ForCausalLM\n"
    code += "before = {name.partition('.')[0] for name in sys.modules}\nimport benchmarks.gpu\n"
    code += "print(*sorted({name.partition('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=gpu.PARAMS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["apprentice", "benchmarks"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no CUDA device here; --device cpu --shapes tiny tries the program itself"):
        gpu.main([])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_device_it_measures_memory_too(tmp_path: Path) -> None:
    gpu.main(["--shapes", "tiny", "--runs", "1", "--out", str(tmp_path / "gpu.json")])
    assert json.loads((tmp_path / "gpu.json").read_text())["tiny"]["ppo"]["peak_gib"] > 0
