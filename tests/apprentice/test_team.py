"""Two or three processes with one global batch, against one process: the same curves, texts and scores; a snapshot of either
goes on in the other."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.compute import Compute
from apprentice.policy import Critic, freeze, score, values_of, weights
from apprentice.preference import optimise_preferences, with_reference
from apprentice.recorder import Recorder
from apprentice.sampling import Request, sample
from apprentice.sft import HeldOut, fine_tune
from apprentice.srppo import SelfRewardingPPO
from apprentice.team import ALONE, Team
from tests.apprentice.members import compared, do_jobs, run_members
from tests.apprentice.test_preference import sides
from tests.apprentice.toys import END, SMALL, Keeping, demonstrations, pool, rso_config, sft_config, srppo_config
from tests.apprentice.toys import tiny_llama as tiny

pytestmark = pytest.mark.slow
Found = tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
SPARE = replace(SMALL, forward_tokens=24)  # of most batches some micro-batches, and not as many for each process


def sft(compute: Compute, recorder: Recorder) -> Found:
    model = tiny(0)
    train, held_out = demonstrations(10, seed=0), HeldOut(demonstrations(6, seed=1))
    fine_tune(model, train, held_out, sft_config(), seed="0", compute=compute, recorder=recorder)
    return weights(model), recorder.rows


def preference(compute: Compute, recorder: Recorder) -> Found:
    policy = tiny(0)
    pairs = with_reference(freeze(tiny(3)), *sides(10), compute)
    optimise_preferences(policy, pairs, rso_config(), seed="0", compute=compute, recorder=recorder)
    return weights(policy), recorder.rows


def trainer(compute: Compute, policy: int = 1) -> SelfRewardingPPO:
    scorers = {"sft": freeze(tiny(1)), "base": freeze(tiny(2))}
    return SelfRewardingPPO(tiny(policy), scorers, pool(), srppo_config(batch_size=16), seed="0", compute=compute)


def srppo(compute: Compute, recorder: Recorder) -> Found:
    """Updates on the rollout of another model, the same in all."""
    ppo, rows = trainer(compute, policy=3), []
    rollout = trainer(SPARE, policy=4).sample()
    for _ in range(3):
        figures, experience = ppo.evaluate(rollout)
        rows.append(figures | ppo.update(experience, recorder))
    return weights(ppo.policy) | {f"critic.{name}": value for name, value in weights(ppo.critic).items()}, rows


def whole_srppo(compute: Compute, recorder: Recorder) -> Found:
    ppo = trainer(compute)
    ppo.train(recorder)
    return weights(ppo.policy), recorder.rows


def rollouts(compute: Compute, recorder: Recorder) -> Found:
    requests = [Request([2, *range(n % 3)], str(n), n) for n in range(11)]
    found = sample(tiny(5), requests, seed="0", end=END, max_new_tokens=9, compute=replace(compute, cache_tokens=30))
    return {"ids": found.batch.ids, "logps": found.logps, "ended": found.ended}, []


def kept(compute: Compute, recorder: Recorder) -> Found:
    """Samples, scores and values in the pieces that a run of any number of processes goes on from."""
    batch = demonstrations(9, seed=3)
    tensors, rows = rollouts(replace(compute, keep=lambda make: make()), recorder)
    tensors |= {"scores": score(tiny(5), batch, compute), "values": values_of(Critic(tiny(5)), batch, compute)}
    return tensors, rows


WORK: dict[str, Callable[[Compute, Recorder], Found]] = {
    work.__name__: work for work in (sft, preference, srppo, whole_srppo, rollouts, kept)
}


@dataclass(frozen=True)
class Job:
    """A piece of work under a label; it stops after a step and keeps a snapshot there, or goes on from that of another job."""

    label: str
    work: str
    stop: int | None = None
    go_on: str | None = None


FIRST = [*(Job(name, name) for name in WORK), Job("stopped", "sft", stop=4)]
JOBS = {1: FIRST, 2: [*FIRST, Job("gone on", "sft", go_on="1-0-stopped")]}
JOBS[3] = [Job("rollouts", "rollouts"), Job("kept", "kept"), Job("gone on", "sft", go_on="2-0-stopped")]


def member(rank: int, size: int, folder: Path) -> None:
    """One process of a team."""
    do_jobs(
        rank, size, folder, JOBS[size], Keeping, lambda job, team, recorder: WORK[job.work](replace(SPARE, team=team), recorder)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each process of a team of one, two and three found."""
    folder = tmp_path_factory.mktemp("teams")
    for size in JOBS:
        run_members(member, size, folder)
    return folder


@pytest.mark.parametrize("name", ["sft", "preference", "srppo", "whole_srppo"])
def test_two_processes_train_as_one(name: str, folder: Path) -> None:
    assert json.loads((folder / f"1-0-{name}.json").read_text())
    assert compared(folder, f"2-0-{name}", f"1-0-{name}", 1e-5)
    assert compared(folder, f"2-1-{name}", f"2-0-{name}", 0.0)  # each has the same weights to the bit


@pytest.mark.parametrize("process", ["2-0", "2-1", "3-0", "3-1", "3-2"])
def test_texts_and_scores_are_the_same_for_any_number_of_processes(process: str, folder: Path) -> None:
    """To the bit where pieces are kept; batches of rollouts are smaller where more share them, and rounded otherwise."""
    assert compared(folder, f"{process}-kept", "1-0-kept", 0.0)
    assert compared(folder, f"{process}-rollouts", "1-0-rollouts", 1e-6)


@pytest.mark.parametrize("process", ["2-0", "2-1", "3-0"])
def test_a_snapshot_goes_on_in_another_number_of_processes(process: str, folder: Path) -> None:
    """Of one process in two, of two in three."""
    assert compared(folder, f"{process}-gone on", "1-0-sft", 1e-5)


def test_a_share_is_every_so_many_and_all_are_shared() -> None:
    assert [Team(rank, 3).mine(list(range(7))) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert ALONE.mine([1, 2]) == [1, 2] and ALONE.add({"loss": 0.5}) == {"loss": 0.5}
