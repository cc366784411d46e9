"""The dry run: what it counts by hand, what it says of every shipped preset without a network, what it asks for."""

import re
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest

from apprentice.compute import resolve
from apprentice.config import Params, ParamsError
from apprentice.footprint import footprint, shape_of
from apprentice.lora import adapter_shape
from tasks import preset
from tasks.dry_run import dry_run
from tasks.needs import Needs, by_ppo
from tasks.preset import in_force
from tasks.stage import ROOT
from tasks.workload import DataSize, Work, main_line
from tests.apprentice.families import config_of
from tests.tasks.test_preset import PRESETS

DATA = DataSize(demonstrations=10, validation=4, evaluation=5, prompt=3, response=2)
SIZES: dict[str, Any] = {
    "sft.epochs": 2,
    "sft.gate_prompts": 100,
    "sft.gate_samples": 2,
    "sft_tuned.gate_prompts": 0,
    "sft_tuned.epochs": 1,
    "srppo.iterations": 2,
    "srppo.batch_size": 8,
    "srppo.epochs": 3,
    "srppo.max_new_tokens": 7,
    "pairs.prompts": 2,
    "pairs.candidates": 4,
    "pairs.accepted": 4,
    "pairs.max_new_tokens": 7,
    "rso.epochs": 2,
    "evaluate.models": ["base", "sft"],
    "report.baselines": ["sft"],
    "evaluate.samples": 3,
    "evaluate.temperatures": [0.5, 1.0],
    "evaluate.max_new_tokens": 7,
    "pretrain.steps": 6,
    "pretrain.batch_size": 4,
}


def test_tokens_of_each_stage_by_hand(params: Callable[..., Params]) -> None:
    found = main_line(params(**SIZES), DATA)
    assert found["pretrain"] == Work(6 * 4 * 5, 0)
    # 10 rows of 5 twice; 4 held out twice; 4 asked: 2 samples of 5 drawn and scored by two, demonstrations scored by two
    assert found["sft"] == Work(100, 40 + 4 * (2 * 5 * 3 + 5 * 2))
    assert found["sft_tuned"] == Work(50, 20)
    # 16 rollouts of 10: policy and critic, three epochs; sampled, valued, scored by itself, by sft and by base
    assert found["srppo"] == Work(2 * 3 * 160, 5 * 160)
    assert main_line(params(**SIZES, **{"srppo.critic": "shared"}), DATA)["srppo"] == Work(3 * 160, 5 * 160)
    assert found["pairs"] == Work(0, 8 * 10 * 3)
    # 2 prompts of 2 pairs, both sides of 10
    assert found["rso"] == Work(2 * 80, 80)
    # 5 prompts: 1 + 3 + 1 draws and 3 samples scored by three; losses of 5 and of 4 three times
    assert found["evaluate@sft"] == found["evaluate@base"] == Work(0, 5 * 14 * 10 + 17 * 5)
    assert list(found)[-2:] == ["evaluate@base", "evaluate@sft"]


def test_a_pinned_base_is_not_trained(params: Callable[..., Params]) -> None:
    assert main_line(params(**{"pretrain.checkpoint": "some/model"}), DATA)["pretrain"] == Work(0, 0)


def test_operations_by_hand() -> None:
    assert Work(10, 3).flops(100, again=False, adapters=False) == 100 * (60 + 6)
    assert Work(10, 3).flops(100, again=True, adapters=False) == 100 * (80 + 6)
    assert Work(10, 3).flops(100, again=False, adapters=True) == 100 * (40 + 6)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", PRESETS)
def test_every_shipped_preset_is_dry_run_without_a_network(
    name: str, offline: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (ROOT / "params.yaml").read_bytes()
    monkeypatch.setattr(sys, "argv", ["preset", name, "--dry-run", "--flops", "1e12"])
    assert preset.main() == 0
    said = capsys.readouterr().out
    stages = re.findall(
        r"^(\S+) +[\d.]+ (?:[KMG]iB|bytes) +[\d.]+ (?:[KMG]iB|bytes)  [\d.e+]+ FLOP, (?:\d+ days?, )?\d+:\d\d:\d\d$", said, re.M
    )
    models = in_force(name).evaluate.models
    assert stages == ["pretrain", "sft", "sft_tuned", "srppo", "pairs", "rso", *(f"evaluate@{model}" for model in models)]
    assert re.search(r"^in all: .* of memory for the largest stage, .* of disk, .* FLOP, ", said, re.M)
    assert "times at 1e+12 FLOP/s as given: estimates" in said
    assert (ROOT / "params.yaml").read_bytes() == before
    if name == "qwen05b_gsm8k":
        assert "Qwen/Qwen2.5-0.5B-Instruct, 494,032,768 parameters" in said, "the published count"
        assert "to download: about 942.3 MiB of weights" in said
    if name == "qwen15b_node":
        assert "Qwen/Qwen2.5-1.5B-Instruct, 1,543,714,304 parameters" in said, "the published count"
    assert ("models spread over 8 processes: memory is that of one" in said) == (name == "qwen7b_node")
    if name == "qwen7b_node":
        assert "srppo                  67.3 GiB" in said, (
            "40 bytes a parameter over 8, 4 whole, 65,536 tokens of 28 * 1,024 * 2"
        )
        assert pytest.approx(67.3, abs=0.05) == (40 * 7_615_616_512 / 8 + 4 * 7_615_616_512 + 65_536 * 28 * 1024 * 2) / 2**30
    if name.startswith("qwen7b"):
        assert "Qwen/Qwen2.5-7B-Instruct, 7,615,616,512 parameters" in said, "the published count"
    memory = re.search(r"in all: ([\d.]+) GiB of memory", said)
    assert float(memory[1]) < 74 if memory else name in ("laptop", "smoke"), "of a card of 80 GB"


def test_its_figures_are_those_of_the_stages(params: Callable[..., Params]) -> None:
    """A folder's config; sft trains one model with the base frozen beside it and samples, srppo two beside two."""
    facts = {"rows": 100, "prompt_tokens": 5, "response_tokens": 5, "config": config_of("qwen2", 4000).to_dict()}
    changes = {"pretrain.checkpoint": "some/model", "ingest.source.kind": "jsonl", "compute.device": "cpu"}
    found = params(**changes)
    shape, compute = shape_of(config_of("qwen2", 4000)), resolve(found.compute)
    lines = dict(re.findall(r"^(\w+) +([\d.]+ \w+) ", dry_run(found, facts, 1e12), re.M))
    mebibytes = {
        "sft": footprint([shape], [shape], compute, True).memory / 2**20,
        "srppo": footprint([shape] * 2, [shape] * 2, compute, True).memory / 2**20,
        "rso": footprint([shape], [shape], compute, False).memory / 2**20,
    }
    assert {name: lines[name] for name in mebibytes} == {name: f"{value:.1f} MiB" for name, value in mebibytes.items()}


def test_a_shared_critic_is_no_model_of_its_own(params: Callable[..., Params]) -> None:
    separate, shared = (
        by_ppo(params(**{"srppo.critic": critic, "srppo.critic_init": "raft"}).srppo, ("sft", "base"))
        for critic in ("separate", "shared")
    )
    assert separate == Needs(["sft", "raft"], ["sft", "base", "raft"], True)
    assert shared == Needs(["sft"], ["sft", "base"], True)


def test_with_adapters_one_trunk_is_counted(params: Callable[..., Params]) -> None:
    """srppo: policy and critic are adapters on the base, which is reward baseline too, beside that of the reward target."""
    config = config_of("qwen2", 4000)
    facts = {"rows": 100, "prompt_tokens": 5, "response_tokens": 5, "config": config.to_dict()}
    changes = {"pretrain.checkpoint": "some/model", "ingest.source.kind": "jsonl", "compute.device": "cpu", "lora.rank": 2}
    found = params(**changes)
    whole, adapter, compute = shape_of(config), adapter_shape(config, found.lora), resolve(found.compute)
    lines = dict(re.findall(r"^([\w@]+) +([\d.]+ \w+) ", dry_run(found, facts, 1e12), re.M))
    assert lines["srppo"] == f"{footprint([adapter] * 2, [whole, adapter], compute, True).memory / 2**20:.1f} MiB"
    assert lines["evaluate@rso"] == f"{footprint([], [whole, adapter, adapter], compute, True).memory / 2**20:.1f} MiB"
    assert lines["pairs"] == f"{footprint([], [whole, adapter], compute, True).memory / 2**20:.1f} MiB"


@pytest.mark.parametrize("missing", ["rows", "prompt_tokens", "response_tokens", "config"])
def test_what_the_preset_must_tell_is_asked_for(params: Callable[..., Params], missing: str) -> None:
    facts = {"rows": 100, "prompt_tokens": 5, "response_tokens": 5, "config": config_of("qwen2", 40).to_dict()}
    facts.pop(missing)
    found = params(**{"pretrain.checkpoint": "some/model", "ingest.source.kind": "jsonl"})
    with pytest.raises(ParamsError, match=rf"dry_run\.{missing}: missing from the preset"):
        dry_run(found, facts, 1e12)


def test_the_rate_is_measured_here_or_asked_for(params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"times at [\d.e+]+ FLOP/s of matrix products, as measured here", dry_run(params(**SIZES), {}, None))
    monkeypatch.setattr("apprentice.compute.devices", lambda: ["cpu"])
    elsewhere = dry_run(params(**SIZES, **{"compute.device": "cuda"}), {}, None)
    assert "no cuda here to measure: give --flops" in elsewhere and "0:00" not in elsewhere
