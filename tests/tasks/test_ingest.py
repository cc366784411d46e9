"""`ingest`: every shape and format of source, every reason to reject, and the splits."""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from apprentice.config import Params, parse
from apprentice.demonstrations import prompt_id, read_demonstrations, read_jsonl, split_of
from tasks import ingest
from tasks.cleaning import Cleaned, add_answers, answer_rows, choose_verifier, clean, split_tables
from tasks.sources import Raw, read_source, recognise
from tasks.stage import Stage, StageError

ROOT = Path(__file__).parents[2]
StageOf = Callable[..., Stage]
ParamsOf = Callable[..., Params]
SHIPPED = parse(yaml.safe_load((ROOT / "params.yaml").read_text())).ingest
COMMIT = "cc7b047b6e5bb11b4f1af84efc572db110a51b3c"
PAIR = {"prompt": "What is 2 + 2?", "response": "4"}


def cleaned(params: ParamsOf, *rows: Any, **changes: Any) -> Cleaned:
    """Rows of prompt and response through the cleaning; anything but a dict is an unreadable line."""
    raws = [Raw(n, row, None if isinstance(row, dict) else "broken") for n, row in enumerate(rows, 1)]
    return clean(raws, lambda row: row, params(**changes).ingest, "file.jsonl")


def source_of(tmp_path: Path, text: str | bytes, kind: str = "jsonl") -> dict[str, Any]:
    """Write a source file and give the params entries that name it."""
    path = tmp_path / f"source.{kind}"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return {"ingest.source.kind": kind, "ingest.source.path": path.name}


def run_ingest(stage: Stage) -> dict[str, Any]:
    """Run the stage and read what it counted."""
    ingest.main(stage)
    return json.loads((stage.reports / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "unreadable: broken"),
        ({"response": "4"}, "missing prompt"),
        ({**PAIR, "prompt": " \n"}, "empty prompt"),
        ({**PAIR, "prompt": []}, "empty prompt"),
        ({**PAIR, "prompt": 3}, "wrong type: prompt is int, not text"),
        ({**PAIR, "prompt": ["hi"]}, "wrong type: prompt holds a message whose role is none of system, user, assistant"),
        ({**PAIR, "prompt": [{"role": "user", "content": None}]}, "missing prompt"),
        ({**PAIR, "response": ""}, "empty response"),
        ({**PAIR, "response": "\t\u00a0\r\n"}, "empty response"),
        ({**PAIR, "response": 4}, "wrong type: response is int, not text"),
        ({**PAIR, "response": {"text": "4"}}, "wrong type: response is dict, not text"),
        ({**PAIR, "response": "a\x07b"}, "control characters: U+0007 in response at 1"),
        ({**PAIR, "response": "a\x85b"}, "control characters: U+0085 in response at 1"),
        ({**PAIR, "response": "a\ud800"}, "control characters: U+D800 in response at 1"),
        ({**PAIR, "response": "caf\ufffd"}, "control characters: U+FFFD in response at 3"),
        ({**PAIR, "response": "?!"}, "no words: response has neither letter nor digit"),
        ({**PAIR, "response": "x" * 31}, "too long: response of 31 characters"),
        ({**PAIR, "prompt": "x" * 31}, "too long: prompt of 31 characters"),
        ({**PAIR, "quality": 5}, "wrong type: quality is int, not text"),
        ({**PAIR, "answer": ["4"]}, "wrong type: answer is list, not text"),
    ],
)
def test_reasons_to_reject(params: ParamsOf, row: Any, reason: str) -> None:
    result = cleaned(params, PAIR, row, **{"ingest.max_characters": 30})
    assert [row.response for row in result.rows] == ["4"]
    assert result.rejected == [{"line": 2, "reason": reason}]


def test_what_is_kept_and_how_it_is_written(params: ParamsOf) -> None:
    chat = [{"role": "user", "content": " hi "}]
    system = [{"role": "system", "content": "be brief"}, *chat]
    rows = cleaned(
        params,
        {"prompt": " a\r\nb ", "response": "c\td", "answer": 4, "quality": "poor", "source": "book"},
        {"prompt": chat, "response": [{"role": "assistant", "content": "hello"}]},
        {"prompt": system, "response": None},
        {"prompt": "x" * 30, "response": "y" * 30, "quality": " "},
        **{"ingest.max_characters": 30},
    ).rows
    assert [(row.prompt, row.response) for row in rows[:2]] == [("a\nb", "c\td"), ("hi", "hello")]
    assert (rows[0].answer, rows[0].quality, rows[0].source) == ("4", "poor", "book")
    assert rows[1].source == "file.jsonl:2"
    assert rows[2].prompt == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert rows[2].response is None
    assert rows[3].quality is None


def test_duplicates_and_other_responses_to_the_same_prompt(params: ParamsOf) -> None:
    rows = [PAIR, {**PAIR, "response": "four"}, {**PAIR, "prompt": "What is 2 + 2? "}, {**PAIR, "response": None}]
    kept = cleaned(params, *rows)
    assert [row.response for row in kept.rows] == ["4", "four", None]
    assert kept.reasons() == {"exact duplicate": 1}
    first = cleaned(params, *rows, **{"ingest.same_prompt": "first"})
    assert [row.response for row in first.rows] == ["4", None]
    assert [row["line"] for row in first.rejected] == [2, 3]
    assert first.reasons() == {"exact duplicate": 1, "prompt seen before with another response": 1}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (72.0, "72"),
        (72, "72"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        (1e23, "1" + "0" * 23),
        (10**400, "1" + "0" * 400),
        (Decimal("72.50"), "72.5"),
    ],
)
def test_a_number_as_answer_keeps_its_digits(params: ParamsOf, value: Any, text: str) -> None:
    assert [row.answer for row in cleaned(params, {**PAIR, "answer": value}).rows] == [text]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_answer_that_is_no_number_is_rejected(params: ParamsOf, value: float) -> None:
    result = cleaned(params, {**PAIR, "answer": value})
    assert [row["reason"] for row in result.rejected] == [f"not finite: answer is {value}"] and not result.kept


def test_which_of_two_equal_pairs_holds_does_not_depend_on_their_order(params: ParamsOf) -> None:
    rows = [PAIR, {**PAIR, "quality": "poor"}, {**PAIR, "answer": "4"}, {**PAIR, "answer": 4.0, "quality": "poor"}]
    for order in itertools.permutations(rows):
        result = cleaned(params, *order)
        assert [(line, row.quality, row.answer) for line, row in result.kept] == [(1, "poor", "4")]
        assert [(row["line"], row["reason"]) for row in result.rejected] == [(n, "exact duplicate") for n in (2, 3, 4)]
    lone, wrong = {"prompt": "lone", "response": "yes"}, {**PAIR, "quality": "expert"}
    for order in itertools.permutations([*rows[:2], wrong, lone]):
        result = cleaned(params, *order)
        assert [row.prompt for row in result.rows] == ["lone"]
        one, other = (order.index(row) + 1 for row in sorted((rows[1], wrong), key=order.index))
        reason = f"conflicting duplicates: the same prompt and response in lines {one} and {other}, and another quality"
        assert [row["reason"] for row in result.rejected] == [reason] * 3
        assert [row["line"] for row in result.rejected] == [n for n in (1, 2, 3, 4) if order[n - 1] != lone]
    answers = cleaned(params, {**PAIR, "answer": "4"}, {**PAIR, "answer": "5"}, PAIR)
    assert not answers.kept and answers.reasons() == {"conflicting duplicates": 3}


words = st.text("ab \n\x00?", max_size=4)
values = st.one_of(st.none(), words, st.integers(), st.lists(words, max_size=1))
qualities = st.sampled_from([None, "expert", "mixed", "poor", "superb"])
raw_row = st.fixed_dictionaries({"prompt": values, "response": values, "quality": qualities})
raw_rows = st.lists(st.one_of(st.text(max_size=2), raw_row), max_size=30)


@given(rows=raw_rows, first=st.booleans())
def test_every_row_is_kept_or_rejected_once(rows: list[Any], first: bool) -> None:
    config = dataclasses.replace(SHIPPED, same_prompt="first" if first else "keep")
    raws = [Raw(n, row, None if isinstance(row, dict) else "broken") for n, row in enumerate(rows, 1)]
    result = clean(raws, lambda row: row, config, "file")
    lines = [line for line, _ in result.kept] + [row["line"] for row in result.rejected]
    assert sorted(lines) == list(range(1, len(rows) + 1))
    assert sum(result.reasons().values()) == len(result.rejected)
    assert len({row.id for row in result.rows}) == len(result.rows)
    for row in result.rows:
        for text in (row.prompt, row.response):
            assert text is None or (text == str(text).strip() and any(map(str.isalnum, text)) and "\x00" not in text)
    tables = split_tables(result.rows, config, None)
    held_out = {str(row.prompt) for name in ("validation", "evaluation", "unused") for row in tables[name]}
    assert not held_out & {str(row.prompt) for name in ("demonstrations", "suboptimal", "prompts") for row in tables[name]}
    once = ("demonstrations", "validation", "evaluation", "suboptimal", "unused")
    placed = len(result.rows) - sum(len(tables[name]) for name in once)
    assert placed == sum(row.response is None and str(row.prompt) not in held_out for row in result.rows)
    assert all((row.quality in ("mixed", "poor")) == (name == "suboptimal") for name in once[:-1] for row in tables[name])


@given(st.lists(st.text("abc", min_size=1), unique=True, max_size=40), st.integers(0, 40))
def test_adding_rows_moves_no_other_row(prompts: list[str], count: int) -> None:
    raws = [Raw(n, {"prompt": prompt, "response": "x"}) for n, prompt in enumerate(prompts, 1)]
    before, after = (
        split_tables(clean(part, lambda row: row, SHIPPED, "file").rows, SHIPPED, None) for part in (raws[:count], raws)
    )
    for name, rows in before.items():
        assert after[name][: len(rows)] == rows


def test_pool_holds_each_train_prompt_once_and_no_answer(params: ParamsOf) -> None:
    prompts = [f"question {n}" for n in range(60)]
    rows = [{"prompt": p, "response": r, "answer": "1"} for p in prompts for r in ("one", "two")]
    result = cleaned(params, *rows, *({"prompt": p} for p in prompts), {"prompt": "lone 1"}, {"prompt": "lone 2"})
    tables = split_tables(result.rows, params().ingest, "exact")
    trained = [p for p in [*prompts, "lone 1", "lone 2"] if split_of(p, 0.1, 0.2) == "train"]
    assert [row.prompt for row in tables["prompts"]] == trained
    assert all(row.response is None and row.answer is None for row in tables["prompts"])
    assert {row.meta["verifier"] for row in tables["evaluation"]} == {"exact"}
    assert {row.meta["domain"] for row in tables["evaluation"]} == {"in_domain"}


def test_verifier_is_recognised_and_gives_answers(params: ParamsOf) -> None:
    worked = [{"prompt": f"q{n}", "response": f"worked\n#### 1,00{n}"} for n in range(3)]
    result = cleaned(params, *worked)
    assert choose_verifier(result.rows, "auto") == "gsm8k"
    assert choose_verifier(result.rows, "none") is None
    assert [row.answer for row in add_answers(result, "gsm8k").rows] == ["1000", "1001", "1002"]
    mixed = cleaned(params, {"prompt": "p", "response": "no number"}, *worked, {"prompt": "last", "response": " "})
    assert choose_verifier(mixed.rows, "auto") is None
    answered = add_answers(mixed, "gsm8k")
    assert [(row["line"], row["reason"]) for row in answered.rejected] == [
        (1, "no answer: the verifier gsm8k finds none"),
        (5, "empty response"),
    ]
    own = cleaned(params, {"prompt": "p", "response": "so #### 7", "answer": "$7.0"})
    assert add_answers(own, "gsm8k").rows[0].answer == "7"
    assert add_answers(own, "exact").rows[0].answer == "$7.0"


def test_suboptimal_rows_train_apart_and_measure_nothing(params: ParamsOf) -> None:
    prompts = [f"question {n}" for n in range(60)]
    levels = [None, "expert", "mixed", "poor"]
    rows = [{"prompt": p, "response": f"as {level}", "quality": level} for p in prompts for level in levels]
    result = cleaned(params, *rows, {"prompt": "lone 1", "response": "as poor", "quality": "poor"})
    tables = split_tables(result.rows, params().ingest, None)
    split = {p: split_of(p, 0.1, 0.2) for p in [*prompts, "lone 1"]}
    train = [p for p in split if split[p] == "train"]
    assert split["lone 1"] == "train" and 0 < len(train) < 61

    def placed(name: str) -> list[tuple[Any, str | None]]:
        return [(row.prompt, row.quality) for row in tables[name]]

    assert placed("demonstrations") == [(p, level) for p in train[:-1] for level in (None, "expert")]
    assert placed("suboptimal") == [(p, level) for p in train[:-1] for level in ("mixed", "poor")] + [("lone 1", "poor")]
    for name in ("validation", "evaluation"):
        assert placed(name) == [(p, level) for p in prompts if split[p] == name for level in (None, "expert")]
    assert placed("unused") == [(p, level) for p in prompts if split[p] != "train" for level in ("mixed", "poor")]
    assert [row.prompt for row in tables["prompts"]] == train


def test_answers_are_known_once_a_prompt_and_by_no_suboptimal_response(params: ParamsOf) -> None:
    (train, *more), held_out = (
        [p for p in (f"question {n}" for n in range(60)) if (split_of(p, 0.1, 0.2) == "train") == wanted]
        for wanted in (True, False)
    )
    rows = [
        {"prompt": more[0], "response": "wrong #### 5", "quality": "poor"},
        {"prompt": more[0], "response": "no number", "quality": "mixed"},
        {"prompt": more[1], "response": "wrong #### 5", "answer": "1,006", "quality": "poor"},
        {"prompt": more[2], "answer": 7},
        {"prompt": more[3]},
        *({"prompt": train, "response": f"{n} #### {n}"} for n in (1, 2, 3)),
        {"prompt": more[4], "response": "so #### 4"},
        {"prompt": more[4], "response": "or #### 4.0"},
        *({"prompt": p, "response": "so #### 8", "quality": "expert"} for p in held_out),
        {"prompt": more[5], "response": "so #### 9", "answer": "nine", "quality": "poor"},
    ]
    result = cleaned(params, *rows)
    assert choose_verifier(result.rows, "auto") == "gsm8k"
    answered = add_answers(result, "gsm8k")
    assert [(row["line"], row["reason"]) for row in answered.rejected] == [
        (len(rows), "no answer: the verifier gsm8k finds none")
    ]
    assert [row.answer for row in answered.rows[:3]] == [None, None, "1006"]
    known = split_tables(answered.rows, params().ingest, "gsm8k")["known"]
    found, disputed = answer_rows(known, "gsm8k")
    wanted = {more[1]: "1006", more[2]: "7", train: "1", more[4]: "4"}
    assert found == [{"prompt_id": prompt_id(p), "answer": answer, "verifier": "gsm8k"} for p, answer in wanted.items()]
    assert disputed == 1
    assert answer_rows(known, "none") == ([], 0)


@pytest.mark.parametrize(
    ("row", "shape", "prompt", "response"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}, "messages", "hi", "yo"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages", "hi", None),
        ({"prompt": "hi", "completion": "yo"}, "prompt/completion", "hi", "yo"),
        ({"prompt": "hi", "response": "yo"}, "prompt/response", "hi", "yo"),
        ({"instruction": "hi", "input": "", "output": "yo"}, "alpaca", "hi", "yo"),
        ({"instruction": "hi", "input": "you", "output": "yo"}, "alpaca", "hi\n\nyou", "yo"),
        ({"question": "hi", "answer": "yo"}, "question/answer", "hi", "yo"),
    ],
)
def test_shapes(params: ParamsOf, row: dict[str, Any], shape: str, prompt: str, response: str | None) -> None:
    raws = [Raw(1, row), Raw(2, {"other": 1}), Raw(3, "{", "broken")]
    found = recognise(raws, {})
    result = clean(raws, found.read, params().ingest, "file")
    assert found.name == shape
    assert [(row.prompt, row.response) for row in result.rows] == [(prompt, response)]
    assert len(result.rejected) == 2


def test_fields_override_the_shape(params: ParamsOf) -> None:
    raws = [Raw(1, {"ask": "hi", "say": "yo", "level": "poor"})]
    fields = {"prompt": "ask", "response": "say", "quality": "level"}
    (row,) = clean(raws, recognise(raws, fields).read, params().ingest, "file").rows
    assert (row.prompt, row.response, row.quality) == ("hi", "yo", "poor")
    raws = [Raw(1, {"question": "hi", "answer": "yo", "final": 3})]
    (row,) = clean(raws, recognise(raws, {"answer": "final"}).read, params().ingest, "file").rows
    assert (row.prompt, row.response, row.answer) == ("hi", "yo", "3")


def test_unknown_columns_are_named() -> None:
    raws = [Raw(1, {"ask": "hi", "say": "yo"}), Raw(2, "{", "broken")]
    with pytest.raises(StageError, match=r"columns ask, say; known are messages; prompt \+ completion;.*ingest\.fields"):
        recognise(raws, {})
    with pytest.raises(StageError, match=r"ingest\.fields\.prompt: no column 'asks' in the source; its columns: ask, say"):
        recognise(raws, {"prompt": "asks", "response": "say"})


def test_unreadable_lines_keep_their_numbers(tmp_path: Path, params: ParamsOf) -> None:
    lines = [b'{"prompt": "a", "response": "b"}', b"", b'{"prompt": "a"', b"[1]", b'{"prompt": "\xff"}', b'{"x": NaN}']
    source = params(**source_of(tmp_path, b"\xef\xbb\xbf" + b"\n".join([*lines, b"[" * 100_000]))).ingest.source
    raws = list(read_source(source, tmp_path))
    assert [raw.line for raw in raws] == [1, 3, 4, 5, 6, 7]
    assert raws[0] == Raw(1, {"prompt": "a", "response": "b"})
    errors = [raw.error or "" for raw in raws[1:]]
    starts = [
        "not JSON, Expecting",
        "expected a JSON object, got list",
        "not UTF-8 at byte 12",
        "not JSON, NaN",
        "nested too deeply",
    ]
    assert all(error.startswith(start) for error, start in zip(errors, starts, strict=True)), errors


def test_csv_cells_are_text_and_rows_keep_their_lines(tmp_path: Path, params: ParamsOf) -> None:
    text = 'question,answer\n2+2,4\n"two\nlines",NA\nalone,\n1,2,3\nlast,007\n'
    raws = list(read_source(params(**source_of(tmp_path, text, "csv")).ingest.source, tmp_path))
    assert [raw.row for raw in raws if raw.error is None] == [
        {"question": "2+2", "answer": "4"},
        {"question": "two\nlines", "answer": "NA"},
        {"question": "alone", "answer": None},
        {"question": "last", "answer": "007"},
    ]
    assert [raw.line for raw in raws] == [2, 3, 5, 6, 7]
    assert raws[3].error == "3 cells under 2 columns"
    broken = params(**source_of(tmp_path, 'question,answer\na,b\nc,"never closed\nd,e\n', "csv")).ingest.source
    with pytest.raises(StageError, match=r"source\.csv: the CSV row that begins on line 3 is broken"):
        list(read_source(broken, tmp_path))


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("csv", '"a"b,c\n1,2\n', r"source\.csv: the CSV row that begins on line 1 is broken"),
        ("csv", '"prompt,response\n1,2\n', r"source\.csv: the CSV row that begins on line 1 is broken"),
        ("csv", "prompt,response,prompt\n1,2,3\n", r"source\.csv: expected each column once, got prompt more than once"),
        ("parquet", "no parquet", r"source\.parquet: expected a Parquet file, and it cannot be read as one"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_was_expected(
    tmp_path: Path, params: ParamsOf, kind: str, text: str, said: str
) -> None:
    with pytest.raises(StageError, match=said):
        list(read_source(params(**source_of(tmp_path, text, kind)).ingest.source, tmp_path))


def test_parquet(tmp_path: Path, params: ParamsOf) -> None:
    import pyarrow
    from pyarrow import parquet

    chat = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]]
    parquet.write_table(pyarrow.table({"messages": chat}), tmp_path / "chats.parquet")
    changes = {"ingest.source.kind": "parquet", "ingest.source.path": "chats.parquet"}
    raws = list(read_source(params(**changes).ingest.source, tmp_path))
    (row,) = clean(raws, recognise(raws, {}).read, params().ingest, "file").rows
    assert (row.prompt, row.response) == ("hi", "yo")


def test_hub_is_asked_for_the_pinned_revision(tmp_path: Path, params: ParamsOf, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((args, options))
        return [{"question": "hi", "answer": "yo"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    names = {"kind": "hub", "name": "openai/gsm8k", "subset": "main", "revision": COMMIT, "split": "test"}
    source = params(**{f"ingest.source.{key}": value for key, value in names.items()}).ingest.source
    assert list(read_source(source, tmp_path)) == [Raw(1, {"question": "hi", "answer": "yo"})]
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": COMMIT})]


def test_world_tables_are_written(stage_of: StageOf) -> None:
    sizes = {"demonstrations": 20, "validation": 8, "prompts": 40, "evaluation": 4, "suboptimal": 30, "preferences": 24}
    stage = stage_of("ingest", **{"ingest.world": {**sizes, "demonstrated": "all"}})
    figures = run_ingest(stage)
    canonical = (*ingest.TABLES, "suboptimal")
    tables = {name: read_demonstrations(stage.data / "clean" / f"{name}.jsonl") for name in canonical}
    preferences, answers = (read_jsonl(stage.data / "clean" / f"{name}.jsonl") for name in ("preferences", "answers"))
    known = {prompt_id(row.prompt) for name in ("demonstrations", "prompts", "suboptimal") for row in tables[name]}
    counts = {**{name: len(tables[name]) for name in canonical}, "preferences": len(preferences), "answers": len(answers)}
    assert counts == {**sizes, "evaluation": 60, "answers": len(known)}
    assert {name: figures[name] for name in counts} == counts
    assert (figures["shape"], figures["verifier"], figures["rows_rejected"]) == ("world", "world", 0)
    assert (figures["rows_read"], figures["answers_disputed"]) == (20 + 8 + 40 + 60 + 30, 0)
    assert (stage.data / "clean" / "rejected.jsonl").read_text() == ""
    assert {row["prompt_id"] for row in answers} == known and {row["verifier"] for row in answers} == {"world"}
    given = {row["prompt_id"]: row["answer"] for row in answers}
    for row in tables["demonstrations"] + tables["suboptimal"]:
        assert given[prompt_id(row.prompt)] == row.answer
    assert all(row.answer is None for row in tables["prompts"])
    assert set(preferences[0]) == {"id", "prompt", "chosen", "rejected", "source", "meta"}


def test_a_source_gives_the_same_tables_and_no_preferences(tmp_path: Path, stage_of: StageOf) -> None:
    prompts = [f"q{n}" for n in range(60)]
    rows = [
        {"prompt": p, "response": f"{r} #### {n % 7}", "quality": r} for n, p in enumerate(prompts) for r in ("expert", "poor")
    ]
    train = [n for n, p in enumerate(prompts) if split_of(p, 0.1, 0.2) == "train"]
    rows.append({"prompt": prompts[train[0]], "response": "but #### 9", "quality": "expert"})
    stage = stage_of("ingest", **source_of(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)))
    figures = run_ingest(stage)
    read = {name: read_jsonl(stage.data / "clean" / f"{name}.jsonl") for name in ("suboptimal", "preferences", "answers")}
    assert [row["prompt"] for row in read["suboptimal"]] == [prompts[n] for n in train]
    assert read["preferences"] == []
    assert [row["answer"] for row in read["answers"]] == [str(n % 7) for n in train]
    assert (figures["demonstrations"], figures["suboptimal"], figures["unused"]) == (
        len(train) + 1,
        len(train),
        60 - len(train),
    )
    assert (figures["answers"], figures["answers_disputed"], figures["verifier"]) == (len(train), 1, "gsm8k")


def test_world_obeys_the_verifier_entry(stage_of: StageOf) -> None:
    stage = stage_of("ingest", **{"ingest.verifier": "none"})
    figures = run_ingest(stage)
    assert (figures["verifier"], figures["answers"]) == ("none", 0)
    assert (stage.data / "clean" / "answers.jsonl").read_text() == ""
    assert {row.meta["verifier"] for row in read_demonstrations(stage.data / "clean" / "evaluation.jsonl")} == {None}
    with pytest.raises(StageError, match=r"ingest\.verifier"):
        run_ingest(stage_of("ingest", **{"ingest.verifier": "gsm8k"}))
    with pytest.raises(StageError, match="ran out of new 'weeks' problems"):
        run_ingest(stage_of("ingest", **{"ingest.world.evaluation": 200}))


def test_too_many_rejected_rows_stop_the_stage_after_writing_them(tmp_path: Path, stage_of: StageOf) -> None:
    rows = [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(40)]
    rows += [{"prompt": "q\ud800", "response": "a"}, {"prompt": "p", "response": " "}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    entries = source_of(tmp_path, lines)
    figures = run_ingest(stage_of("ingest", **entries))
    assert figures["rejected"] == {"control characters": 1, "empty response": 1}
    with pytest.raises(StageError, match=r"2 of 42 rows .*1 control characters, 1 empty response.*\(0\.01\)"):
        run_ingest(stage_of("ingest", **entries, **{"ingest.max_rejected_share": 0.01}))
    rejected = read_jsonl(tmp_path / "data" / "clean" / "rejected.jsonl")
    assert [(row["line"], row["row"]) for row in rejected] == [(41, rows[40]), (42, rows[41])]


def test_a_rejected_row_is_written_as_strict_json_cut_to_what_a_person_reads(tmp_path: Path, stage_of: StageOf) -> None:
    deep = "[" * 100 + "]" * 100
    lines = [json.dumps({"prompt": f"q{n}", "response": f"a{n}"}) for n in range(40)]
    lines += [f'{{"prompt": 1e999, "response": -1e999, "more": [1.5, {deep}]}}', json.dumps({"prompt": "q" * 30000})]
    run_ingest(stage_of("ingest", **source_of(tmp_path, "\n".join(lines))))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no strict JSON")

    written = (tmp_path / "data" / "clean" / "rejected.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse)["row"] for line in written)
    assert (first["prompt"], first["response"], first["more"][0]) == ("inf", "-inf", 1.5)
    assert json.dumps(first["more"][1]) == "[" * 18 + '"..."' + "]" * 18  # 20 levels, the row's object and `more` two of them
    assert second == {"prompt": "q" * 1000 + "... (30000 characters)"}


def test_sources_that_cannot_serve(tmp_path: Path, stage_of: StageOf) -> None:
    with pytest.raises(StageError, match=r"ingest\.source\.path: no file 'none\.jsonl'"):
        run_ingest(stage_of("ingest", **{"ingest.source.kind": "jsonl", "ingest.source.path": "none.jsonl"}))
    with pytest.raises(StageError, match=r"source\.jsonl: no rows in it"):
        run_ingest(stage_of("ingest", **source_of(tmp_path, "\n\n")))
    with pytest.raises(StageError, match="no row with a response fell into demonstrations, validation, prompts"):
        run_ingest(stage_of("ingest", **source_of(tmp_path, json.dumps({"prompt": "q0", "response": "a"}))))


def test_the_committed_sample_needs_two_entries(tmp_path: Path, stage_of: StageOf) -> None:
    (tmp_path / "data").mkdir()
    shutil.copytree(ROOT / "data" / "raw", tmp_path / "data" / "raw")
    entries = {"ingest.source.kind": "jsonl", "ingest.source.path": "data/raw/gsm8k.jsonl"}
    stage = stage_of("ingest", **entries)
    figures = run_ingest(stage)
    assert (figures["rows_kept"], figures["shape"], figures["verifier"]) == (120, "question/answer", "gsm8k")
    (first,) = [r for r in read_demonstrations(stage.data / "clean" / "evaluation.jsonl") if r.source.endswith("jsonl:1")]
    assert first.answer == "72"


@pytest.mark.skipif("APPRENTICE_GSM8K" not in os.environ, reason="APPRENTICE_GSM8K names the full training file")
def test_full_gsm8k_is_accounted_for(tmp_path: Path, stage_of: StageOf) -> None:
    entries = source_of(tmp_path, Path(os.environ["APPRENTICE_GSM8K"]).read_bytes())
    stage = stage_of("ingest", **entries)
    figures = run_ingest(stage)
    tables = {name: read_demonstrations(stage.data / "clean" / f"{name}.jsonl") for name in ingest.TABLES}
    rejected = read_jsonl(stage.data / "clean" / "rejected.jsonl")
    kept = [row for name in ("demonstrations", "validation", "evaluation") for row in tables[name]]
    lines = [int(row.source.rpartition(":")[2]) for row in kept] + [row["line"] for row in rejected]
    assert sorted(lines) == list(range(1, 7474))
    assert figures["rows_read"] == 7473 == figures["rows_kept"] + figures["rows_rejected"]
    assert all(row["reason"] for row in rejected) and sum(figures["rejected"].values()) == len(rejected)
    assert figures["verifier"] == "gsm8k" and all(row.answer for row in kept)
