"""The same numbers on a CUDA device as on a CPU: scores, gradients, samples, a PPO update. Skipped where there is none."""

import dataclasses

import pytest
import torch

from apprentice.compute import CPU, Compute
from apprentice.policy import freeze, score
from apprentice.recorder import Recorder
from apprentice.sampling import Request, sample
from apprentice.sft import train_step
from apprentice.srppo import SelfRewardingPPO
from tests.apprentice.test_ppo import pool
from tests.apprentice.toys import END, demonstrations, gradient, relative_error, srppo_config, tiny_llama

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA = Compute(torch.device("cuda"), torch.float32)
BATCH = demonstrations(12, seed=0)


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
