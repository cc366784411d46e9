"""`validate`: the clean tables pass; each broken rule is named with its rows, and none passes by failing to run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apprentice.demonstrations import demonstration, read_jsonl, write_jsonl
from tasks import ingest, tokenizer, validate
from tasks.stage import Stage, StageError

ROOT = Path(__file__).parents[2]
SIZES = {"demonstrations": 20, "validation": 8, "prompts": 40, "evaluation": 4}
StageOf = Callable[..., Stage]


@pytest.fixture
def tables(stage_of: StageOf) -> Path:
    """The folder of small clean tables, their tokenizer beside it."""
    ingest.main(stage_of("ingest", **{"ingest.world": SIZES}))
    stage = stage_of("tokenizer")
    tokenizer.main(stage)
    return stage.data / "clean"


def outcomes_of(stage: Stage) -> list[dict[str, Any]]:
    return json.loads((stage.reports / "validation.json").read_text())


def broken_rules(stage: Stage) -> dict[str, list[Any]]:
    """What failed, as `table column rule`, with the ids of the first rows."""
    return {
        f"{o['table']} {o['column']} {o['expectation'].removeprefix('expect_column_')}": [r["id"] for r in o["first_rows"]]
        for o in outcomes_of(stage)
        if not o["success"]
    }


def edit(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = read_jsonl(path)
    change(rows)
    write_jsonl(path, rows)


def test_clean_tables_pass_and_the_report_repeats_itself(tables: Path, stage_of: StageOf) -> None:
    stage = stage_of("validate")
    validate.main(stage)
    first = (stage.reports / "validation.json").read_bytes()
    figures = json.loads((stage.reports / "metrics.json").read_text())
    assert figures["failed"] == 0 and figures["expectations"] == len(outcomes_of(stage)) > 60
    assert figures["rows"] == {"demonstrations": 20, "validation": 8, "prompts": 40, "evaluation": 60}
    assert 20 < figures["longest_tokens"]["demonstrations"] < 60
    assert set(figures["unknown_share"].values()) == {0.0}
    assert set(outcomes_of(stage)[0]) == {*("table", "expectation", "column", "success", "checked", "unexpected", "first_rows")}
    assert (stage.data.parent / ".telemetry" / "data_docs" / "index.html").is_file()
    validate.main(stage)
    assert (stage.reports / "validation.json").read_bytes() == first


def test_each_broken_rule_is_found_with_its_rows(tables: Path, stage_of: StageOf) -> None:
    held_out = read_jsonl(tables / "evaluation.jsonl")[0]["prompt"]
    ids: list[str] = []

    def remade(row: dict[str, Any], **fields: Any) -> None:
        """Change fields and keep the id the right hash, so that nothing else breaks."""
        row.update(fields)
        row["id"] = demonstration(row["prompt"], row["response"], "").id

    def break_demonstrations(rows: list[dict[str, Any]]) -> None:
        rows[1]["id"] = rows[0]["id"]
        rows[2]["quality"] = "superb"
        rows[3]["quality"] = ["expert"]
        remade(rows[4], response=7)
        del rows[5]["meta"]
        remade(rows[6], response="first\x07")
        remade(rows[7], response="; ; .")
        remade(rows[8], response="first " * 300)
        remade(rows[9], prompt=held_out)
        ids.extend(row["id"] for row in rows)

    edit(tables / "demonstrations.jsonl", break_demonstrations)
    edit(tables / "prompts.jsonl", lambda rows: remade(rows[0], response="first"))
    edit(tables / "evaluation.jsonl", lambda rows: rows[1].update(answer=None))
    edit(tables / "evaluation.jsonl", lambda rows: rows[2]["meta"].update(verifier="word", domain="inside"))
    stage = stage_of("validate", **{"ingest.max_characters": 600})
    with pytest.raises(StageError):
        validate.main(stage)
    evaluation = [row["id"] for row in read_jsonl(tables / "evaluation.jsonl")]
    assert broken_rules(stage) == {
        "demonstrations id values_to_be_unique": [ids[0], ids[0]],
        "demonstrations id_is_hash values_to_be_in_set": [ids[1]],
        "demonstrations fields values_to_be_in_set": [ids[5]],
        "demonstrations meta_type values_to_be_in_set": [ids[5]],
        "demonstrations quality values_to_be_in_set": [ids[2], ids[3]],
        "demonstrations quality_type values_to_be_in_set": [ids[3]],
        "demonstrations response_type values_to_be_in_set": [ids[4]],
        "demonstrations response values_to_not_match_regex": [ids[6]],
        "demonstrations response values_to_match_regex": [ids[7]],
        "demonstrations response value_lengths_to_be_between": [ids[8]],
        "demonstrations tokens values_to_be_between": [ids[8]],
        "demonstrations splits_of_prompt values_to_be_in_set": [ids[9]],
        "prompts response_type values_to_be_in_set": [read_jsonl(tables / "prompts.jsonl")[0]["id"]],
        "evaluation splits_of_prompt values_to_be_in_set": [evaluation[0]],
        "evaluation answer values_to_not_be_null": [evaluation[1]],
        "evaluation domain values_to_be_in_set": [evaluation[2]],
        "evaluation verifier values_to_be_in_set": [evaluation[2]],
    }


def test_the_error_names_rule_rows_and_remedy(tables: Path, stage_of: StageOf) -> None:
    row = demonstration("what is glorp ?", "first glorp blarg zyx", "by hand").__dict__
    edit(tables / "demonstrations.jsonl", lambda rows: rows.append(row))
    stage = stage_of("validate", **{"validate.max_unknown_share": 0.005, "validate.max_tokens": 50})
    with pytest.raises(StageError) as caught:
        validate.main(stage)
    message = str(caught.value)
    assert "tables: expect_column_values_to_be_between(unknown_share) does not hold for 1 of 4 rows" in message
    assert "First: demonstrations: '0.0" in message
    assert "pretrain.checkpoint" in message
    assert "evaluation: expect_column_values_to_be_between(tokens)" in message and "validate.max_tokens" in message


def test_unknown_share_counts_tokens(tables: Path) -> None:
    from transformers import AutoTokenizer

    rows = [demonstration("how many glorp ?", "answer : blarg", "by hand").__dict__]
    known = AutoTokenizer.from_pretrained(tables.parent / "models" / "tokenizer")
    frames = validate.make_frames({"demonstrations": rows, "validation": [], "prompts": [], "evaluation": []}, known)
    assert (frames["demonstrations"][0]["tokens"], frames["demonstrations"][0]["unknown"]) == (11, 2)
    assert frames["tables"][0]["unknown_share"] == pytest.approx(2 / 11)


def test_class_balance_and_empty_tables(tables: Path, stage_of: StageOf) -> None:
    def unbalance(rows: list[dict[str, Any]]) -> None:
        for number, row in enumerate(rows):
            row["quality"] = "poor" if number == 0 else "expert"

    edit(tables / "demonstrations.jsonl", unbalance)
    (tables / "validation.jsonl").write_text("")
    stage = stage_of("validate", **{"validate.max_class_share": 0.94})
    with pytest.raises(StageError, match=r"largest_class_share.*demonstrations: '0\.95'"):
        validate.main(stage)
    assert broken_rules(stage) == {
        "tables rows values_to_be_between": ["validation"],
        "tables largest_class_share values_to_be_between": ["demonstrations"],
    }


def test_an_expectation_that_cannot_run_is_no_pass(tmp_path: Path) -> None:
    import great_expectations.expectations as gxe

    from tasks.expectations import run_suites

    rule = gxe.ExpectColumnValuesToMatchRegex(column="id", regex="(")
    with pytest.raises(RuntimeError, match=r"expect_column_values_to_match_regex\(id\) on t could not be computed"):
        run_suites({"t": [{"id": "a"}]}, {"t": [rule]}, tmp_path)


def test_data_docs_that_cannot_be_built_are_said_and_stop_nothing(
    tables: Path, stage_of: StageOf, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = stage_of("validate")
    docs = stage.data.parent / ".telemetry" / "data_docs"
    docs.parent.mkdir(exist_ok=True)
    docs.write_text("in the way")
    validate.main(stage)
    assert "WARNING: the Data Docs were not built" in capsys.readouterr().out


def test_the_committed_sample_passes(tmp_path: Path, stage_of: StageOf) -> None:
    shutil.copytree(ROOT / "data" / "raw", tmp_path / "data" / "raw")
    entries = {"ingest.source.kind": "jsonl", "ingest.source.path": "data/raw/gsm8k.jsonl"}
    for name, module in (("ingest", ingest), ("tokenizer", tokenizer), ("validate", validate)):
        module.main(stage_of(name, **entries))
    read = {name: json.loads((tmp_path / f"data/reports/{name}/metrics.json").read_text()) for name in ("ingest", "validate")}
    assert read["ingest"]["rows_kept"] == 120 and read["ingest"]["rows_rejected"] == 0
    assert read["validate"]["failed"] == 0
