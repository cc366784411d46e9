"""Evaluation figures by hand."""

import math

import pytest
import torch

from apprentice.compute import CPU
from apprentice.evaluation import (
    Questions,
    auc,
    best_temperature,
    distinct,
    frozen_logps,
    held_out_losses,
    respond,
    sample_metrics,
    verdicts,
)
from apprentice.policy import score
from apprentice.sampling import Rollout
from apprentice.tokens import collate
from tests.apprentice.toys import END, demonstrations, markov, naive_logps, tiny_llama


def test_auc_by_hand() -> None:
    # pairs: 2 > 1 and 2 = 2 and 2 < 3: (1 + 0.5) / 3
    assert auc([2.0], [1.0, 2.0, 3.0]) == pytest.approx(0.5)
    # 3 > 1, 3 > 2, 0 < 1, 0 < 2
    assert auc([3.0, 0.0], [1.0, 2.0]) == 0.5
    assert auc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert auc([1.0], [2.0]) == 0.0
    assert auc([], [1.0]) is None
    assert auc([1.0], []) is None


def test_distinct_by_hand() -> None:
    # bigrams: 12 21 12 | 12: two kinds of four
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 0.5
    assert distinct([[1, 2], [2, 1]], 2) == 1.0  # no bigram across two responses
    assert distinct([[1], []], 2) is None
    assert distinct([[1, 1, 1]], 1) == pytest.approx(1 / 3)


@pytest.fixture
def rollout() -> Rollout:
    """Two questions with two samples each; the last one was cut off."""
    batch = collate([[1], [1], [2, 2], [2, 2]], [[0, 1, END], [0, END], [END], [1, 1, 1]], END)
    return Rollout(batch, torch.zeros(4, 3), torch.tensor([True, True, True, False]), ["a", "a", "b", "b"])


def test_verdicts_judge_the_text_before_the_end_token(rollout: Rollout) -> None:
    asked: list[tuple[int, list[int]]] = []

    def verify(question: int, ids: list[int]) -> bool:
        asked.append((question, ids))
        return ids != [0]

    assert verdicts(rollout, 2, [True, True], verify) == [[True, False], [True, False]]  # cut off is wrong
    assert asked == [(0, [0, 1]), (0, [0]), (1, [])]
    assert verdicts(rollout, 2, [False, True], verify)[0] == [None, None]


def test_sample_metrics_by_hand(rollout: Rollout) -> None:
    garbage = 99.0  # stands in the padding
    logps = {
        "model": torch.tensor([[-1.0, -1, -1], [-1, -1, garbage], [-2, garbage, garbage], [-1, -1, -1]]),
        "sft": torch.tensor([[-1.0, -1, -2], [-2, -1, garbage], [-1, garbage, garbage], [-1, -1, -1]]),
        "base": torch.tensor([[-2.0, -2, -2], [-2, -2, garbage], [-3, garbage, garbage], [-1, -2, -2]]),
    }
    first, second = sample_metrics(rollout, logps, [[False, True], [None, None]])
    # sums: model -3 -2 | -2 -3, sft -4 -3 | -1 -3, base -6 -4 | -3 -5; rewards sft - base: 2 1 | 2 2
    assert first == {
        "sampled_accuracy": 0.5,
        "pass_at_2": 1.0,
        "self_reward_auc": 0.0,  # the right one earned 1, the wrong one 2
        "self_reward": 1.5,
        "kl_to_sft": 1.0,  # (-3 + 4, -2 + 3)
        "kl_to_base": 2.5,  # (-3 + 6, -2 + 4)
        "length": 2.5,
        "eos_rate": 1.0,
        "distinct_2": 1.0,  # the bigram 0 1 alone; the second response has one token
    }
    assert second["sampled_accuracy"] is second["pass_at_2"] is second["self_reward_auc"] is None
    assert (second["self_reward"], second["kl_to_sft"], second["kl_to_base"]) == (2.0, -0.5, 1.5)
    assert (second["length"], second["eos_rate"], second["distinct_2"]) == (2.0, 0.5, 0.5)


def test_all_right_or_all_wrong_has_no_auc(rollout: Rollout) -> None:
    logps = dict.fromkeys(("model", "sft", "base"), torch.zeros(4, 3))
    first, second = sample_metrics(rollout, logps, [[True, True], [False, False]])
    assert (first["sampled_accuracy"], first["pass_at_2"], first["self_reward_auc"]) == (1.0, 1.0, None)
    assert (second["sampled_accuracy"], second["pass_at_2"], second["self_reward_auc"]) == (0.0, 0.0, None)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
def test_held_out_losses_match_a_loop(temperature: float) -> None:
    model, batch = tiny_llama(0), demonstrations(5, seed=0)
    for row, loss in enumerate(held_out_losses(model, batch, CPU, temperature)):
        ids, p, n = batch.ids[row].tolist(), int(batch.prompt_lengths[row]), batch.lengths()[row]
        logps = naive_logps(model, ids[:p], ids[p:n], temperature)
        assert loss == pytest.approx(-sum(logps) / len(logps), abs=1e-4)
    assert held_out_losses(model, batch, CPU) == held_out_losses(model, batch, CPU, 1.0)


def test_the_best_temperature_is_the_one_the_data_were_drawn_at() -> None:
    table = [[0.0, 1.0, 2.0, 0.5], [1.5, 0.0, 0.5, 1.0], [0.5, 2.0, 0.0, 1.0], [0.0] * 4]
    writer, sharper = markov(table), markov([[2 * value for value in row] for row in table])
    questions = Questions([[0], [1], [2]], ["a", "b", "c"], END)
    options = {"max_new_tokens": 6, "seed": "0", "compute": CPU}
    written = respond(writer, questions, samples=100, temperature=1.0, **options).batch
    assert best_temperature(writer, written, [0.5, 1.0, 2.0], CPU) == 1.0
    assert best_temperature(sharper, written, [0.5, 1.0, 2.0, 4.0], CPU) == 2.0  # the same distribution
    assert best_temperature(sharper, written, [4.0, 2.0, 0.5], CPU) == 2.0
    assert best_temperature(sharper, written, [1.0, 0.5], CPU) == 1.0


def test_the_best_temperature_weighs_tokens_and_not_responses() -> None:
    # the table is sure of the end after 0 and of 1 after 1: right in twelve rows of one token, wrong in one of 40
    never = -4.0
    model = markov([[never, never, never, 0.0], [never, 0.0, never, never], [0.0] * 4, [0.0] * 4])
    batch = collate([[0]] * 12 + [[1]], [[END]] * 12 + [[0, 1] * 20], END)
    sure, unsure = (sum(held_out_losses(model, batch, CPU, t)) for t in (0.5, 4.0))
    assert sure < unsure  # response by response the sure one is better
    assert best_temperature(model, batch, [0.5, 4.0], CPU) == 4.0


def test_of_equal_temperatures_the_first_is_taken() -> None:
    uniform = markov([[0.0] * 4] * 4)
    assert best_temperature(uniform, demonstrations(3, seed=0), [0.7, 0.2, 1.0], CPU) == 0.7


def test_a_model_given_twice_is_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[object] = []

    def spy(model, batch, compute):
        scored.append(model)
        return score(model, batch, compute)

    monkeypatch.setattr("apprentice.evaluation.score", spy)
    sft, base, batch = tiny_llama(0), tiny_llama(1), demonstrations(3, seed=0)
    prompts = [ids[:n] for ids, n in zip(batch.ids.tolist(), batch.prompt_lengths.tolist(), strict=True)]
    logps = frozen_logps({"model": sft, "sft": sft, "base": base}, dict.fromkeys(("model", "sft", "base"), prompts), batch, CPU)
    assert len(scored) == 2
    assert torch.equal(logps["model"], logps["sft"])
    assert torch.equal(logps["base"], score(base, batch))


def test_each_model_is_scored_after_its_own_form_of_the_prompts() -> None:
    batch = demonstrations(4, seed=2)
    prompts = [ids[:n] for ids, n in zip(batch.ids.tolist(), batch.prompt_lengths.tolist(), strict=True)]
    forms = {"model": [[2, *ids, 1] for ids in prompts], "sft": prompts, "base": [ids[:1] for ids in prompts]}
    models = {name: tiny_llama(seed) for seed, name in enumerate(forms)}
    found = frozen_logps(models, forms, batch, CPU)
    for name, model in models.items():
        assert found[name].shape == batch.mask.shape
        for row, prompt in enumerate(forms[name]):
            ids = batch.responses[row, : int(batch.response_lengths[row])].tolist()
            assert found[name][row, : len(ids)].tolist() == pytest.approx(naive_logps(model, prompt, ids), abs=1e-5)
            assert (found[name][row, len(ids) :] == 0).all()


def test_a_model_given_twice_with_other_prompts_is_scored_after_each() -> None:
    model, batch = tiny_llama(0), demonstrations(4, seed=2)
    prompts = [ids[:n] for ids, n in zip(batch.ids.tolist(), batch.prompt_lengths.tolist(), strict=True)]
    tagged = [[*ids, 1] for ids in prompts]
    found = frozen_logps({"model": model, "sft": model}, {"model": tagged, "sft": prompts}, batch, CPU)
    assert torch.equal(found["sft"], score(model, batch))
    assert torch.equal(found["model"], frozen_logps({"model": model}, {"model": tagged}, batch, CPU)["model"])
    assert not torch.allclose(found["model"], found["sft"])


def test_respond_answers_question_by_question() -> None:
    # a table: after 0 come 1 and 2 evenly, then the end
    never = -30.0
    model = markov([[never, 0, 0, never], [never, never, never, 0], [never, never, never, 0], [0.0] * 4])
    questions = Questions([[0], [2, 0]], ["a", "b"], END)
    options = {"max_new_tokens": 4, "seed": "0", "compute": CPU}
    rollout = respond(model, questions, samples=50, temperature=1.0, **options)
    assert rollout.batch.prompt_lengths.tolist() == [1] * 50 + [2] * 50
    answers = rollout.response_ids()
    assert {tuple(ids) for ids in answers} == {(1,), (2,)}
    assert answers[:50] != answers[50:]  # the key of the question enters the draw
    assert abs(sum(ids == [1] for ids in answers) - 50) < 4 * math.sqrt(25)  # 4 sigma of 100 fair coins
    greedy = respond(model, questions, samples=1, temperature=0.0, **options)
    assert greedy.response_ids()[0] == greedy.response_ids()[1]
