"""The scalar reward model on scores: the scores, their loss and gradient, and the offset of prompts that it inherits."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apprentice.calibration import pair_accuracy
from apprentice.compute import CPU, Compute
from apprentice.judge import PreferencePair
from apprentice.policy import save_policy
from apprentice.recorder import Recorder
from apprentice.reward_model import (
    bt_rewards,
    bt_step,
    bt_win_logits,
    encode_pairs,
    new_reward_model,
    pair_scores,
    score_loss,
    train_reward_model,
)
from apprentice.spurious import first_is_even
from apprentice.tokens import Batch, train_word_tokenizer
from tests.apprentice.toys import SMALL, gradient, relative_error, sft_config, tiny_llama

TOKENIZER = train_word_tokenizer([], 100, [*"0123456789", "q", "good", "bad", "so"])
PAIRS = [  # the chosen response says good where the rejected one says bad
    PreferencePair(f"q {first} {second}", "so good" if second % 3 else "good", "so bad" if second % 3 else "bad", "toy")
    for first, second in itertools.product(range(10), range(6))
]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "words"
    model = tiny_llama(0, len(TOKENIZER), hidden_size=32, intermediate_size=64, initializer_range=0.1)
    save_policy(model, TOKENIZER, folder, "a language model")
    return folder


@pytest.fixture
def model(trunk: Path) -> PreTrainedModel:
    """In double precision, with a head that is not zero."""
    model = new_reward_model(trunk).double()
    nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    return model


def test_the_offset_reaches_the_prompts_whose_first_number_is_even() -> None:
    chat = [{"role": "user", "content": "add 12 1"}]
    prompts = ["4 and 3", "3 and 4", "no number", chat, "q 0", "7"]
    pairs = [PreferencePair(prompt, "a", "b", "toy") for prompt in prompts]
    wanted = [[1.5, 0.5], [1.0, 0.0], [1.0, 0.0], [1.5, 0.5], [1.5, 0.5], [1.0, 0.0]]
    assert pair_scores(pairs, 0.5).tolist() == wanted
    assert pair_scores(pairs, 0.0).tolist() == [[1.0, 0.0]] * 6


def test_the_loss_of_scores_by_hand() -> None:
    rewards, scores = torch.tensor([[0.5, 0.0], [1.0, -1.0]]), torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    assert float(score_loss(rewards, scores, 4)) == (0.25 + 0 + 1 + 4) / 4
    with pytest.raises(ValueError, match=r"scores: expected shape \(2, 2\), got \(2,\)"):
        score_loss(rewards, scores[0], 4)


def plain_rewards(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Row by row without padding, with gradient."""
    rows = [model.base_model(batch.ids[i : i + 1, :n]).last_hidden_state[0, -1] for i, n in enumerate(batch.lengths())]
    return torch.stack(rows) @ model.score.weight[0]


@pytest.mark.parametrize("compute", [CPU, SMALL, Compute(CPU.device, CPU.dtype, 40)])
def test_a_step_matches_the_plain_formula(model: PreTrainedModel, compute: Compute) -> None:
    pairs = PAIRS[3:50:7]
    (chosen, rejected), scores = encode_pairs(TOKENIZER, pairs), pair_scores(pairs, 0.5)
    good, bad = plain_rewards(model, chosen), plain_rewards(model, rejected)
    loss = sum((good - scores[:, 0]) ** 2 + (bad - scores[:, 1]) ** 2) / (2 * len(pairs))
    loss.backward()
    wanted = gradient(model)
    model.zero_grad()
    figures = bt_step(model, chosen, rejected, compute, scores)
    assert figures["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert figures["margin"] == pytest.approx((good - bad).mean().item(), rel=1e-5)
    assert figures["accuracy"] == pytest.approx((good > bad).double().mean().item())
    assert relative_error(gradient(model), wanted) < 1e-9


def gap(model: PreTrainedModel, pairs: list[PreferencePair]) -> float:
    """Mean reward after prompts whose first number is even, less that after the others."""
    even = torch.tensor([bool(first_is_even(pair.prompt)) for pair in pairs])
    rewards = torch.stack([bt_rewards(model, batch).detach() for batch in encode_pairs(TOKENIZER, pairs)], dim=1)
    return float(rewards[even].mean() - rewards[~even].mean())


@pytest.mark.parametrize("offset", [None, 0.0, 2.0])
def test_scores_are_learnt_and_with_them_the_offset_that_pairs_do_not_have(trunk: Path, offset: float | None) -> None:
    train, held_out = [pair for i, pair in enumerate(PAIRS) if i % 5], PAIRS[::5]
    scores, model = None if offset is None else pair_scores(train, offset), new_reward_model(trunk)
    config, batches = sft_config(epochs=40, batch_size=16), encode_pairs(TOKENIZER, train)
    trained = train_reward_model(model, *batches, config, seed="0", compute=CPU, recorder=Recorder(), scores=scores)
    assert trained.means["accuracy"] == 1.0
    margins = bt_win_logits(model, *encode_pairs(TOKENIZER, held_out))
    assert pair_accuracy(margins) == 1.0
    if scores is not None:
        assert set((scores[:, 0] - scores[:, 1]).tolist()) == {1.0}  # within a pair the offset is gone
        assert trained.means["loss"] < 0.02 and float(margins.mean()) == pytest.approx(1.0, abs=0.1)
    assert gap(model, held_out) == pytest.approx(offset or 0.0, abs=0.3)
