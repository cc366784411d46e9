"""Each family of checkpoints: sampled, scored, valued and trained alike, whatever its positions, windows and caps."""

import pytest
import torch
from transformers import PreTrainedModel

from apprentice.policy import Critic, response_scores, score, values_of
from apprentice.sampling import Request, Rollout, sample
from tests.apprentice.families import FAMILIES, tiny
from tests.apprentice.toys import END, SMALL, naive_logps

PROMPTS = [[1, 5, 7], [1], [2, 2, 2, 4, 9, 11, 12, 13], [1, 5, 7], [8, 1]]  # of lengths on both sides of the window of four


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture(scope="module")
def rollout(model: PreTrainedModel) -> Rollout:
    asked = [Request(PROMPTS[i % 5], f"key {i % 5}", i // 5) for i in range(30)]
    return sample(model, asked, seed="0", end=END, max_new_tokens=12)


def test_recorded_logps_are_those_of_the_training_forward(model: PreTrainedModel, rollout: Rollout) -> None:
    """Left padding, finished rows that leave and the window of the cache against one pass over the padded batch, and against
    a pass a token of each row alone."""
    assert torch.allclose(rollout.logps, score(model, rollout.batch), atol=1e-4)
    assert len(set(rollout.batch.response_lengths.tolist())) > 2 and bool(rollout.ended.any())
    for row in (2, 4, 7):
        size, ids = int(rollout.batch.response_lengths[row]), rollout.batch.responses[row].tolist()
        wanted = naive_logps(model, PROMPTS[row % 5], ids[:size])
        assert rollout.logps[row, :size].tolist() == pytest.approx(wanted, abs=1e-4)


def test_padding_and_batch_mates_change_nothing(model: PreTrainedModel, rollout: Rollout) -> None:
    assert torch.allclose(score(model, rollout.batch), score(model, rollout.batch, SMALL), atol=1e-5)
    critic = Critic(model)
    torch.nn.init.normal_(critic.head.weight)
    assert torch.allclose(values_of(critic, rollout.batch), values_of(critic, rollout.batch, SMALL), atol=1e-4)


def test_a_head_on_the_policys_trunk_reads_the_same_in_the_policys_own_pass(model: PreTrainedModel, rollout: Rollout) -> None:
    shared, separate = Critic(model, shared=True), Critic(model)
    torch.nn.init.normal_(shared.head.weight)
    separate.head.load_state_dict(shared.head.state_dict())
    scores = response_scores(model, rollout.batch, hidden=True)
    assert scores.hidden is not None
    for values in (shared.read(scores.hidden, scores.layout, rollout.batch), shared(rollout.batch)):
        assert torch.allclose(values, separate(rollout.batch), atol=1e-5) and bool(values.any())
    assert torch.equal(scores.logps, response_scores(model, rollout.batch).logps)


def test_every_weight_gets_a_gradient(model: PreTrainedModel, rollout: Rollout) -> None:
    model.zero_grad()
    response_scores(model, rollout.batch).logps.sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())
