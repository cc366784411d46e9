"""Per-step negatives: the three variants of what is learnt from values, and the policy they share."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from apprentice.compute import CPU
from apprentice.losses import preference_loss, weighted_next_token_loss
from apprentice.masking import masked_sum
from apprentice.policy import freeze, response_scores
from apprentice.preference import preference_step, with_reference
from apprentice.sft import train_step
from apprentice.steps import (
    Attempt,
    Completed,
    StepWeights,
    advantage_weights,
    practical_pairs,
    shared_prefix_pairs,
    step_ends,
)
from apprentice.tokens import Batch, collate
from tests.apprentice.toys import (
    END,
    LIMIT,
    SMALL,
    gradient,
    naive_logps,
    relative_error,
    rso_config,
    tiny_llama,
)

CUT = frozenset({1})  # in the enumerable world a step ends after token 1
STOP = 9  # the end token of worlds of our own, where content tokens are above it


def of_sizes(sizes: Sequence[int], first: int, right: bool = False, key: str = "a", ended: bool = True) -> Attempt:
    """An attempt of steps of the given sizes, its tokens numbered from `first`."""
    ends = list(itertools.accumulate(sizes))
    return Attempt([7, 8], key, list(range(first, first + ends[-1])), ends, right, ended)


def a_crowd(seed: int) -> tuple[list[Attempt], list[list[float]], dict[Any, Completed]]:
    """Attempts at three prompts that share no token, with values; about half right, of the third prompt none; completions."""
    rng = random.Random(seed)
    attempts, values, completed = [], [], {}
    for number in range(30):
        key, right = rng.choice("abc"), rng.random() < 0.5
        attempt = of_sizes([rng.randint(1, 3) for _ in range(rng.randint(1, 4))], 100 * (number + 1), right and key != "c", key)
        attempts.append(attempt)
        values.append([rng.choice([0.0, 0.5, 1.0]) for _ in attempt.ends] + [float(attempt.right)])
        for prefix in attempt.prefixes():
            own = [[10_000 + 100 * number + n for n in range(rng.randint(0, 3))] for _ in range(rng.randint(0, 2))]
            completed[prefix] = completed.get(prefix) or Completed(0.5, own)
    return attempts, values, completed


@pytest.mark.parametrize("seed", range(3))
def test_I3_a_right_response_is_never_a_negative(seed: int) -> None:
    attempts, values, completed = a_crowd(seed)
    good = {token for attempt in attempts if attempt.right for token in attempt.response}
    wrong = [attempt for attempt in attempts if not attempt.right]
    bad = {token for attempt in wrong for token in attempt.response}
    assert good and bad
    whole = practical_pairs(attempts, values, STOP)
    shared = shared_prefix_pairs(attempts, values, completed, CUT, STOP)
    for pairs, dropped in (whole, shared):
        assert len(pairs.prompts) == len(pairs.chosen) == len(pairs.rejected) == len(wrong) - sum(dropped.values()) > 0
        assert sum(dropped.values()) > 0
        assert all(set(ids) <= bad for ids in pairs.rejected)
    assert all(set(ids[:-1]) <= good and ids[-1] == STOP for ids in whole[0].chosen)
    assert set(whole[1]) == {"no_right_response"} and whole[1].total() == sum(row.key == "c" for row in attempts)
    assert set(shared[1]) == {"no_right_completion"}


def test_without_a_wrong_response_there_is_no_pair() -> None:
    right = [of_sizes([1, 2], 20, right=True), of_sizes([1], 30, right=True)]
    for pairs, dropped in (practical_pairs(right, [[], []], STOP), shared_prefix_pairs(right, [[], []], {}, CUT, STOP)):
        assert (pairs.prompts, pairs.chosen, pairs.rejected, dropped) == ([], [], [], {})


def test_practical_pairs_by_hand() -> None:
    attempts = [
        of_sizes([2, 1, 2], 20),  # pit: the second step
        of_sizes([1, 1], 30, right=True),
        of_sizes([1], 40, right=True),
        of_sizes([1, 2], 50, ended=False),  # pit: the last step
        of_sizes([2], 60),
        of_sizes([1], 70, key="b"),
        of_sizes([1], 80, right=True, key="c"),
    ]
    values = [[0.5, 0.5, 0.0, 0.0], [], [], [0.5, 0.25, 0.0], [0.5, 0.0], [0.0, 0.0], []]
    pairs, dropped = practical_pairs(attempts, values, STOP)
    assert pairs.prompts == [[7, 8]] * 3
    assert pairs.rejected == [[20, 21, 22], [50, 51, 52], [60, 61]]
    assert pairs.chosen == [[30, 31, STOP], [40, STOP], [30, 31, STOP]]  # in turn, of the same prompt
    assert dropped == {"no_right_response": 1}


def shared(attempt: Attempt, pit: int, *right: list[int]) -> tuple[list[Any], Counter[str]]:
    """The pair of one wrong attempt that goes wrong at a step, as [prompt, chosen, rejected]; what was dropped."""
    values = [1.0] * pit + [0.0] * (len(attempt.ends) + 1 - pit)
    completed = {attempt.prefix(pit - 1): Completed(0.5, list(right))}
    pairs, dropped = shared_prefix_pairs([attempt], [values], completed, CUT, STOP)
    return [side[0] for side in (pairs.prompts, pairs.chosen, pairs.rejected) if side], dropped


def test_shared_prefix_pairs_by_hand() -> None:
    attempt = of_sizes([2, 1, 2], 20)
    assert shared(attempt, 2, [30, 1, 31], [40]) == ([[7, 8, 20, 21], [30, 1], [22]], {})
    assert shared(attempt, 1, [30, 31]) == ([[7, 8], [30, 31, STOP], [20, 21]], {})  # one step: all of it
    assert shared(attempt, 3, [30, 1]) == ([[7, 8, 20, 21, 22], [30, 1, STOP], [23, 24]], {})  # a separator comes last
    assert shared(attempt, 3, []) == ([[7, 8, 20, 21, 22], [STOP], [23, 24]], {})  # to end there would have been right
    assert shared(attempt, 2) == ([], {"no_right_completion": 1})


def test_a_step_is_not_paired_with_itself() -> None:
    attempt = Attempt([7, 8], "a", [20, 1, 21, 1, 22], [2, 4, 5], False, True)
    same, other = [21, 1, 30], [31, 1]
    assert shared(attempt, 2, same, other, [32]) == ([[7, 8, 20, 1], [31, 1, STOP], [21, 1]], {})
    assert shared(attempt, 2, same, same) == ([], {"same_step": 1})


def masked(batch: Batch) -> list[list[int]]:
    """The response tokens that enter the loss, row by row."""
    return [row[keep.bool()].tolist() for row, keep in zip(batch.responses, batch.mask, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_I4_what_is_rejected_ends_with_a_step_and_has_no_end_token(seed: int) -> None:
    attempts, values, completed = a_crowd(seed)
    wrong = {attempt.response[0] // 100: (attempt, row) for attempt, row in zip(attempts, values, strict=True)}
    last = 0
    for variant in ("practical", "shared_prefix"):
        if variant == "practical":
            pairs, _ = practical_pairs(attempts, values, STOP)
        else:
            pairs, _ = shared_prefix_pairs(attempts, values, completed, CUT, STOP)
        batch = collate(pairs.prompts, pairs.rejected, STOP)
        for found in masked(batch):
            attempt, row = wrong[found[0] // 100]
            lowest = row[1:].index(min(row[1:]))
            last += lowest == len(attempt.ends) - 1
            begin = [0, *attempt.ends][lowest] if variant == "shared_prefix" else 0
            assert found == attempt.response[begin : attempt.ends[lowest]]
            assert STOP not in found
    assert last > 0  # the pit was the last step too


def test_I4_a_pit_at_the_last_step_of_a_response_that_ended() -> None:
    attempt, right = of_sizes([1, 2], 20), of_sizes([1], 30, right=True)
    pairs, _ = practical_pairs([attempt, right], [[1.0, 1.0, 0.0], []], STOP)
    batch = collate(pairs.prompts, pairs.rejected, STOP)
    assert attempt.ended
    assert masked(batch) == [[20, 21, 22]] and float(batch.mask.sum()) == 3
    assert masked(collate(pairs.prompts, pairs.chosen, STOP)) == [[30, STOP]]


# --- I5: shared prefixes, with models of the enumerable world


PREFIXES = [[2, 1], [0, 1, 1], [1]]  # shared, of one, two and one step
WRONG = [[0, 0, 1], [2], [1]]  # the step after them, also the last
RIGHT = [[2, 0], [0, 1, 2], [0, 2, 2]]  # completions; the second has two steps


def shared_world() -> tuple[Any, Batch, Batch, Batch, Batch]:
    """The pairs, their batches with the prefix in the prompt, and the same with it in the response."""
    attempts = [Attempt([0, 2], "a", p + w, step_ends(p + w, CUT), False, True) for p, w in zip(PREFIXES, WRONG, strict=True)]
    values = [[1.0] * len(row.ends) + [0.0] for row in attempts]
    completed = {row.prefix(len(row.ends) - 1): Completed(0.5, [ids]) for row, ids in zip(attempts, RIGHT, strict=True)}
    pairs, dropped = shared_prefix_pairs(attempts, values, completed, CUT, END)
    assert not dropped
    sides = [collate(pairs.prompts, side, END) for side in (pairs.chosen, pairs.rejected)]
    joined = [[p + ids for p, ids in zip(PREFIXES, side, strict=True)] for side in (pairs.chosen, pairs.rejected)]
    return pairs, *sides, *(collate([[0, 2]] * 3, side, END) for side in joined)


def test_I5_only_the_differing_steps_are_in_the_masks() -> None:
    pairs, chosen, rejected, *_ = shared_world()
    assert pairs.prompts == [[0, 2, *prefix] for prefix in PREFIXES]
    assert masked(chosen) == [[2, 0, END], [0, 1], [0, 2, 2, END]]
    assert masked(rejected) == WRONG
    for batch in (chosen, rejected):
        assert batch.prompt_lengths.tolist() == [2 + len(prefix) for prefix in PREFIXES]


def test_I5_the_loss_is_that_of_whole_sequences() -> None:
    _, *batches = shared_world()
    reference, found = freeze(tiny_llama(3).double()), []
    for chosen, rejected in (batches[:2], batches[2:]):
        model = tiny_llama(0).double()
        pairs = with_reference(reference, chosen, rejected, CPU)
        metrics = preference_step(model, pairs, [0, 1, 2], rso_config(), CPU)
        found.append((metrics, gradient(model), pairs))
    (metrics, grad, inside), (others, other, outside) = found
    for name in ("loss", "margin", "accuracy"):
        assert metrics[name] == pytest.approx(others[name], rel=1e-5, abs=1e-6)
    assert abs(metrics["margin"]) > 1e-2
    assert relative_error(other, grad) < 1e-5
    # though the sums of the two differ, by the shared tokens
    assert float((inside.reference_chosen_logps - outside.reference_chosen_logps).abs().min()) > 0.1


class Table:
    """Logits [B, L, V] in place of a model, so that a gradient can be read at each position."""

    training = False

    def __init__(self, batch: Batch, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(*batch.ids.shape, 4, generator=generator).requires_grad_(True)

    def __call__(
        self, input_ids: Tensor, use_cache: bool, logits_to_keep: Tensor, output_hidden_states: bool
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[:, logits_to_keep])


def test_I5_shared_tokens_take_no_gradient() -> None:
    _, chosen, rejected, *_ = shared_world()
    tables = [Table(batch, seed) for seed, batch in enumerate((chosen, rejected))]
    sums = [
        masked_sum(response_scores(table, batch).logps, batch.mask)
        for table, batch in zip(tables, (chosen, rejected), strict=True)
    ]
    loss, _ = preference_loss(*sums, torch.zeros(3), torch.zeros(3), "sigmoid_norm", 0.5)
    loss.backward()
    for table, batch in zip(tables, (chosen, rejected), strict=True):
        for row, (begin, size) in enumerate(zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist(), strict=True)):
            strength = table.logits.grad[row].abs().sum(-1)
            assert bool((strength[: begin - 1] == 0).all())  # position t predicts token t + 1
            assert bool((strength[begin - 1 : begin - 1 + size] > 1e-3).all())
            assert bool((strength[begin - 1 + size :] == 0).all())


# --- advantage-weighted


def weighted(attempts: list[Attempt], values: list[list[float]], beta: float = 0.5, most: float = 5.0) -> StepWeights:
    return advantage_weights(attempts, values, beta, most, STOP)


def test_weights_by_hand() -> None:
    attempts = [of_sizes([2, 1], 20, right=True), of_sizes([1, 2], 30, ended=False), of_sizes([1], 40)]
    found = weighted(attempts, [[0.5, 0.25, 1.0], [0.5, 0.75, 0.0], [0.5, 0.0]], beta=0.5, most=4.0)
    assert found.prompts == [[7, 8]] * 3
    assert found.responses == [[20, 21, 22, STOP], [30, 31, 32], [40, STOP]]
    down, up = math.exp(-0.5), 4.0  # A = -.25; A = .75 would be exp(1.5) = 4.48
    assert found.weights[0] == pytest.approx([down, down, up, up])
    assert found.weights[1] == pytest.approx([math.exp(0.5), math.exp(-1.5), math.exp(-1.5)])
    assert found.weights[2] == pytest.approx([math.exp(-1)] * 2)


def test_a_tiny_beta_gives_the_limit_and_0() -> None:
    found = weighted([of_sizes([1, 1], 20)], [[0.25, 0.75, 0.0]], beta=1e-4)
    assert found.weights == [[pytest.approx(5.0), 0.0, 0.0]]


def test_weights_are_aligned_with_the_mask_of_the_batch() -> None:
    attempts, values, _ = a_crowd(0)
    found = weighted(attempts, values)
    batch, padded = collate(found.prompts, found.responses, STOP), found.padded(CPU.device)
    assert padded.shape == batch.mask.shape and padded.dtype == torch.float32
    assert torch.equal(padded > 0, batch.mask > 0)
    of_token = {}
    for attempt, row in zip(attempts, values, strict=True):
        for step in range(len(attempt.ends)):
            weight = min(math.exp((row[step + 1] - row[step]) / 0.5), 5.0)
            of_token |= dict.fromkeys(attempt.response[([0, *attempt.ends])[step] : attempt.ends[step]], weight)
    for ids, weights in zip(batch.responses.tolist(), padded.tolist(), strict=True):
        for place, token in enumerate(ids[: len(ids) - ids[::-1].count(STOP)]):
            assert weights[place] == pytest.approx(of_token[token])


def world_attempts() -> tuple[list[Attempt], list[list[float]]]:
    responses = ([1, 0], [0, 1, 2], [2], [1, 1], [2, 2])
    attempts = [Attempt([0, 2], "a", ids, step_ends(ids, CUT), False, len(ids) < LIMIT) for ids in responses]
    return attempts, [[0.25 * ((3 * i + j) % 5) for j in range(len(row.ends) + 1)] for i, row in enumerate(attempts)]


def test_the_weighted_loss_is_that_of_a_loop_over_steps() -> None:
    attempts, values = world_attempts()
    found = advantage_weights(attempts, values, 0.5, 3.0, END)
    batch = collate(found.prompts, found.responses, END)
    total = count = 0.0
    for attempt, row in zip(attempts, values, strict=True):
        ids = [*attempt.response, END] if len(attempt.response) < LIMIT else attempt.response
        for place, logp in enumerate(naive_logps(tiny_llama(0), attempt.prompt, ids)):
            step = min(sum(token == 1 for token in attempt.response[:place]), len(attempt.ends) - 1)
            weight = min(math.exp((row[step + 1] - row[step]) / 0.5), 3.0)
            total, count = total - weight * logp, count + weight
    for compute in (CPU, SMALL):
        assert train_step(tiny_llama(0), batch, compute, found.padded(CPU.device)) == pytest.approx(total / count, rel=1e-5)


def test_I7_advantages_of_0_are_plain_fine_tuning() -> None:
    attempts, _ = world_attempts()
    found = advantage_weights(attempts, [[0.25] * (len(row.ends) + 1) for row in attempts], 0.5, 5.0, END)
    assert all(weight == 1.0 for row in found.weights for weight in row)
    batch, losses, grads = collate(found.prompts, found.responses, END), [], []
    for weights in (found.padded(CPU.device), None):
        model = tiny_llama(0).double()
        losses.append(train_step(model, batch, CPU, weights))
        grads.append(gradient(model))
    assert losses[0] == losses[1]
    assert torch.equal(*grads)
    skewed = advantage_weights(*world_attempts(), 0.5, 5.0, END).padded(CPU.device)
    assert train_step(tiny_llama(0).double(), batch, CPU, skewed) != pytest.approx(losses[0], rel=1e-3)


# --- I6: two ways to one policy, by exact gradients on three actions


SFT, ADVANTAGES, BETA = (0.2, 0.5, 0.3), (0.6, 0.1, -0.5), 0.5


def minimum(loss_of: Callable[[Tensor], Tensor]) -> list[float]:
    """The policy [3] that minimises a loss of its log-probabilities."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = loss_of(logits.log_softmax(0))
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().softmax(0).tolist()


def test_I6_per_step_dpo_and_advantage_weights_reach_the_same_policy() -> None:
    reference = torch.tensor(SFT, dtype=torch.float64).log()

    def dpo(logps: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, j in itertools.permutations(range(3), 2):
            label = 1 / (1 + math.exp(ADVANTAGES[j] - ADVANTAGES[i]))
            sides = (logps[[i]], logps[[j]], reference[[i]], reference[[j]])
            total = total + SFT[i] * SFT[j] * label * preference_loss(*sides, "sigmoid_norm", BETA)[0]
        return total

    # actions as responses of one step, as often as the SFT model takes them; values whose difference is the advantage
    actions = [action for action, p in enumerate(SFT) for _ in range(round(10 * p))]
    attempts = [Attempt([7], "a", [action], [1], False, False) for action in actions]
    weights = weighted(attempts, [[0.0, ADVANTAGES[action]] for action in actions], BETA, most=100.0)

    def likelihood(logps: Tensor) -> Tensor:
        return weighted_next_token_loss(logps[actions][:, None], torch.ones(10, 1), weights.padded(CPU.device))[0]

    published = [0.479, 0.441, 0.080]
    tilted = [p * math.exp(a / BETA) for p, a in zip(SFT, ADVANTAGES, strict=True)]
    exact = [t / sum(tilted) for t in tilted]
    assert exact == pytest.approx(published, abs=5e-4)
    for loss_of in (dpo, likelihood):
        assert minimum(loss_of) == pytest.approx(exact, abs=1e-5)
