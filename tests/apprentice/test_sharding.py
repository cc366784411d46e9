"""Models spread over two processes, against one process that has them whole: the same curves, weights, texts and scores; each
process holds its half; a snapshot of either goes on in the other."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from apprentice.compute import CPU, Compute
from apprentice.copg import Groups, optimise_contrast, with_rewards
from apprentice.judge import pair_logits
from apprentice.layers import set_layers
from apprentice.optimise import Optimiser
from apprentice.policy import Critic, freeze, score, weights
from apprentice.preference import optimise_preferences, with_reference
from apprentice.recorder import Recorder, State
from apprentice.reward_model import bt_rewards
from apprentice.sampling import Request, sample
from apprentice.sft import HeldOut, fine_tune, train_step
from apprentice.sharding import gathered, is_sharded, shard, whole
from apprentice.srppo import SelfRewardingPPO
from apprentice.team import ALONE, Team
from apprentice.tilt import Tilt
from tests.apprentice.families import tiny
from tests.apprentice.members import compared, do_jobs, run_members
from tests.apprentice.test_copg import copg_config
from tests.apprentice.test_preference import sides
from tests.apprentice.toys import (
    END,
    PACKED,
    SMALL,
    Keeping,
    demonstrations,
    pool,
    rso_config,
    sft_config,
    srppo_config,
    tiny_llama,
)

pytestmark = pytest.mark.slow
Found = tuple[dict[str, Tensor], list[dict[str, Any]]]
Make = Callable[[int], PreTrainedModel]
SPARE = replace(SMALL, forward_tokens=16)  # of most batches some micro-batches, and not as many for each process


def qwen2(seed: int) -> PreTrainedModel:
    """Embedding and head are not tied; an odd width of the MLP, which two processes cannot share evenly."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 4, "hidden_size": 18, "intermediate_size": 31, "num_hidden_layers": 3, "num_attention_heads": 3}
    ends = {"num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": END}
    return Qwen2ForCausalLM(Qwen2Config(**shape, **ends, tie_word_embeddings=False)).eval()


def family(name: str) -> Make:
    """Tied embeddings; of GPT-2 learnt positions, of Gemma scaled embeddings and windows."""
    return lambda seed: tiny(name, vocab=4, seed=seed, eos_token_id=END)


KINDS: dict[str, Make] = {
    "llama": tiny_llama,
    "qwen2": qwen2,
    **{name: family(name) for name in ("gpt2", "gemma2", "gemma3")},
}


def made(kind: str, seed: int, compute: Compute) -> PreTrainedModel:
    """A model as `load_policy` hands it out."""
    return shard(set_layers(KINDS[kind](seed), compute), compute)


def sft(kind: str, compute: Compute, recorder: Recorder) -> Found:
    model = made(kind, 0, compute)
    train, held_out = demonstrations(10, seed=0), HeldOut(demonstrations(6, seed=1))
    config = sft_config(select="held_out_loss", epochs=4)  # the weights kept are those of an epoch before the last or of it
    fine_tune(model, train, held_out, config, seed="0", compute=compute, recorder=recorder)
    return weights(model), recorder.rows


def preference(kind: str, compute: Compute, recorder: Recorder) -> Found:
    policy = made(kind, 0, compute)
    pairs = with_reference(freeze(made(kind, 3, compute)), *sides(10), compute)
    optimise_preferences(policy, pairs, rso_config(), seed="0", compute=compute, recorder=recorder)
    return weights(policy), recorder.rows


def copg(kind: str, compute: Compute, recorder: Recorder) -> Found:
    policy = made(kind, 0, compute)
    batch = demonstrations(3, seed=5).rows([0, 0, 1, 1, 2, 2])
    rewards = torch.tensor([[0.0, 1.0], [0.5, -1.0], [2.0, 0.25]])
    groups: Groups = with_rewards(freeze(made(kind, 3, compute)), batch, rewards, compute)
    optimise_contrast(policy, groups, copg_config(batch_size=3), seed="0", compute=compute, recorder=recorder)
    return weights(policy), recorder.rows


def trainer(kind: str, compute: Compute, policy: int = 1, **changes: Any) -> SelfRewardingPPO:
    scorers = {"sft": freeze(made(kind, 1, compute)), "base": freeze(made(kind, 2, compute))}
    config = srppo_config(batch_size=16, **changes)
    return SelfRewardingPPO(made(kind, policy, compute), scorers, pool(), config, seed="0", compute=compute)


def updates(kind: str, compute: Compute, critic: str, old_logps: str) -> Found:
    """On the rollout of another model, the same in all."""
    ppo, rows = trainer(kind, compute, policy=3, critic=critic, old_logps=old_logps), list[dict[str, Any]]()
    rollout = trainer(kind, replace(compute, team=ALONE, sharding=False), policy=4).sample()
    for _ in range(3):
        figures, experience = ppo.evaluate(rollout)
        rows.append({**figures, **ppo.update(experience, Recorder())})
    return weights(ppo.policy) | {f"critic.{name}": value for name, value in weights(ppo.critic.own).items()}, rows


def srppo(kind: str, compute: Compute, recorder: Recorder) -> Found:
    return updates(kind, compute, "separate", "recomputed")


def shared_critic(kind: str, compute: Compute, recorder: Recorder) -> Found:
    """The trunk is called for the values before the model it is of ever is."""
    return updates(kind, compute, "shared", "recorded")


def whole_srppo(kind: str, compute: Compute, recorder: Recorder) -> Found:
    ppo = trainer(kind, compute)
    ppo.train(recorder)
    return weights(ppo.policy), recorder.rows


def sampling(kind: str, compute: Compute, recorder: Recorder) -> Found:
    """Of one model, which is gathered and divided again each time."""
    requests = [Request([2, *range(n % 3)], str(n), n) for n in range(11)]
    model = made(kind, 5, compute)
    pieces = replace(compute, cache_tokens=30, keep=lambda make: make())  # the same for any number of processes
    found = sample(model, requests, seed="0", end=END, max_new_tokens=9, compute=pieces)
    scores = score(model, demonstrations(9, seed=3), compute)
    return {"ids": found.batch.ids, "logps": found.logps, "ended": found.ended, "scores": scores}, []


def scorers(kind: str, compute: Compute, recorder: Recorder) -> Found:
    """The other frozen models: a judge, a reward model, two models decoded as one."""
    torch.manual_seed(6)
    classifier = LlamaForSequenceClassification(LlamaConfig(**tiny_llama(0).config.to_dict() | {"num_labels": 1})).eval()
    tilted = Tilt(made(kind, 1, compute), made(kind, 2, compute), 0.5)
    with torch.no_grad():
        judged = pair_logits(freeze(made(kind, 5, compute)), [[0, 1], [2, 2, 1], [1]], (0, 2), compute)
        rewards = bt_rewards(freeze(shard(classifier, compute)), demonstrations(5, seed=4), compute)
    found = sample(tilted, [Request([n % 3], str(n)) for n in range(5)], seed="0", end=END, max_new_tokens=5, compute=compute)
    return {"judged": judged, "rewards": rewards, "ids": found.batch.ids, "logps": found.logps}, []


def halves(kind: str, compute: Compute, recorder: Recorder) -> Found:
    """How many numbers this process has of weights, gradients and moments, of the policy and of a critic; whole inside."""
    model = made(kind, 0, compute)
    counts: dict[str, int] = {}
    for name, module in (("policy", model), ("critic", Critic(model))):
        optimiser = Optimiser(module.parameters(), 1e-3, 1.0, team=compute.team)
        batch = demonstrations(2, seed=0)
        loss = train_step(model, batch, compute) if name == "policy" else float(module(batch, compute).sum().backward() or 0)
        assert loss == loss
        counts[f"{name} weights"] = held(weights(module).values())
        counts[f"{name} gradients"] = held(own.grad for own in module.parameters() if own.grad is not None)
        optimiser.clip()
        optimiser.step()
        counts[f"{name} moments"] = held(v for values in optimiser.adamw.state.values() for v in values.values() if v.dim())
        with gathered(module):
            inside = list(weights(module).values())
            counts[f"{name} gathered"] = held(inside)
        counts[f"{name} after"] = held([*weights(module).values(), *inside])
    return {}, [counts]


def held(tensors: Any) -> int:
    """Numbers in the memory of this process: of whole storages, so that a view of something larger counts as that."""
    locals_ = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // 4 for tensor in locals_}
    return sum(storages.values())


WORK: dict[str, Callable[[str, Compute, Recorder], Found]] = {
    work.__name__: work for work in (sft, preference, copg, srppo, shared_critic, whole_srppo, sampling, scorers, halves)
}
LAYERS = {
    "": SPARE,
    "packed": replace(PACKED, forward_tokens=20),
    "recomputed": replace(SPARE, gradient_checkpointing=True),
    "both": replace(PACKED, forward_tokens=20, gradient_checkpointing=True),
    "bfloat16": replace(SPARE, dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Job:
    """A piece of work on a kind of model; it stops after a step and keeps a snapshot, or goes on from that of another job."""

    work: str
    kind: str = "llama"
    layers: str = ""
    stop: int | None = None
    go_on: str | None = None

    @property
    def label(self) -> str:
        return "-".join(filter(None, [self.work, self.kind, self.layers, "stopped" * bool(self.stop), "on" * bool(self.go_on)]))


SAME = [
    *(Job(work, kind) for work in ("sft", "srppo", "sampling") for kind in ("llama", "qwen2", "gpt2", "gemma3")),
    Job("sft", "gemma2", "recomputed"),
    *(Job("sft", "qwen2", layers) for layers in ("packed", "recomputed", "both")),
    *(Job(work, "llama", "recomputed") for work in ("srppo", "shared_critic")),
    *(Job(work) for work in ("preference", "copg", "whole_srppo", "scorers")),
    Job("preference", "gpt2", "both"),
    Job("shared_critic", "qwen2"),
]
STOPPED = [Job("sft", "qwen2", stop=5), Job("whole_srppo", stop=2)]
THREE = [Job("sft", "qwen2"), Job("srppo"), Job("sampling")]


def going_on(start: str) -> list[Job]:
    """From the snapshots that so many processes left."""
    return [replace(job, stop=None, go_on=f"{start}-0-{job.label}") for job in STOPPED]


JOBS = [  # of how many processes, one group after the other
    (1, [*SAME, *STOPPED, Job("sft", "llama", "bfloat16")]),
    (2, [*SAME, *STOPPED, Job("sft", "llama", "bfloat16"), Job("halves", "qwen2"), *going_on("1")]),
    (3, [*THREE, *going_on("2")]),
    (1, going_on("2")),
]


class Whole(Keeping):
    """Keeps snapshots as stages do: their tensors put together."""

    def step(self, done: int, total: int, row: Any, state: Callable[[], State]) -> None:
        super().step(done, total, row, lambda: together(state()))


def together(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: together(item) for name, item in value.items()}
    if isinstance(value, list):
        return [together(item) for item in value]
    return whole(value) if isinstance(value, Tensor) else value


def member(rank: int, size: int, jobs: list[Job], folder: Path) -> None:
    """One process of a team."""

    def find(job: Job, team: Team, recorder: Keeping) -> Found:
        return WORK[job.work](job.kind, replace(LAYERS[job.layers], team=team, sharding=size > 1), recorder)

    torch.use_deterministic_algorithms(True)
    do_jobs(rank, size, folder, jobs, Whole, find)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each process found: one alone, two, three, one alone again."""
    folder = tmp_path_factory.mktemp("sharded")
    for size, jobs in JOBS:
        run_members(member, size, jobs, folder)
    return folder


def seen(name: str, tensor: Tensor) -> Tensor:
    """Without GPT-2's bias of the keys, which changes no attention: of its gradient, rounding alone, Adam makes steps."""
    if not name.endswith("c_attn.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize("job", SAME, ids=lambda job: job.label)
def test_two_processes_with_a_half_each_do_what_one_does(job: Job, folder: Path) -> None:
    assert compared(folder, f"2-0-{job.label}", f"1-0-{job.label}", 0.0 if job.work in ("sampling", "scorers") else 1e-5, seen)
    assert compared(folder, f"2-1-{job.label}", f"2-0-{job.label}", 0.0, seen)  # each has the same weights to the bit


@pytest.mark.parametrize("job", THREE, ids=lambda job: job.label)
def test_so_do_three_of_whom_one_has_nothing_of_some_weights(job: Job, folder: Path) -> None:
    """Four rows over three processes are two, two and none."""
    assert compared(folder, f"3-0-{job.label}", f"1-0-{job.label}", 0.0 if job.work == "sampling" else 1e-5, seen)
    assert compared(folder, f"3-2-{job.label}", f"3-0-{job.label}", 0.0, seen)


def test_in_bfloat16_up_to_its_rounding(folder: Path) -> None:
    """Products are cast, weights are not: those that are gathered are cast anew in each pass."""
    assert compared(folder, "2-0-sft-llama-bfloat16", "1-0-sft-llama-bfloat16", 1e-3, seen)
    assert compared(folder, "2-1-sft-llama-bfloat16", "2-0-sft-llama-bfloat16", 0.0, seen)


@pytest.mark.parametrize("job", STOPPED, ids=lambda job: job.label)
@pytest.mark.parametrize("process", ["2-0", "2-1", "3-0", "1-0"])
def test_a_snapshot_goes_on_in_another_number_of_processes(process: str, job: Job, folder: Path) -> None:
    """Of one in two, of two in three and in one."""
    assert compared(
        folder, f"{process}-{replace(job, stop=None, go_on='x').label}", f"1-0-{replace(job, stop=None).label}", 1e-5, seen
    )


def test_each_process_holds_its_half(folder: Path) -> None:
    """Of an odd dimension the first has the larger part, and the other's is padded to it; what is gathered is freed again."""
    model = qwen2(0)
    modules = {"policy": model, "critic": Critic(model)}
    for rank in range(2):
        (found,) = json.loads((folder / f"2-{rank}-halves-qwen2.json").read_text())
        expected = dict[str, int]()
        for name, module in modules.items():
            own, first = (sum(part_of(tensor, n) for tensor in module.parameters()) for n in (rank, 0))
            assert abs(own / sum(tensor.numel() for tensor in module.parameters()) - 0.5) < 0.05
            counts = {"weights": first, "gradients": first, "moments": 2 * own, "gathered": 2 * first, "after": first}
            expected |= {f"{name} {what}": count for what, count in counts.items()}
        assert found == expected


def part_of(tensor: Tensor, rank: int) -> int:
    """Numbers of a process's part: rows, the first one's rounded up."""
    rows = (tensor.size(0) + 1 - rank) // 2
    return rows * tensor.numel() // tensor.size(0)


def test_some_steps_have_an_odd_number_of_micro_batches() -> None:
    """In fine-tuning as above, so that one process has none in a round."""
    lengths = demonstrations(10, seed=0).lengths()
    orders = [random.Random(f"0/{epoch}").sample(range(10), 10) for epoch in range(4)]
    steps = [[lengths[row] for row in order[start : start + 4]] for order in orders for start in (0, 4, 8)]
    counts = [len(list(SPARE.micro_batches(step))) for step in steps]
    assert {1, 2, 3} <= set(counts)


def test_the_last_and_shortest_micro_batch_is_passed_again_where_there_is_none() -> None:
    """Of five over two, and of one over three; the sums count each once."""
    assert [Team(rank, 2).rounds([1, 2, 3, 4, 5]) for rank in range(2)] == [
        [(1, True), (3, True), (5, True)],
        [(2, True), (4, True), (5, False)],
    ]
    assert [Team(rank, 3).rounds(["a"]) for rank in range(3)] == [[("a", True)], [("a", False)], [("a", False)]]
    assert ALONE.rounds([1, 2]) == [(1, True), (2, True)]


def test_a_pass_that_does_not_count_leaves_neither_gradient_nor_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes, of three parts: its gradient is that of part 1 alone, but both passes are made."""
    weight, seen_parts = nn.Parameter(torch.tensor(3.0)), []

    def one(part: int) -> Any:
        seen_parts.append(part)
        return weight * part, {"loss": part}

    monkeypatch.setattr(Team, "add", lambda team, figures: dict(figures))
    found = replace(CPU, team=Team(1, 2), sharding=True).gather([5, 7, 11], one)
    assert seen_parts == [7, 11] and weight.grad is not None and float(weight.grad) == 7.0 and found == {"loss": 7.0}


def test_without_the_entry_a_model_stays_whole() -> None:
    model = tiny_llama(0)
    assert shard(model, CPU) is model and not is_sharded(model) and type(model.lm_head.weight) is nn.Parameter
    with gathered(model):
        assert whole(model.lm_head.weight).shape == (4, 16)
