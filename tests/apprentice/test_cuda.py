"""The same numbers on a CUDA device as on a CPU: scores, gradients, samples, a PPO update; and there the same in each run, with
and without graphs. Skipped where there is none."""

import dataclasses
import os
from typing import Any

import pytest
import torch

from apprentice import replay
from apprentice.compute import CPU, Compute
from apprentice.layers import set_layers
from apprentice.lora import Trunk
from apprentice.policy import freeze, score
from apprentice.recorder import Recorder
from apprentice.sampling import Request, Rollout, sample
from apprentice.sections import LoRAConfig
from apprentice.sft import train_step
from apprentice.srppo import SelfRewardingPPO
from tests.apprentice.families import FAMILIES, tiny
from tests.apprentice.test_ppo import pool
from tests.apprentice.toys import END, demonstrations, gradient, relative_error, srppo_config, tiny_llama

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = Compute(torch.device("cuda"), torch.float32)
HALF = dataclasses.replace(CUDA, dtype=torch.bfloat16)
BATCH = demonstrations(12, seed=0)


@pytest.fixture(autouse=True)
def one_way(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As every stage computes: by deterministic algorithms alone."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_scores_packed_or_not() -> None:
    wanted, model = score(tiny_llama(0), BATCH), tiny_llama(0).cuda()
    for compute in (CUDA, dataclasses.replace(CUDA, packing=True, forward_tokens=40)):
        assert torch.allclose(score(model, BATCH.to(CUDA.device), compute).cpu(), wanted, atol=1e-3)


def test_the_gradient_of_a_step() -> None:
    found = {}
    for compute in (CPU, CUDA):
        model = tiny_llama(0).to(compute.device)
        train_step(model, BATCH.to(compute.device), compute)
        found[compute.device.type] = gradient(model).cpu()
    assert relative_error(found["cuda"], found["cpu"]) < 1e-3


def test_samples_have_the_log_probabilities_that_scoring_gives_them() -> None:
    asked = [Request([0, 1, 2][: 1 + n % 3], f"{n}") for n in range(16)]
    rollout = sample(tiny_llama(0).cuda(), asked, seed="0", end=END, max_new_tokens=8, compute=CUDA)
    assert rollout.batch.ids.is_cuda
    assert torch.allclose(score(tiny_llama(0), rollout.batch.to(CPU.device)), rollout.logps.cpu(), atol=1e-3)


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_ppo(dtype: torch.dtype, critic: str) -> None:
    compute = dataclasses.replace(CUDA, dtype=dtype)
    models = [tiny_llama(seed).cuda() for seed in (1, 1, 2)]
    scorers, config = {"sft": freeze(models[1]), "base": freeze(models[2])}, srppo_config(iterations=2, critic=critic)
    recorder = Recorder()
    SelfRewardingPPO(models[0], scorers, pool(), config, seed="0", compute=compute).train(recorder)
    assert len(recorder.rows) == 2 and abs(recorder.rows[0]["approx_kl"] or 0) < 0.1
    assert not torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)


@pytest.mark.parametrize("compute", [CUDA, HALF, dataclasses.replace(HALF, gradient_checkpointing=True)])
def test_two_runs_are_the_same_to_the_bit(compute: Compute) -> None:
    weights = []
    for _ in range(2):
        models = [set_layers(tiny_llama(seed).cuda(), compute) for seed in (1, 1, 2)]
        scorers, config = {"sft": freeze(models[1]), "base": freeze(models[2])}, srppo_config(iterations=2)
        SelfRewardingPPO(models[0], scorers, pool(), config, seed="0", compute=compute).train(Recorder())
        weights.append(models[0].lm_head.weight)
    assert torch.equal(*weights)


def adapted() -> Any:
    role = Trunk(tiny("qwen2").cuda(), LoRAConfig(rank=2, alpha=4, targets="all-linear"), seed="0", origin={}).train()
    torch.manual_seed(1)
    for parameter in role.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return role


def drawn(model: Any, compute: Compute) -> Rollout:
    asked = [Request([1, 5, 7, 8, 9, 11][: 1 + n % 6], f"{n}") for n in range(40)]
    return sample(model, asked, seed="0", end=END, max_new_tokens=300, compute=compute)  # more than the slots made at first


@pytest.mark.parametrize("compute", [CUDA, HALF])
@pytest.mark.parametrize("family", [*FAMILIES, "adapter"])
def test_graphs_draw_what_plain_steps_draw(family: str, compute: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted() if family == "adapter" else tiny(family, positions=400).cuda()
    played, play = list[int](), torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (played.append(1), play(graph))[1])
    found = drawn(model, compute)
    assert len(played) > 20
    monkeypatch.setattr(replay._Graph, "step", lambda self: self.advance())
    wanted = drawn(model, compute)
    assert torch.equal(found.batch.ids, wanted.batch.ids) and torch.equal(found.logps, wanted.logps)
    assert len(set(found.batch.response_lengths.tolist())) > 3


def test_a_model_that_no_graph_can_be_made_of_is_sampled_from_all_the_same() -> None:
    """Its positions are turned by what the longest is, which Python has to know."""
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_llama(0, vocab=40, max_position_embeddings=400, rope_parameters=stretched).cuda()
    with pytest.warns(UserWarning, match="sampling goes on without a CUDA graph"):
        rollout = drawn(model, CUDA)
    assert torch.allclose(score(model, rollout.batch, CUDA), rollout.logps, atol=1e-3)
    assert len(drawn(tiny("llama", positions=400).cuda(), CUDA).keys) == 40  # and the device goes on as before
