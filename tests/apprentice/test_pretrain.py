"""Training of the tiny base: what a step takes, and that a run can be broken off anywhere."""

import math
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from apprentice import pretrain as module
from apprentice.compute import CPU
from apprentice.finite import NumbersError
from apprentice.masking import length_mask
from apprentice.pretrain import build_base, pretrain
from apprentice.recorder import Recorder
from apprentice.tokens import encode_prompt, encode_response, train_word_tokenizer
from tests.apprentice.toys import Interrupted, Keeping, hash_of, naive_logps, pretrain_config

WORDS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_word_tokenizer([], 10, known=WORDS)


def document(rng: random.Random) -> tuple[str, str]:
    """Some letters and the same letters again."""
    letters = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
    return letters, letters


def run(
    tokenizer: PreTrainedTokenizerFast, recorder: Recorder, seed: int = 0, first_weights: int = 0, **changes: object
) -> LlamaForCausalLM:
    config = pretrain_config(**changes)
    model = build_base(config, tokenizer, first_weights)
    pretrain(model, tokenizer, document, config, seed=seed, compute=CPU, recorder=recorder)
    return model


def test_the_base_has_the_tokenizers_vocabulary_and_tied_embeddings(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_base(pretrain_config(), tokenizer, seed=0)
    assert model.config.vocab_size == len(tokenizer) == model.lm_head.weight.size(0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not model.training


def test_G6_seeds_decide_initial_and_trained_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    initial = [hash_of(build_base(pretrain_config(), tokenizer, seed)) for seed in (0, 0, 1)]
    assert initial[0] == initial[1] != initial[2]
    trained = [hash_of(run(tokenizer, Recorder(), seed, steps=3)) for seed in (0, 0, 1)]
    assert trained[0] == trained[1] != trained[2]
    assert trained[0] != initial[0]


def test_the_first_loss_is_the_mean_over_all_tokens_but_the_first(tokenizer: PreTrainedTokenizerFast) -> None:
    recorder = Recorder()
    fixed = ("a b c", "c b")

    def same(rng: random.Random) -> tuple[str, str]:
        return fixed

    config = pretrain_config(steps=1)
    model = build_base(config, tokenizer, 0)
    ids = encode_prompt(tokenizer, fixed[0]) + encode_response(tokenizer, fixed[1])
    assert ids[-1] == tokenizer.eos_token_id
    logps = naive_logps(model, ids[:1], ids[1:])  # prompt and response alike: the base learns the whole document
    pretrain(model, tokenizer, same, config, seed=0, compute=CPU, recorder=recorder)
    (row,) = recorder.rows
    assert row["loss"] == pytest.approx(-sum(logps) / len(logps), abs=1e-5)
    assert row["tokens"] == 4 * len(ids)
    assert row["learning_rate"] == pytest.approx(1e-2 / 2)  # first of two warm-up steps


def test_padding_does_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    # two documents of each of 32 lengths: the 16 batches of 4 hold two lengths each
    model, rng = build_base(pretrain_config(), tokenizer, 0), random.Random(0)
    documents = [(rng.choice(WORDS), " ".join(rng.choices(WORDS, k=size))) for size in range(1, 33)] * 2
    rows = [encode_prompt(tokenizer, p) + encode_response(tokenizer, r) for p, r in documents[:32]]
    total = 2 * sum(sum(naive_logps(model, ids[:1], ids[1:])) for ids in rows)
    given, recorder = iter(documents), Recorder()
    config = pretrain_config(steps=16, learning_rate=1e-12)  # the weights stand still
    pretrain(model, tokenizer, lambda rng: next(given), config, seed=0, compute=CPU, recorder=recorder)
    sizes = [0, *(row["tokens"] for row in recorder.rows)]
    # each step's loss is per token of its batch (all but the first of each row): times their number it is their sum
    found = sum(row["loss"] * (b - a - 4) for row, (a, b) in zip(recorder.rows, pairwise(sizes), strict=True))
    assert found == pytest.approx(-total, rel=1e-5)


@pytest.mark.parametrize("stop", [1, 7, 16, 17, 20])
def test_an_interrupted_run_ends_in_the_same_weights(tokenizer: PreTrainedTokenizerFast, stop: int) -> None:
    whole, broken = Keeping(), Keeping(keep_at=stop)
    wanted = run(tokenizer, whole)
    with pytest.raises(Interrupted):
        run(tokenizer, broken)
    resumed = Keeping(saved=broken.saved)
    assert hash_of(run(tokenizer, resumed, first_weights=99)) == hash_of(wanted)
    assert resumed.rows == whole.rows


def test_the_loss_falls(tokenizer: PreTrainedTokenizerFast) -> None:
    recorder = Recorder()
    run(tokenizer, recorder, steps=60)
    assert torch.tensor([row["loss"] for row in recorder.rows[-5:]]).mean() < 0.8 * recorder.rows[0]["loss"]


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_step_without_a_loss_stops_or_is_as_if_its_batch_had_not_been_there(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    batches = module._batches

    def third_left_out(*arguments: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return (batch for step, batch in enumerate(batches(*arguments), 1) if step != 3)

    def third_empty(*arguments: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (ids, lengths) in enumerate(batches(*arguments), arguments[-1] + 1):
            yield (ids, lengths) if step != 3 else (ids, lengths - math.nan)  # a mask of NaN

    monkeypatch.setattr(module, "_batches", third_left_out)
    without = Recorder()
    wanted = hash_of(run(tokenizer, without))
    monkeypatch.setattr(module, "_batches", third_empty)
    monkeypatch.setattr(module, "length_mask", lambda lengths, width: length_mask(lengths, width) * (0 * lengths + 1)[:, None])
    whole, broken = Keeping(skip_steps=1), Keeping(keep_at=stop, skip_steps=1)
    assert hash_of(run(tokenizer, whole)) == wanted
    assert [row["loss"] for row in whole.rows if row["step"] != 3] == [row["loss"] for row in without.rows]
    assert [row["tokens"] for row in whole.rows if row["step"] != 3] == [row["tokens"] for row in without.rows]
    assert whole.rows[2] == {"step": 3, "loss": None, "learning_rate": None, "tokens": whole.rows[1]["tokens"]}
    assert whole.skipped == 1 and whole.warnings[0].startswith("step 3 of 20: loss nan")
    with pytest.raises(Interrupted):
        run(tokenizer, broken)
    resumed = Keeping(saved=broken.saved, skip_steps=1)
    assert hash_of(run(tokenizer, resumed, first_weights=99)) == wanted and resumed.rows == whole.rows
    with pytest.raises(NumbersError, match="step 3 of 20: loss nan"):
        run(tokenizer, Recorder())
