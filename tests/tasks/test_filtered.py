"""Fine-tuning on a selection of the candidates: which rows each rule takes, and what it says when it takes none."""

import itertools
import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from apprentice.demonstrations import demonstration, prompt_id
from apprentice.policy import decode_responses, load_policy, load_tokenizer
from apprentice.sampling import Request, sample
from apprentice.tokens import encode_prompt
from tasks import fine_tuning, preferring, sft_sample_rank
from tasks.answers import check_of
from tasks.candidates import by_prompt, prompt_groups, scores
from tasks.filtered import filtered_stage
from tasks.stage import Stage, StageError
from tests.apprentice.toys import hash_of
from tests.tables import candidates, speaker, words, write_answers, write_candidates, write_model, write_table

StageOf = Callable[..., Stage]
INF = float("inf")
FIRST = candidates("p", ("a", 1.0), ("b", 5.0), ("c", 9.0, False), ("d", 4.5), ("e", 5.0))
SECOND = candidates("q", ("f", -3.0), ("g", -1.0), ("h", -2.0), ("i", -1.2))


@pytest.fixture
def rows_of(stage_of: StageOf, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str]]]:
    """Prompt and response of the rows that a stage fine-tunes on, in their order."""
    taken: list[Any] = []

    def keep(stage: Stage, rows: list[Any], *, init: str) -> None:
        taken.append((stage.name, init))
        taken.extend(rows)

    monkeypatch.setattr(fine_tuning, "fine_tune_stage", keep)

    def run(
        name: str, *groups: list[dict[str, Any]], answers: dict[str, str] | None = None, rescored: Any = (), **changes: Any
    ) -> list[Any]:
        taken.clear()
        stage = stage_of(name, **{f"{name}.{entry}": value for entry, value in changes.items()})
        write_candidates(stage.data, *groups)
        write_candidates(stage.data, rescored, source="rescored")
        if answers is not None:
            write_answers(stage.data, answers)
        filtered_stage(stage, None if answers is None else check_of(stage))
        assert taken[0] == (name, changes.get("init", "sft"))
        assert all(row.source == name for row in taken[1:])
        return [(row.prompt, row.response) for row in taken[1:]]

    return run


def test_candidates_come_prompt_by_prompt(stage_of: StageOf) -> None:
    stage = stage_of("raft")
    write_candidates(stage.data, FIRST, SECOND)
    write_candidates(stage.data, SECOND, source="rescored")
    assert prompt_groups(stage, "pairs") == [FIRST, SECOND] == by_prompt(FIRST + SECOND)
    assert prompt_groups(stage, "rescored") == [SECOND]
    assert by_prompt([]) == []


def test_what_was_cut_off_may_not_be_taken() -> None:
    assert scores(FIRST) == [1.0, 5.0, -INF, 4.5, 5.0]


def test_raft_takes_the_best_of_each_prompt(rows_of: Any) -> None:
    assert rows_of("raft", FIRST, SECOND) == [("p", "b"), ("q", "g")]


def test_the_top_share_of_each_prompt(rows_of: Any) -> None:
    # of five candidates 0.4 are two, and the one cut off counts among the five; of four 0.4 are two, rounded up
    assert rows_of("self_rft", FIRST, SECOND, level=0.4) == [("p", "b"), ("p", "e"), ("q", "g"), ("q", "i")]
    assert rows_of("self_rft", FIRST, SECOND, level=0.2) == [("p", "b"), ("q", "g")]
    assert len(rows_of("self_rft", FIRST, SECOND, level=1.0)) == 8


def test_rest_takes_what_is_above_the_level_of_its_own_prompt(rows_of: Any) -> None:
    # p: 1, 5, 4.5, 5 become 0, 1, 0.875, 1; q: -3, -1, -2, -1.2 become 0, 1, 0.5, 0.9
    assert rows_of("rest", FIRST, SECOND, level=0.88) == [("p", "b"), ("p", "e"), ("q", "g"), ("q", "i")]
    assert rows_of("rest", FIRST, SECOND, level=0.5)[1] == ("p", "d")


def test_rft_takes_what_is_right_and_ended(rows_of: Any) -> None:
    groups = (
        candidates("p", ("x", 0.0), ("y", 9.0), ("x", 0.0, False), ("x", -1.0)),
        candidates("q", ("x", 0.0), ("y", 0.0)),
        candidates("unknown", ("x", 0.0)),
    )
    for name in ("rft", "rft_long"):
        assert rows_of(name, *groups, answers={"p": "x", "q": "y"}) == [("p", "x"), ("p", "x"), ("q", "y")]


@pytest.mark.parametrize(("name", "changes"), [("raft", {}), ("rest", {"level": 0.9}), ("self_rft", {"level": 0.2})])
def test_the_reward_is_that_of_the_candidates_named(rows_of: Any, name: str, changes: dict) -> None:
    other = [{**row, "reward": -row["reward"]} for row in SECOND]
    found = [rows_of(name, SECOND, rescored=other, candidates=source, **changes) for source in ("pairs", "rescored")]
    assert found == [[("q", "g")], [("q", "f")]]


def test_pairs_of_any_candidates_go_by_the_reward_named(stage_of: StageOf, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(preferring, "prefer_stage", lambda stage, rows, figures: made.append(rows))
    for source in ("pairs", "rescored"):
        stage = stage_of("sft_sample_rank", **{"sft_sample_rank.candidates": source})
        write_candidates(stage.data, candidates("q", ("f", 1.0), ("g", 2.0)))
        write_candidates(stage.data, candidates("q", ("f", 2.0), ("g", 1.0)), source="rescored")
        sft_sample_rank.main(stage)
    assert [[(row["chosen"], row["rejected"]) for row in rows] for rows in made] == [[("g", "f")], [("f", "g")]]


def test_I7_with_a_sampler_that_is_always_right_rft_is_fine_tuning_on_its_samples(stage_of: StageOf) -> None:
    # whatever the model says to a prompt is the answer there
    prompts = [f"{' '.join(before)} q" for before in itertools.product("pxyq", repeat=2)]
    requests = [Request(encode_prompt(words(), prompt), prompt_id(prompt)) for prompt in prompts]
    drawn = sample(speaker(), requests, seed="0", end=words().eos_token_id, max_new_tokens=20)
    said = dict(zip(prompts, decode_responses(words(), drawn.response_ids()), strict=True))
    assert bool(drawn.ended.all()) and {"x", "y"} < set(said.values())
    groups = [candidates(prompt, (text, -float(i))) for i, (prompt, text) in enumerate(said.items())]  # rewards play no part
    hashes = []
    for rows in (None, [demonstration(prompt, text, "rft") for prompt, text in said.items()]):
        stage = stage_of("rft", **{"compute.device": "cpu", "rft.batch_size": 4, "rft.learning_rate": 0.01})
        stage.__dict__["key"] = "0123"  # without a DVC project there is none to compute
        shutil.rmtree(stage.data, ignore_errors=True)
        write_model(stage.data, "sft", speaker())
        write_table(stage.data, "validation", ("q", "x"))
        write_candidates(stage.data, *groups)
        write_answers(stage.data, said)
        if rows is None:
            filtered_stage(stage, check_of(stage))
        else:
            fine_tuning.fine_tune_stage(stage, rows, init="sft")
        hashes.append(hash_of(load_policy(stage.data / "models" / "rft")))
    assert hashes[0] == hashes[1] != hash_of(speaker())


def test_the_start_is_an_entry(rows_of: Any) -> None:
    assert rows_of("raft", SECOND, init="base") == [("q", "g")]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("self_rft", {"level": 0.0}, r"self_rft: no candidate was kept \(top_share, level 0.0\); raise self_rft.level"),
        ("rest", {"level": 1.0}, "lower rest.level"),
        ("raft", {}, "raise pairs.max_new_tokens"),
        ("rft", {}, "so that some are right"),
    ],
)
def test_when_nothing_is_kept_the_stage_says_what_to_change(rows_of: Any, name: str, changes: dict, said: str) -> None:
    cut = candidates("p", ("a", 1.0, False), ("b", 2.0, False))
    answers = {"q": "never"} if name == "rft" else None
    with pytest.raises(StageError, match=said):
        rows_of(name, cut if name == "raft" else SECOND, answers=answers, **changes)


def test_only_the_verified_stages_may_use_the_verifier(rows_of: Any) -> None:
    with pytest.raises(StageError, match=r"raft.keep: 'verified' does not belong to this stage"):
        rows_of("raft", SECOND, keep="verified")
    with pytest.raises(StageError, match=r"rft.keep: 'best' does not belong to this stage"):
        rows_of("rft", SECOND, answers={"q": "g"}, keep="best")


def test_a_model_is_trained_on_the_selection_and_nothing_else(stage_of: StageOf) -> None:
    # the candidates say y after q; the rest of the folder says x
    stage = stage_of("raft", **{"raft.learning_rate": 0.05, "raft.epochs": 5, "compute.device": "cpu"})
    stage.__dict__["key"] = "0123"  # without a DVC project there is none to compute
    write_model(stage.data, "sft", speaker())
    write_table(stage.data, "validation", ("q", "x"))
    write_candidates(stage.data, *(candidates(f"{i} q", ("y", 2.0), ("x", 1.0)) for i in "pxyq"))
    filtered_stage(stage)
    folder = stage.data / "models" / "raft"
    model, vocabulary = load_policy(folder), load_tokenizer(folder).get_vocab()
    assert hash_of(model) != hash_of(speaker())
    with torch.no_grad():
        chances = model(torch.tensor([[vocabulary["q"]]])).logits[0, -1].softmax(-1)
    assert float(chances[vocabulary["y"]]) > 0.6 > 0.4 > float(chances[vocabulary["x"]])
    metrics = json.loads((stage.reports / "metrics.json").read_text())
    assert (metrics["rows"], metrics["epoch"]) == (4, 5)
