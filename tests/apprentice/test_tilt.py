"""Two models decoded as one: the logits by hand, the same text as by full passes written out, both caches in step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import LlamaForCausalLM

from apprentice.compute import CPU, Compute
from apprentice.decoding import uniforms
from apprentice.policy import response_scores, save_policy, score
from apprentice.sampling import Request, Rollout, row_key, sample
from apprentice.tilt import FILE, Tilt, load_tilt, read_tilt, write_tilt
from apprentice.tokens import train_word_tokenizer
from tests.apprentice.toys import END, SMALL, demonstrations, enumerated, hash_of, markov, tilt, tiny_llama, total_variation

PROMPTS = [[0, 5, 7], [1], [2, 2, 2, 4, 9], [0, 5, 7], [8, 1], [6] * 17]
LIMIT = 10


def both(weight: float) -> Tilt:
    """A target of two layers and a baseline of three, of other sizes: the caches have other shapes."""
    baseline = tiny_llama(6, vocab=12, num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    return Tilt(tiny_llama(5, vocab=12), baseline, weight)


def probabilities(model: Tilt, prefix: list[int], temperature: float = 1.0) -> list[float]:
    """The next token's distribution after a prefix: the softmax of either model, their powers, normalised."""
    with torch.no_grad():
        p, q = (m(torch.tensor([prefix])).logits[0, -1].double().softmax(-1) for m in (model.target, model.baseline))
    raised = [
        (float(a) ** (1 + model.weight) / float(b) ** model.weight) ** (1 / temperature) for a, b in zip(p, q, strict=True)
    ]
    return [value / sum(raised) for value in raised]


def slow_draw(chances: list[float], uniform: float) -> int:
    total = 0.0
    for token, chance in enumerate(chances):
        total += chance
        if uniform < total:
            return token
    return len(chances) - 1


def slow_text(model: Tilt, prompt: list[int], key: int | None, temperature: float = 1.0, limit: int = LIMIT) -> list[int]:
    """One response, token by token, each from whole passes over all that stands before it; greedy without a key."""
    ids: list[int] = []
    while len(ids) < limit and END not in ids:
        chances = probabilities(model, prompt + ids, temperature)
        if key is None:
            ids.append(chances.index(max(chances)))
        else:
            ids.append(slow_draw(chances, float(uniforms(torch.tensor([key]), torch.tensor([len(ids)])))))
    return ids


def texts(rollout: Rollout) -> list[list[int]]:
    rows = zip(rollout.batch.responses.tolist(), rollout.batch.response_lengths.tolist(), strict=True)
    return [ids[:n] for ids, n in rows]


def run(model: Any, requests: list[Request], limit: int = LIMIT, **options: Any) -> Rollout:
    return sample(model, requests, seed="0", end=END, max_new_tokens=limit, **options)


def test_logits_by_hand() -> None:
    # after 0 the target gives (1/2, 1/4, 1/8, 1/8), the baseline 1/4 each; weight 1: (1, 1/4, 1/16, 1/16) over 11/8
    ln = math.log
    target, baseline = markov([[ln(4), ln(2), 0, 0]] + [[0.0] * 4] * 3), markov([[7.0] * 4] * 4)
    logits = Tilt(target, baseline, 1.0)(input_ids=torch.tensor([[0]])).logits
    wanted = [2 * ln(1 / 2) - ln(1 / 4), 2 * ln(1 / 4) - ln(1 / 4), 2 * ln(1 / 8) - ln(1 / 4), 2 * ln(1 / 8) - ln(1 / 4)]
    assert logits.shape == (1, 1, 4)
    assert logits[0, 0].tolist() == pytest.approx(wanted, abs=1e-5)
    assert logits.softmax(-1)[0, 0].tolist() == pytest.approx([8 / 11, 2 / 11, 1 / 22, 1 / 22], abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, -0.5, -1.0])
def test_logits_are_those_of_both_models_at_every_position(weight: float) -> None:
    model, ids = both(weight), torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    found = model(input_ids=ids, use_cache=False).logits.softmax(-1)
    for row in range(2):
        for t in range(5):
            wanted = probabilities(model, ids[row, : t + 1].tolist())
            assert found[row, t].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_one_step_of_the_tilt_is_the_exponential_tilt_at_beta_1_over_w(weight: float) -> None:
    model = both(weight)
    with torch.no_grad():
        target, baseline = (
            m(torch.tensor([[4]])).logits[0, -1].double().log_softmax(-1) for m in (model.target, model.baseline)
        )
    wanted = tilt(target, target - baseline, 1 / weight)
    assert probabilities(model, [4]) == pytest.approx(wanted.tolist(), abs=1e-9)
    assert model(input_ids=torch.tensor([[4]])).logits[0, -1].softmax(-1).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("compute", [CPU, SMALL, Compute(CPU.device, CPU.dtype, 60)])
def test_greedy_text_is_that_of_full_passes(weight: float, compute: Compute) -> None:
    model = both(weight)
    rollout = run(model, [Request(prompt, "k") for prompt in PROMPTS], temperature=0.0, compute=compute)
    assert texts(rollout) == [slow_text(model, prompt, None) for prompt in PROMPTS]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_text_is_that_of_full_passes_though_rows_leave_the_batch(temperature: float) -> None:
    model = both(0.7)
    requests = [Request(PROMPTS[i % 6], f"key {i % 6}", i // 6) for i in range(30)]
    rollout = run(model, requests, temperature=temperature)
    lengths = rollout.batch.response_lengths.tolist()
    assert len(set(lengths)) > 3  # rows left at several steps
    wanted = [slow_text(model, list(r.prompt), row_key("0", r), temperature) for r in requests]
    assert texts(rollout) == wanted


def test_batch_mates_and_chunks_change_nothing() -> None:
    model = both(1.0)
    requests = [Request(PROMPTS[i % 6], f"key {i % 6}", i // 6) for i in range(18)]
    together = texts(run(model, requests))
    assert texts(run(model, requests[::-1])) == together[::-1]
    assert texts(run(model, requests, compute=SMALL)) == together
    assert [texts(run(model, [request]))[0] for request in requests[:6]] == together[:6]


def test_both_caches_hold_the_rows_that_are_left() -> None:
    # greedy, whatever the baseline: 0 -> end, 1 -> 2 -> 0 -> end
    following = torch.nn.functional.one_hot(torch.tensor([END, 2, 0, 0]), 4)
    model = Tilt(markov((30.0 * following).tolist()), markov([[0.0] * 4] * 4), 1.0)
    seen: dict[str, list[tuple[int, int, int]]] = {"target": [], "baseline": []}

    def watch(name: str) -> Any:
        def hook(_: Any, __: Any, given: dict[str, Any]) -> None:
            layers = given["past_key_values"].layers
            seen[name].append((*given["input_ids"].shape, len(layers[0].keys) if layers else 0))

        return hook

    for name in seen:
        getattr(model, name).register_forward_pre_hook(watch(name), with_kwargs=True)
    rollout = run(model, [Request([n % 2], str(n)) for n in range(10)], temperature=0.0)
    assert texts(rollout) == [[END], [2, 0, END]] * 5
    assert seen["target"] == seen["baseline"] == [(2, 1, 0), (5, 1, 5), (5, 1, 5)]


def test_weight_0_is_the_target() -> None:
    model, target = both(0.0), tiny_llama(5, vocab=12)
    requests = [Request(PROMPTS[i % 6], f"key {i % 6}", i // 6) for i in range(18)]
    assert texts(run(model, requests)) == texts(run(target, requests))
    batch = demonstrations(6, seed=0, vocab=12)
    assert torch.allclose(score(model, batch), score(target, batch), atol=1e-5)


def test_weight_minus_1_is_the_baseline_and_equal_models_are_either() -> None:
    batch = demonstrations(6, seed=0, vocab=12)
    swapped = Tilt(tiny_llama(5, vocab=12), tiny_llama(6, vocab=12), -1.0)
    assert torch.allclose(score(swapped, batch), score(tiny_llama(6, vocab=12), batch), atol=1e-5)
    for weight in (0.0, 1.0, 7.0):
        same = Tilt(tiny_llama(5, vocab=12), tiny_llama(5, vocab=12), weight)
        assert torch.allclose(score(same, batch), score(tiny_llama(5, vocab=12), batch), atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_match_full_passes_and_the_recorded_ones(temperature: float) -> None:
    model = both(1.5)
    rollout = run(model, [Request(prompt, f"{i}") for i, prompt in enumerate(PROMPTS)], temperature=temperature)
    found = score(model, rollout.batch, temperature=temperature)
    assert torch.allclose(found, rollout.logps, atol=1e-4)
    assert torch.allclose(score(model, rollout.batch, SMALL, temperature), found, atol=1e-4)
    for row, (prompt, ids) in enumerate(zip(PROMPTS, texts(rollout), strict=True)):
        wanted = [math.log(probabilities(model, prompt + ids[:t], temperature)[token]) for t, token in enumerate(ids)]
        assert found[row, : len(ids)].tolist() == pytest.approx(wanted, abs=1e-4)
        assert (found[row, len(ids) :] == 0).all()


def test_G2_the_probabilities_of_all_responses_add_up_to_1() -> None:
    logps = score(Tilt(tiny_llama(1), tiny_llama(2), 1.0), enumerated()).double().sum(1)
    assert float(logps.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_token_by_token_is_not_the_tilt_of_whole_responses() -> None:
    # the limit that PPO aims at weighs a token by what its continuations earn, too: the two agree on the last token only
    batch = enumerated()
    target, baseline = (score(tiny_llama(seed), batch).double() for seed in (1, 2))
    whole = tilt(target.sum(1), (target - baseline).sum(1), 1.0)
    steps = score(Tilt(tiny_llama(1), tiny_llama(2), 1.0), batch).double()
    assert total_variation(steps.sum(1).exp(), whole) > 0.02
    # the same first two tokens, 0 and 0: rows that differ in the third
    last = [row for row, ids in enumerate(batch.responses.tolist()) if ids[:2] == [0, 0]]
    assert len(last) == 4
    assert steps[last, 2].exp().tolist() == pytest.approx((whole[last] / whole[last].sum()).tolist(), abs=1e-5)


def test_first_tokens_follow_the_tilt() -> None:
    model = both(1.0)
    rollout = run(model, [Request([0, 2], "k", n) for n in range(4000)], limit=1)
    seen = torch.bincount(rollout.batch.responses[:, 0], minlength=12)
    wanted: Tensor = 4000 * torch.tensor(probabilities(model, [0, 2]))
    common = wanted >= 5
    found, expected = ([*v[common].tolist(), float(v[~common].sum())] for v in (seen.double(), wanted.double()))
    assert chisquare(found, expected, sum_check=False).pvalue > 1e-4


def test_both_models_are_frozen_and_nothing_takes_a_gradient() -> None:
    target = tiny_llama(5, vocab=12, attention_dropout=0.5).train()
    model = Tilt(target, tiny_llama(6, vocab=12), 1.0)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(part.training for part in model.modules())
    before, batch = hash_of(model), demonstrations(4, seed=0, vocab=12)
    assert not response_scores(model, batch).logps.requires_grad
    run(model, [Request([1], "k")])
    assert hash_of(model) == before


def test_under_bfloat16_the_powers_are_taken_in_float32() -> None:
    bf16 = Compute(CPU.device, torch.bfloat16)
    model, batch = both(1.0), demonstrations(4, seed=0, vocab=12)
    with bf16.autocast():
        logits = model(input_ids=batch.ids, use_cache=False).logits
    assert logits.dtype == torch.float32
    rough, exact = score(model, batch, bf16), score(model, batch)
    assert not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, atol=1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of models: a target, a baseline, and the tilt of the two."""
    tokenizer = train_word_tokenizer(["a b c"], 10)

    def model(seed: int) -> LlamaForCausalLM:
        return tiny_llama(seed, vocab=len(tokenizer), eos_token_id=tokenizer.eos_token_id)

    (tmp_path / "models").mkdir()
    for name, seed in (("sft", 5), ("base", 6)):
        save_policy(model(seed), tokenizer, tmp_path / "models" / name, "# card\n")
    models = tmp_path / "models"
    write_tilt(models / "tilt", models / "sft", models / "base", 0.75, {"sft": "ab", "base": "cd"})
    return models


def test_what_is_written_is_loaded(folder: Path) -> None:
    said = {"target": "sft", "baseline": "base", "weight": 0.75, "made_from": {"sft": "ab", "base": "cd"}}
    assert read_tilt(folder / "tilt") == said
    assert [path.name for path in (folder / "tilt").iterdir()] == [FILE]
    loaded = load_tilt(folder / "tilt")
    vocab = loaded.config.vocab_size
    wanted, batch = Tilt(tiny_llama(5, vocab), tiny_llama(6, vocab), 0.75), demonstrations(5, seed=0, vocab=vocab)
    assert torch.equal(score(loaded, batch), score(wanted, batch))
    assert not torch.allclose(score(loaded, batch), score(Tilt(tiny_llama(6, vocab), tiny_llama(5, vocab), 0.75), batch))


def test_the_folder_may_move_with_its_siblings(folder: Path) -> None:
    before = score(load_tilt(folder / "tilt"), demonstrations(5, seed=0))
    moved = folder.rename(folder.with_name("elsewhere"))
    assert torch.equal(score(load_tilt(moved / "tilt"), demonstrations(5, seed=0)), before)
