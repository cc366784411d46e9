"""From scored candidates to pairs: by hand on a few candidates."""

import dataclasses
from typing import Any

import pytest

from apprentice.demonstrations import demonstration
from tasks.pairing import choose_pairs, pick_prompts
from tasks.stage import StageError, read_params

CONFIG = dataclasses.replace(read_params().pairs, candidates=4, accepted=2, beta=0.0, pairing="first_round")


def warn(message: str) -> None:
    pytest.fail(message)


def candidates(*rows: tuple[str, float, bool], prompt: str = "p") -> list[list[dict[str, Any]]]:
    return [
        [
            {"prompt": prompt, "prompt_id": prompt, "response": text, "reward": reward, "ended": ended}
            for text, reward, ended in rows
        ]
    ]


def test_the_best_two_make_one_pair_at_beta_zero() -> None:
    pairs, figures = choose_pairs(
        candidates(("a", 1.0, True), ("b", 3.0, True), ("c", 2.0, True), ("d", 0.0, True)), CONFIG, 0, warn
    )
    assert pairs == [{"prompt": "p", "chosen": "b", "rejected": "c", "chosen_score": 3.0, "rejected_score": 2.0}]
    assert figures["gap_to_top_k"] == 0 and figures["accepted_reward"] == 2.5 and figures["margin"] == 1.0


def test_unfinished_candidates_are_left_out_and_counted() -> None:
    pairs, figures = choose_pairs(
        candidates(("a", 1.0, True), ("b", 9.0, False), ("c", 2.0, True), ("d", 0.0, True)), CONFIG, 0, warn
    )
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == ("c", "a")
    assert figures["candidates_unfinished"] == 1 and figures["prompts_short"] == 0


def test_identical_texts_make_no_pair() -> None:
    same = candidates(("a", 3.0, True), ("a", 3.0, True), ("c", 0.0, True), ("d", 0.0, True))
    other = candidates(("x", 3.0, True), ("y", 2.0, True), ("c", 0.0, True), ("d", 0.0, True), prompt="q")
    pairs, figures = choose_pairs(same + other, CONFIG, 0, warn)
    assert len(pairs) == 1 and pairs[0]["chosen"] == "x" and figures["pairs_dropped_identical"] == 1


def test_no_pair_at_all_stops_with_advice() -> None:
    with pytest.raises(StageError, match=r"no pair survived: 0 candidates accepted.*4 of 4.*max_new_tokens"):
        choose_pairs(candidates(*[("a", 1.0, False)] * 4), CONFIG, 0, warn)


def test_a_short_pool_says_so() -> None:
    rows = candidates(("a", 1.0, True), *[("b", 1.0, False)] * 3)
    other = candidates(("x", 3.0, True), ("y", 2.0, True), ("c", 0.0, True), ("d", 0.0, True), prompt="q")
    _, figures = choose_pairs(rows + other, CONFIG, 0, warn)
    assert figures["prompts_short"] == 1 and figures["pairs"] == 1


def test_the_gap_to_the_top_grows_with_beta() -> None:
    rows = [row for i in range(50) for row in candidates(*[(f"{j}", float(j), True) for j in range(4)], prompt=f"p{i}")]
    configs = [dataclasses.replace(CONFIG, beta=beta) for beta in (0.0, 0.3, 3.0, 100.0)]
    gaps = [choose_pairs(rows, config, 0, warn)[1]["gap_to_top_k"] for config in configs]
    assert gaps[0] == 0 and gaps == sorted(gaps)
    # beta large: any two of {0, 1, 2, 3} are as likely, mean 1.5 against the top two's 2.5; sd 0.11, z = 3.6
    assert abs(gaps[-1] - 1.0) < 0.4


def test_more_prompts_keep_those_already_chosen() -> None:
    pool = [demonstration(f"prompt {i}", None, "t") for i in range(50)]
    few, many = pick_prompts(pool, 10, 0), pick_prompts(pool, 20, 0)
    assert many[:10] == few and pick_prompts(pool[::-1], 10, 0) == few
    assert pick_prompts(pool, 10, 1) != few


def test_where_rejection_accepts_the_best_alone_a_warning_says_so() -> None:
    rows = [row for i in range(9) for row in candidates(*[(f"{j}", float(j), True) for j in range(4)], prompt=f"p{i}")]
    rows[0][3]["ended"] = False  # 2 is the best there
    said: list[str] = []
    for beta in (0.0, 0.01, 3.0):  # asked for; exp(-100) is never drawn; exp(-1/3) is
        choose_pairs(rows, dataclasses.replace(CONFIG, beta=beta), 0, said.append)
    assert said == [
        "of 26 candidates below their prompt's best the first round accepted none: at pairs.beta 0.01 rejection takes the best "
        "ones only; raise it"
    ]
    choose_pairs(rows, dataclasses.replace(CONFIG, beta=0.01, source="sft_sample_rank"), 0, warn)  # takes any


def test_where_all_rewards_are_equal_rejection_is_not_blamed() -> None:
    said: list[str] = []
    equal = candidates(*[(f"{j}", 1.0, True) for j in range(4)])
    pairs, _ = choose_pairs(equal, dataclasses.replace(CONFIG, beta=0.01), 0, said.append)
    assert len(pairs) == 1 and said == []
