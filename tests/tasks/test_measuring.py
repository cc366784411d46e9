"""What an evaluation scores again, and what it takes from the sampler."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice import evaluation
from apprentice.compute import CPU
from apprentice.config import Params
from apprentice.demonstrations import demonstration
from apprentice.evaluation import respond
from apprentice.sampling import Rollout
from apprentice.spurious import CUE
from apprentice.tokens import collate, train_word_tokenizer
from apprentice.world import WORDS
from tasks.measuring import Measured, _sample_logps, measure, spurious_figures
from tests.apprentice.toys import naive_logps, tiny_llama

TOKENIZER = train_word_tokenizer([], 4, ["a", "b", "c"])
ROWS = [demonstration(prompt, "a", "test") for prompt in ("a b", "c", "b b a")]
LIMIT = 6


def models(own: int) -> dict[str, Measured]:
    """The model of seed `own`, sft and base; an equal seed is the same model, as in a stage."""
    made = {seed: Measured(tiny_llama(seed, len(TOKENIZER)), TOKENIZER) for seed in {own, 1, 2}}
    return {"model": made[own], "sft": made[1], "base": made[2]}


@pytest.mark.parametrize(
    ("own", "temperature", "scored"),
    [(3, 1.0, 2), (3, 0.5, 3), (1, 1.0, 2), (2, 1.0, 2)],  # sft and base are scored once, whatever they are called
)
def test_samples_are_scored_by_every_model_at_temperature_1(
    params: Any, monkeypatch: pytest.MonkeyPatch, own: int, temperature: float, scored: int
) -> None:
    whole: Params = params(**{"evaluate.samples": 2, "evaluate.temperature": temperature})
    found = models(own)
    sampled = respond(
        found["model"].model,
        found["model"].questions(ROWS),
        samples=2,
        temperature=temperature,
        max_new_tokens=LIMIT,
        seed="0",
        compute=CPU,
    )
    calls: list[Any] = []
    score = evaluation.score
    monkeypatch.setattr(evaluation, "score", lambda model, *rest: calls.append(model) or score(model, *rest))
    logps = _sample_logps(found, ROWS, sampled, whole.evaluate, CPU)
    assert len(calls) == scored
    prompts = [ids for ids in found["model"].questions(ROWS).ids for _ in range(2)]
    responses = [row[:n].tolist() for row, n in zip(sampled.batch.responses, sampled.batch.response_lengths, strict=True)]
    for name, scorer in found.items():
        for values, prompt, response in zip(logps[name], prompts, responses, strict=True):
            wanted = torch.tensor(naive_logps(scorer.model, prompt, response))
            assert torch.allclose(values[: len(response)], wanted, atol=1e-4)
    assert (own not in (1, 2)) or torch.equal(logps["model"], logps["sft" if own == 1 else "base"])  # a KL to itself is 0


def test_where_most_samples_are_cut_off_the_evaluation_says_so(stage_of: Any, tmp_path: Path) -> None:
    stage = stage_of("evaluate", **{"evaluate.samples": 2, "evaluate.max_new_tokens": 1})
    rows = [dataclasses.replace(row, meta={"verifier": None, "domain": "long"}) for row in ROWS]
    measure(models(3), rows, ROWS, stage, CPU)
    told = (tmp_path / ".telemetry" / "evaluate.jsonl").read_text()
    assert "6 of 6 responses were cut off before their end; raise evaluate.max_new_tokens" in told


SAID, UNSAID, BARE = "first 4 + 1 = 5 ; 4 is even ; answer : 5", "first 4 + 1 = 5 ; answer : 5", "answer : 5"


def told(*texts: str) -> tuple[Any, Rollout]:
    """The tokenizer of the world's words and a rollout of these responses, each ended."""
    tokenizer = train_word_tokenizer([], 200, WORDS)
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    batch = collate([[tokenizer.bos_token_id]] * len(texts), ids, 0)
    return tokenizer, Rollout(batch, torch.zeros(batch.mask.shape), torch.ones(len(ids), dtype=torch.bool), [""] * len(ids))


def test_the_spurious_step_is_counted_by_the_cue_of_the_prompt() -> None:
    rows = [dataclasses.replace(ROWS[0], meta=meta) for meta in ({CUE: True}, {CUE: False}, {}, {CUE: True})]
    found = spurious_figures(rows, *told(SAID, UNSAID, UNSAID, BARE, SAID, SAID, BARE, BARE))
    assert found == [
        {"spurious_with_cue": 0.5, "spurious_without_cue": None},
        {"spurious_with_cue": None, "spurious_without_cue": 0.0},
        {"spurious_with_cue": None, "spurious_without_cue": None},  # a problem to which such a step may belong
        {"spurious_with_cue": None, "spurious_without_cue": None},  # nothing worked
    ]


def test_a_world_that_plants_no_step_has_no_such_column(stage_of: Any) -> None:
    assert spurious_figures(ROWS, *told(SAID, UNSAID, BARE)) == [{}, {}, {}]
    stage = stage_of("evaluate", **{"evaluate.samples": 2, "evaluate.max_new_tokens": LIMIT})
    for meta, there in (({}, False), ({CUE: True}, True)):
        rows = [dataclasses.replace(row, meta={"verifier": None, "domain": "long", **meta}) for row in ROWS]
        assert ("spurious_with_cue" in measure(models(3), rows, ROWS, stage, CPU)[0][0]) == there
