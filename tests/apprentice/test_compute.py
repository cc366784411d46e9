"""The budget of a forward pass, and the device."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice import compute as module
from apprentice.compute import CPU, Compute, resolve, set_up
from apprentice.sections import ComputeConfig
from apprentice.team import Team


def section(**changes: Any) -> ComputeConfig:
    entries: dict[str, Any] = {
        "device": "cpu",
        "dtype": "auto",
        "threads": 1,
        "processes": 1,
        "sharding": False,
        "forward_tokens": 8,
        "cache_tokens": 9,
        "sampler": "own",
    }
    return ComputeConfig(**{**entries, "attention": "auto", "gradient_checkpointing": False, "packing": False, **changes})


def huge_pages() -> str:
    """The rule in force for anonymous memory, `never` where there is none."""
    rule = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return rule.read_text().partition("[")[2].partition("]")[0] if rule.exists() else "never"


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Put back what `set_up` changes for the process."""
    deterministic, tf32 = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_tf32 = tf32


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_micro_batches_take_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = list(Compute(CPU.device, CPU.dtype, budget).micro_batches(lengths))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget
    flat = [lengths[row] for group in groups for row in group]
    assert flat == sorted(flat, reverse=True)


def test_micro_batches_by_hand() -> None:
    # longest first: 9 alone (2 * 9 > 12), then 4, 4, 3 (3 * 4 = 12), then 1
    assert list(Compute(CPU.device, CPU.dtype, 12).micro_batches([4, 1, 9, 3, 4])) == [[2], [0, 4, 3], [1]]
    assert list(Compute(CPU.device, CPU.dtype, 1).padded_batches([4, 1, 9, 3, 4], 12)) == [[2], [0, 4, 3], [1]]
    assert list(CPU.micro_batches([])) == []


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_rows_to_sample_are_shared_in_no_more_rounds_by_smaller_batches(lengths: list[int], budget: int, size: int) -> None:
    alone = Compute(CPU.device, CPU.dtype, cache_tokens=budget)
    whole, shared = alone.sampling_batches(lengths), replace(alone, team=Team(0, size)).sampling_batches(lengths)
    assert sorted(row for group in shared for row in group) == list(range(len(lengths)))
    assert -(-len(shared) // size) == -(-len(whole) // size)
    most = [max(len(group) * max(lengths[row] for row in group) for group in groups) for groups in (shared, whole)]
    assert most[0] <= most[1]
    assert replace(alone, team=Team(0, size), keep=lambda make: make()).sampling_batches(lengths) == whole


def test_rows_to_sample_by_hand() -> None:
    # 3 batches of 4, 4 and 1 rows of 5 tokens would leave one of 4 processes idle and another with a row
    four = Compute(CPU.device, CPU.dtype, cache_tokens=20, team=Team(0, 4))
    assert [len(group) for group in four.sampling_batches([5] * 9)] == [3, 3, 3]
    assert [len(group) for group in four.sampling_batches([5] * 8)] == [2, 2, 2, 2]
    assert four.sampling_batches([30, 5]) == [[0], [1]], "a row that is too long stands alone"


def test_without_a_python_that_has_vllm_sampling_by_it_is_refused_before_work(
    torch_settings: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("APPRENTICE_VLLM_PYTHON", str(tmp_path / "python"))
    with pytest.raises(
        ValueError, match=rf"vllm needs a Python that has vLLM, and {tmp_path}/python is not there; run `make vllm`"
    ):
        set_up(section(sampler="vllm"))
    (tmp_path / "python").touch()
    assert set_up(section(sampler="vllm")).sampler == "vllm"


def test_set_up_on_a_cpu(torch_settings: None) -> None:
    compute = set_up(section(forward_tokens=77, cache_tokens=99))
    assert (compute.device.type, compute.dtype) == ("cpu", torch.float32)
    assert (compute.forward_tokens, compute.cache_tokens) == (77, 99)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory, "filling costs time, and nothing reads what is not written"


@pytest.mark.skipif(sys.platform != "linux" or "never" in huge_pages(), reason="large pages are Linux's, where it allows them")
def test_large_tensors_lie_on_large_pages() -> None:
    code = (
        "from apprentice.compute import set_up; from tasks.stage import read_params; import torch;"
        "set_up(read_params().compute); kept = torch.ones(2**24);"
        "print(sum(int(line.split()[1]) for line in open('/proc/self/smaps_rollup') if line.startswith('AnonHugePages')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) >= 2**24 * 4 // 1024 // 2, "most of the 64 MiB"


def test_without_a_budget_a_cpu_takes_small_forward_passes() -> None:
    assert set_up(section(forward_tokens=None)).forward_tokens == 1024
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is an accelerator")
def test_auto_takes_the_cpu_where_there_is_nothing_else(torch_settings: None) -> None:
    assert set_up(section(device="auto")) == Compute(torch.device("cpu"), torch.float32, 8, 9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_an_error(torch_settings: None) -> None:
    with pytest.raises(ValueError, match=r"compute\.device: expected a device of this machine \(cpu\), got 'cuda'"):
        set_up(section(device="cuda"))


def test_autocast_casts_products_and_leaves_float32_alone(torch_settings: None) -> None:
    bf16 = set_up(section(dtype="bfloat16"))
    matrix = torch.ones(2, 2)
    with bf16.autocast():
        assert (matrix @ matrix).dtype == torch.bfloat16
    with CPU.autocast():
        assert (matrix @ matrix).dtype == torch.float32


def test_a_device_elsewhere_is_resolved_without_being_here() -> None:
    there = resolve(section(device="cuda", forward_tokens=None, attention="sdpa", gradient_checkpointing=True, packing=True))
    assert (there.device.type, there.dtype, there.forward_tokens) == ("cuda", torch.bfloat16, 16384)
    assert there.attention == "sdpa" and there.gradient_checkpointing and there.packing


def test_flash_attention_names_what_it_lacks(torch_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a kernel from the hub in the place of the package."""
    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA device, bfloat16, the package flash-attn, 2\.3\.3 or newer; take auto"):
        set_up(section(attention="flash_attention_2"))
    monkeypatch.setattr(module, "devices", lambda: ["cuda", "cpu"])
    with pytest.raises(ValueError, match=r"flash_attention_2 needs the package flash-attn"):
        set_up(section(device="cuda", attention="flash_attention_2"))
    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: True)
    assert set_up(section(device="cuda", attention="flash_attention_2")).attention == "flash_attention_2"
