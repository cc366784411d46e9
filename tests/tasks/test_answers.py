"""The answers of training prompts, and the verdicts by them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from apprentice.demonstrations import prompt_id, write_jsonl
from tasks.answers import check_of, verifier_name
from tasks.stage import Stage, StageError, write_json
from tests.tables import write_answers


def test_a_response_is_right_wrong_or_without_an_answer(stage_of: Callable[..., Stage], tmp_path: Path) -> None:
    write_answers(tmp_path / "data", {"p": "x", "q": "y y"})
    check = check_of(stage_of("rft"))
    assert [check(prompt_id("p"), text) for text in ("x", " x ", "y", "")] == [True, True, False, False]
    assert check(prompt_id("q"), "y y") is True
    assert check(prompt_id("q"), "x") is False  # the answer of its own prompt
    assert check(prompt_id("unknown"), "x") is None


def test_each_row_is_checked_by_its_own_verifier(stage_of: Callable[..., Stage], tmp_path: Path) -> None:
    rows = [{"prompt_id": "a", "verifier": "world", "answer": "7"}, {"prompt_id": "b", "verifier": "gsm8k", "answer": "7"}]
    write_jsonl(tmp_path / "data" / "clean" / "answers.jsonl", rows)
    check = check_of(stage_of("rft"))
    assert [check("a", text) for text in ("answer : 7", "#### 7", "7")] == [True, False, False]
    assert [check("b", text) for text in ("answer : 7", "#### 7.0", "7")] == [False, True, False]


def test_without_any_answer_the_stage_stops_with_advice(stage_of: Callable[..., Stage], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "clean" / "answers.jsonl", [])
    with pytest.raises(StageError, match=r"rft_long: data/clean/answers.jsonl is empty.*ingest.verifier"):
        check_of(stage_of("rft_long"))


@pytest.mark.parametrize(("written", "found"), [("gsm8k", "gsm8k"), ("world", "world"), ("none", None)])
def test_the_verifier_is_the_one_ingest_chose(
    stage_of: Callable[..., Stage], tmp_path: Path, written: str, found: str | None
) -> None:
    write_json(tmp_path / "data" / "reports" / "ingest" / "metrics.json", {"verifier": written, "rows_read": 3})
    assert verifier_name(stage_of("target")) == found
