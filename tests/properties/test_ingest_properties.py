"""`ingest` on rows of any kind: each is accounted for once, no prompt stands on both sides, no other error escapes."""

import csv
import dataclasses
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from apprentice.config import Params, parse
from apprentice.demonstrations import demonstration, prompt_id, split_of
from apprentice.sections import SourceConfig
from tasks import ingest
from tasks.cleaning import clean
from tasks.sources import Raw, read_source, recognise
from tasks.stage import Stage, StageError
from tests.conftest import ROOT, changed
from tests.properties.strategies import FORBIDDEN, any_texts, chats, clean_texts, json_values, steady

SHIPPED = yaml.safe_load((ROOT / "params.yaml").read_text())
PARAMS = parse(changed(SHIPPED, {"ingest.max_rejected_share": 1.0, "ingest.max_characters": 60}))
ONCE = {"demonstrations": "train", "suboptimal": "train", "validation": "validation", "evaluation": "evaluation"}
TRAIN, HELD_OUT = ("demonstrations", "suboptimal", "prompts"), ("validation", "evaluation")
Row = dict[str, Any]


def read_lines(path: Path) -> list[Row]:
    """A JSONL file, strictly: UTF-8, one object a line."""
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line.decode("utf-8")) for line in lines]


@dataclass
class Outcome:
    """What a run of the stage left behind: its counts (None if it stopped before), its tables, and why it stopped."""

    figures: Row | None
    tables: dict[str, list[Row]]
    stopped: str


def run_ingest(source: bytes, kind: str = "jsonl", params: Params = PARAMS) -> Outcome:
    """Run the stage on a source file; any error but StageError fails the test."""
    entry = dataclasses.replace(params.ingest.source, kind=kind, path=f"source.{kind}")
    stage = Stage("ingest", dataclasses.replace(params, ingest=dataclasses.replace(params.ingest, source=entry)))
    stopped = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / entry.path).write_bytes(source)
        stage.data, stage.reports = folder / "data", folder / "data" / "reports"
        try:
            ingest.main(stage)
        except StageError as error:
            stopped = str(error)
        metrics = stage.reports / "metrics.json"
        figures = json.loads(metrics.read_text()) if metrics.exists() else None
        files = (folder / "data" / "clean").glob("*.jsonl")
        return Outcome(figures, {path.stem: read_lines(path) for path in files}, stopped)


def config(**changes: Any) -> Params:
    return dataclasses.replace(PARAMS, ingest=dataclasses.replace(PARAMS.ingest, **changes))


def split(prompt: Any) -> str:
    return split_of(prompt, PARAMS.ingest.validation_share, PARAMS.ingest.evaluation_share)


# An independent reading of each shape: the raw prompt and response of a row.
def chat_of(row: Row) -> tuple[Any, Any]:
    chat = row["messages"]
    ends = isinstance(chat[-1], dict) and chat[-1].get("role") == "assistant" if isinstance(chat, list) and chat else False
    return (chat[:-1], chat[-1].get("content")) if ends else (chat, None)


def alpaca_of(row: Row) -> tuple[Any, Any]:
    context = row.get("input")
    joined = f"{row['instruction']}\n\n{context}" if isinstance(context, str) and context.strip() else row["instruction"]
    return joined, row.get("output")


SHAPES: dict[str, tuple[tuple[str, ...], Callable[[Row], tuple[Any, Any]]]] = {
    "messages": (("messages",), chat_of),
    "prompt/completion": (("prompt", "completion", "quality", "answer"), lambda row: (row["prompt"], row.get("completion"))),
    "prompt/response": (("prompt", "response", "quality", "answer"), lambda row: (row["prompt"], row.get("response"))),
    "alpaca": (("instruction", "output", "input"), alpaca_of),
    "question/answer": (("question", "answer"), lambda row: (row["question"], row.get("answer"))),
}
NO_ROWS = [b"{", b"[1]", b"null", b'"text"', b'{"prompt": "\xff"}', b'{"prompt": NaN}', b"\x00", b"\xef\xbb\xbf", b"[" * 2000]
NO_ROWS += [b'{"prompt": ' + b"1" * 5000 + b"}", b'{"prompt": ' + b'{"a":' * 2000 + b"1" + b"}" * 2001]
BLANK = [b"", b"  ", b"\t\r"]


def fields(column: str) -> st.SearchStrategy[Any]:
    """What may stand in a column: mostly text, sometimes anything."""
    if column == "messages":
        return chats | json_values
    if column == "quality":
        return st.sampled_from([None, "", "expert", "mixed", "poor", "superb"]) | json_values
    chat = chats if column in ("prompt", "question") else st.none()
    return any_texts | clean_texts | chat | json_values


# prompts of every split, few enough to come again
QUESTIONS = [
    question
    for name in ("train", "validation", "evaluation")
    for question in [text for text in (f"question {n}" for n in range(60)) if split(text) == name][:4]
]


def good_rows(shape: str) -> st.SearchStrategy[Row]:
    """Rows that can mostly be kept."""
    said = st.sampled_from(["4", "#### 4", "so #### 5", *QUESTIONS[:2]]) | clean_texts | any_texts
    if shape == "messages":
        turns = st.tuples(st.sampled_from(QUESTIONS), said).map(
            lambda texts: [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
        )
        return st.fixed_dictionaries({"messages": turns | chats})
    prompt, response, *rest = SHAPES[shape][0]
    more = {"quality": st.sampled_from([None, "expert", "mixed", "poor"]), "answer": st.sampled_from([None, "4", 4, 0.5])}
    texts = {prompt: st.sampled_from(QUESTIONS) | clean_texts, response: said}
    return st.fixed_dictionaries({**texts, **{name: more[name] for name in rest if name in more}})


@st.composite
def sources(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    """A shape and lines of a JSONL file: good rows, bad ones, no rows at all, and some of them again, in any order."""
    shape = draw(st.sampled_from(sorted(SHAPES)))
    wild = st.fixed_dictionaries({}, optional={column: fields(column) for column in [*SHAPES[shape][0], "more"]})
    good = st.lists(good_rows(shape), max_size=3) | st.lists(good_rows(shape), min_size=8, max_size=16)
    rows = draw(good) + draw(st.lists(wild, max_size=3))
    lines = [json.dumps(row).encode() for row in rows] + draw(st.lists(st.sampled_from([*NO_ROWS, *BLANK]), max_size=2))
    again = draw(st.lists(st.sampled_from(lines), max_size=3)) if lines else []
    return shape, draw(st.permutations([*lines, *again]))


def normal(prompt: Any) -> Any:
    """A prompt as the tables have it, written out once more."""
    if isinstance(prompt, str):
        return prompt.replace("\r\n", "\n").replace("\r", "\n").strip()
    written = [{"role": message["role"], "content": normal(message["content"])} for message in prompt]
    return written[0]["content"] if len(written) == 1 and written[0]["role"] == "user" else written


@steady(60)
@given(
    source=sources(),
    verifier=st.sampled_from(["auto", "none", "gsm8k", "exact", "world"]),
    same_prompt=st.sampled_from(["keep", "first"]),
)
def test_every_row_of_a_source_is_accounted_for_once(source: tuple[str, list[bytes]], verifier: str, same_prompt: str) -> None:
    shape, lines = source
    _, read = SHAPES[shape]
    rows = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    found = run_ingest(b"\n".join(lines), params=config(verifier=verifier, same_prompt=same_prompt))
    if found.figures is None:  # nothing of it could be read: then it says so and writes nothing
        unreadable = (
            f"none of the {len(rows)} rows can be read; the first, line {min(rows, default=0)}: ",
            "the source has the columns",
        )
        assert found.stopped.startswith(unreadable if rows else "source.jsonl: no rows in it")
        assert not found.tables
        return
    placed = [int(row["source"].rpartition(":")[2]) for name in ONCE for row in found.tables[name]]
    rejected = [row["line"] for row in found.tables["rejected"]]
    rest = sorted(set(rows) - {*placed, *rejected})
    assert sorted([*placed, *rejected, *rest]) == list(rows)  # none twice, none invented
    for row in found.tables["rejected"]:
        assert row["reason"].strip()
        if not row["reason"].startswith("unreadable"):
            assert json.dumps(row["row"]) == json.dumps(json.loads(rows[row["line"]]))
    pool = [row["prompt"] for row in found.tables["prompts"]]
    held_out = 0
    for number in rest:  # in no table of demonstrations: a prompt alone, or held out and no demonstration
        row = json.loads(rows[number].decode("utf-8-sig"))
        prompt, response = read(row)
        assert response is None or (split(normal(prompt)) != "train" and row["quality"] in ("mixed", "poor"))
        assert (normal(prompt) in pool) == (split(normal(prompt)) == "train")
        held_out += split(normal(prompt)) != "train"
    assert found.figures["unused"] == held_out
    assert found.figures["shape"] == shape
    assert found.figures["rows_read"] == len(rows) == found.figures["rows_kept"] + found.figures["rows_rejected"]
    assert found.figures["rows_rejected"] == len(rejected) == sum(found.figures["rejected"].values())
    for name in (*ONCE, "prompts", "answers"):
        assert found.figures[name] == len(found.tables[name])
    assert bool(found.stopped) == (not all(found.tables[name] for name in ("prompts", "demonstrations", *HELD_OUT)))


@steady(40)
@given(source=sources(), verifier=st.sampled_from(["auto", "none", "exact"]))
def test_no_held_out_prompt_is_in_a_training_table(source: tuple[str, list[bytes]], verifier: str) -> None:
    tables = run_ingest(b"\n".join(source[1]), params=config(verifier=verifier)).tables
    if len(tables) <= 1:  # stopped before the tables
        return
    sides = {
        side: {json.dumps(row["prompt"], sort_keys=True) for name in names for row in tables[name]}
        for side, names in {"train": TRAIN, "held out": HELD_OUT}.items()
    }
    assert not sides["train"] & sides["held out"]
    for name, wanted in {**ONCE, "prompts": "train"}.items():
        assert {split(row["prompt"]) for row in tables[name]} <= {wanted}
    train = {prompt_id(json.loads(prompt)) for prompt in sides["train"]}
    assert {row["prompt_id"] for row in tables["answers"]} <= train
    prompts = [row["prompt"] for row in tables["prompts"]]
    assert all(prompts.count(prompt) == 1 for prompt in prompts)
    assert all(row["prompt"] in prompts for name in ("demonstrations", "suboptimal") for row in tables[name])
    assert all(row["response"] is None and row["answer"] is None for row in tables["prompts"])


@steady(40)
@given(source=sources())
def test_the_tables_hold_usable_text_of_their_quality_and_each_row_once(source: tuple[str, list[bytes]]) -> None:
    tables = run_ingest(b"\n".join(source[1])).tables
    if len(tables) > 1:
        assert all((row["quality"] in ("mixed", "poor")) == (name == "suboptimal") for name in ONCE for row in tables[name])
    for name in (*ONCE, "prompts") if len(tables) > 1 else ():
        ids = [row["id"] for row in tables[name]]
        assert len(set(ids)) == len(ids)
        for row in tables[name]:
            assert row["id"] == demonstration(row["prompt"], row["response"], "").id
            texts = [row["prompt"]] if isinstance(row["prompt"], str) else [item["content"] for item in row["prompt"]]
            for text in [*texts, *([row["response"]] if name != "prompts" else [])]:
                assert text == text.strip() and any(map(str.isalnum, text)) and len(text) <= 60
                assert not any(character in text for character in [*FORBIDDEN, "\r"])


@steady(60)
@given(lines=st.lists(st.binary(max_size=20) | st.text('{}[]":,\\ue0d8 promptesn1', max_size=30).map(str.encode), max_size=8))
def test_any_bytes_as_jsonl_give_rows_or_one_of_our_errors(lines: list[bytes]) -> None:
    good = b'{"prompt": "question 0", "response": "4"}'
    data = b"\n".join([good, *lines])
    found = run_ingest(data)
    assert found.figures is not None
    assert found.figures["rows_read"] == sum(bool(line.strip()) for line in data.split(b"\n"))


@steady(40)
@given(data=st.binary(max_size=60) | st.text('prompt,"\n\r\0', max_size=40).map(str.encode))
def test_any_bytes_below_a_csv_header_give_rows_or_one_of_our_errors(data: bytes) -> None:
    found = run_ingest(b"prompt,response\nquestion 0,4\n" + data, "csv")
    broken = found.stopped.startswith("source.csv: the CSV row that begins on line")
    assert broken == (found.figures is None)


cells = st.one_of(any_texts.filter(lambda text: "\ud800" not in text), st.text('a,"\r\n', max_size=6))


@steady(40)
@given(rows=st.lists(st.lists(cells, min_size=2, max_size=2), max_size=8), end=st.sampled_from(["\n", "\r\n"]))
def test_csv_gives_back_the_cells_written_to_it(rows: list[list[str]], end: str) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator=end).writerows([["prompt", "response"], *rows])
    data = text.getvalue().encode("utf-8", "surrogateescape")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "source.csv").write_bytes(data)
        entry: SourceConfig = dataclasses.replace(PARAMS.ingest.source, kind="csv", path="source.csv")
        raws = list(read_source(entry, Path(folder)))
    assert [raw.row for raw in raws] == [{"prompt": a or None, "response": b or None} for a, b in rows]
    numbers = [raw.line for raw in raws]
    assert numbers == sorted(set(numbers)) and (not numbers or numbers[0] == 2)
    found = run_ingest(data, "csv")
    assert (found.figures or {"rows_read": 0})["rows_read"] == len(rows)


@steady(60)
@given(
    prompt=clean_texts.filter(lambda text: any(map(str.isalnum, text))),
    system=st.none() | st.just("be brief"),
    ends=st.tuples(*[st.sampled_from(["", " ", "\n", "\r\n\t", "\u00a0"])] * 2),
)
def test_one_prompt_has_one_id_and_one_split_however_it_is_written(
    prompt: str, system: str | None, ends: tuple[str, str]
) -> None:
    prompt = prompt.replace("\r\n", "\n")
    padded = ends[0] + prompt.replace("\n", "\r\n") + ends[1]
    first = [] if system is None else [{"role": "system", "content": system}]
    rows: list[Row] = [{"prompt": [*first, {"role": "user", "content": text}], "response": "yes"} for text in (prompt, padded)]
    rows += [{"messages": [*row["prompt"], {"content": row["response"], "role": "assistant"}]} for row in rows]
    if system is None:
        rows += [{"prompt": text, "response": "yes"} for text in (prompt, padded)]
        rows += [{"instruction": padded, "output": "yes", "input": " "}, {"question": padded, "answer": "yes"}]
    limits = dataclasses.replace(PARAMS.ingest, max_characters=1000)
    read = []
    for row in rows:
        raw = Raw(1, row)
        read += clean([raw], recognise([raw], {}).read, limits, "file").rows
    assert len(read) == len(rows)
    assert len({row.id for row in read}) == len({prompt_id(row.prompt) for row in read}) == 1
    assert len({split(row.prompt) for row in read}) == 1


@steady(60)
@given(
    ends=st.tuples(clean_texts, clean_texts), character=st.sampled_from(FORBIDDEN), name=st.sampled_from(["prompt", "response"])
)
def test_a_character_that_is_no_text_rejects_its_row_and_is_named_with_its_place(
    ends: tuple[str, str], character: str, name: str
) -> None:
    before, after = (text.replace("\r\n", "\n") for text in ends)
    row = {"prompt": "question 0", "response": "4", name: f"a{before}{character}{after}b"}
    found = clean([Raw(1, row)], lambda row: row, dataclasses.replace(PARAMS.ingest, max_characters=1000), "file")
    reason = f"control characters: U+{ord(character):04X} in {name} at {len(before) + 1}"
    assert not found.kept and found.rejected == [{"line": 1, "reason": reason}]


@steady(40)
@given(rows=st.lists(st.fixed_dictionaries({"prompt": any_texts | chats, "response": any_texts | st.none()}), max_size=10))
def test_cleaning_what_is_clean_changes_nothing(rows: list[Row]) -> None:
    once = clean([Raw(n, row) for n, row in enumerate(rows)], lambda row: row, PARAMS.ingest, "file").rows
    again = [Raw(n, {"prompt": row.prompt, "response": row.response, "source": row.source}) for n, row in enumerate(once)]
    found = clean(again, lambda row: row, PARAMS.ingest, "other")
    assert found.rows == once and not found.rejected
