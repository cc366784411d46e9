"""`validate`: the clean tables pass; each broken rule is named with its rows, and none passes by failing to run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apprentice.demonstrations import demonstration, digest, prompt_id, read_jsonl, write_jsonl
from apprentice.policy import load_tokenizer
from tasks import frames, ingest, tokenizer, validate
from tasks.frames import TABLES, frames_of, overview_of
from tasks.stage import Stage, StageError

ROOT = Path(__file__).parents[2]
SIZES = {"demonstrations": 20, "validation": 8, "prompts": 40, "evaluation": 4, "suboptimal": 30, "preferences": 24}
StageOf = Callable[..., Stage]


@pytest.fixture
def tables(stage_of: StageOf) -> Path:
    """The folder of small clean tables, their tokenizer beside it."""
    ingest.main(stage_of("ingest", **{"ingest.world": {**SIZES, "demonstrated": "all"}}))
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
    answers = len(read_jsonl(tables / "answers.jsonl"))
    assert figures["rows"] == {**SIZES, "evaluation": 60, "answers": answers} and 40 < answers <= 20 + 40 + 15
    assert figures["longest_tokens"].keys() == figures["unknown_share"].keys() == SIZES.keys() and figures["skipped"] == []
    assert 20 < figures["longest_tokens"]["demonstrations"] < 60
    assert set(figures["unknown_share"].values()) == {0.0}
    assert set(outcomes_of(stage)[0]) == {*("table", "expectation", "column", "success", "checked", "unexpected", "first_rows")}
    assert (stage.data.parent / ".telemetry" / "data_docs" / "index.html").is_file()
    assert (stage.reports / "passed").read_text() == "every expectation holds\n"
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
    edit(tables / "prompts.jsonl", lambda rows: rows[1].update(answer="9"))
    edit(tables / "evaluation.jsonl", lambda rows: rows[1].update(answer=None))
    edit(tables / "evaluation.jsonl", lambda rows: rows[2]["meta"].update(verifier="word", domain="inside"))
    stage = stage_of("validate", **{"ingest.max_characters": 600})
    with pytest.raises(StageError):
        validate.main(stage)
    evaluation, prompts = ([row["id"] for row in read_jsonl(tables / f"{name}.jsonl")] for name in ("evaluation", "prompts"))
    assert broken_rules(stage) == {
        "demonstrations rows_of_id values_to_be_in_set": [ids[0], ids[0]],
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
        "prompts response_type values_to_be_in_set": [prompts[0]],
        "prompts answer_type values_to_be_in_set": [prompts[1]],
        "evaluation splits_of_prompt values_to_be_in_set": [evaluation[0]],
        "evaluation answer values_to_not_be_null": [evaluation[1]],
        "evaluation domain values_to_be_in_set": [evaluation[2]],
        "evaluation verifier values_to_be_in_set": [evaluation[2]],
    }


def test_each_broken_rule_of_the_further_tables_is_found(tables: Path, stage_of: StageOf) -> None:
    held_out = read_jsonl(tables / "evaluation.jsonl")[0]["prompt"]
    named: dict[str, list[str]] = {}

    def hashed(row: dict[str, Any], **fields: Any) -> None:
        row.update(fields)
        texts = [row["prompt"], *(row[side] for side in ("response", "chosen", "rejected") if side in row)]
        row["id"] = digest(texts)[:16]

    def break_suboptimal(rows: list[dict[str, Any]]) -> None:
        rows[0]["quality"] = "expert"
        rows[1]["quality"] = None
        hashed(rows[2], prompt=held_out)
        hashed(rows[3], response="first " * 300)
        named["suboptimal"] = [row["id"] for row in rows]

    def break_preferences(rows: list[dict[str, Any]]) -> None:
        hashed(rows[0], rejected=rows[0]["chosen"])
        hashed(rows[1], prompt=held_out)
        hashed(rows[2], chosen="first " * 300)
        hashed(rows[3], rejected="first " * 300)
        hashed(rows[4], rejected="; ;")
        hashed(rows[5], chosen=7)
        rows[6]["id"] = rows[7]["id"]
        rows[8]["score"] = 1
        hashed(rows[9], prompt=held_out.replace(" ", "  ", 1))
        hashed(rows[10], prompt=f"{held_out}\u200b")
        named["preferences"] = [row["id"] for row in rows]

    def break_answers(rows: list[dict[str, Any]]) -> None:
        rows[0]["answer"] = 9
        rows[1]["answer"] = "q : 9 answer : 9"
        rows[2].update(verifier="gsm8k", answer="many")
        rows[3]["verifier"] = ["world"]
        rows[4]["prompt_id"] = digest(held_out)[:16]
        rows[6]["prompt_id"] = digest(held_out.replace(" ", "  ", 1))[:16]  # of a prompt in `preferences` below
        rows[5]["prompt"] = "q"
        named["answers"] = [row["prompt_id"] for row in rows]

    edit(tables / "suboptimal.jsonl", break_suboptimal)
    edit(tables / "preferences.jsonl", break_preferences)
    edit(tables / "answers.jsonl", break_answers)
    stage = stage_of("validate", **{"ingest.max_characters": 600})
    with pytest.raises(StageError):
        validate.main(stage)
    s, p, a = named["suboptimal"], named["preferences"], named["answers"]
    assert broken_rules(stage) == {
        "evaluation splits_of_prompt values_to_be_in_set": [read_jsonl(tables / "evaluation.jsonl")[0]["id"]],
        "suboptimal quality values_to_be_in_set": [s[0]],
        "suboptimal quality values_to_not_be_null": [s[1]],
        "suboptimal splits_of_prompt values_to_be_in_set": [s[2]],
        "suboptimal response value_lengths_to_be_between": [s[3]],
        "suboptimal tokens values_to_be_between": [s[3]],
        "preferences responses_differ values_to_be_in_set": [p[0]],
        "preferences splits_of_prompt values_to_be_in_set": [p[1], p[9], p[10]],
        "preferences chosen value_lengths_to_be_between": [p[2]],
        "preferences rejected value_lengths_to_be_between": [p[3]],
        "preferences tokens values_to_be_between": [p[2], p[3]],
        "preferences rejected values_to_match_regex": [p[4]],
        "preferences chosen_type values_to_be_in_set": [p[5]],
        "preferences rows_of_id values_to_be_in_set": [p[6], p[7]],
        "preferences id_is_hash values_to_be_in_set": [p[6]],
        "preferences fields values_to_be_in_set": [p[8]],
        "answers answer_type values_to_be_in_set": [a[0]],
        "answers answer_is_accepted values_to_be_in_set": [a[0], a[1], a[2]],
        "answers verifier values_to_be_in_set": [a[3]],
        "answers verifier_type values_to_be_in_set": [a[3]],
        "answers splits_of_prompt values_to_be_in_set": [a[4], a[6]],
        "answers fields values_to_be_in_set": [a[5]],
    }


def test_demonstrations_and_held_out_rows_are_expert_or_unlabelled(tables: Path, stage_of: StageOf) -> None:
    for name in ("demonstrations", "validation", "evaluation"):
        edit(tables / f"{name}.jsonl", lambda rows: rows[3].update(quality="mixed"))
    stage = stage_of("validate")
    with pytest.raises(StageError, match="3 of the clean tables' expectations broken"):
        validate.main(stage)
    assert set(broken_rules(stage)) == {
        f"{name} quality values_to_be_in_set" for name in ("demonstrations", "validation", "evaluation")
    }


def test_empty_tables_of_the_further_methods_are_skipped_and_said_to_be(tables: Path, stage_of: StageOf) -> None:
    for name in ("suboptimal", "preferences", "answers"):
        (tables / f"{name}.jsonl").write_text("")
    stage = stage_of("validate")
    validate.main(stage)
    figures = json.loads((stage.reports / "metrics.json").read_text())
    assert (figures["failed"], figures["skipped"]) == (0, ["suboptimal", "preferences", "answers"])
    assert (figures["rows"]["suboptimal"], figures["rows"]["preferences"], figures["rows"]["answers"]) == (0, 0, 0)
    outcomes = outcomes_of(stage)
    skipped = [(o["table"], o["checked"]) for o in outcomes if o["expectation"] == "skipped_as_empty"]
    assert skipped == [("suboptimal", 0), ("preferences", 0), ("answers", 0)]
    assert len(outcomes) == figures["expectations"] + 3
    assert {o["table"] for o in outcomes} - {name for name, _ in skipped} == {*TABLES, "tables"} - {n for n, _ in skipped}


def test_the_error_names_rule_rows_and_remedy(tables: Path, stage_of: StageOf) -> None:
    row = demonstration("what is glorp ?", "first glorp blarg zyx", "by hand").__dict__
    edit(tables / "demonstrations.jsonl", lambda rows: rows.append(row))
    stage = stage_of("validate", **{"validate.max_unknown_share": 0.005, "validate.max_tokens": 50})
    with pytest.raises(StageError) as caught:
        validate.main(stage)
    message = str(caught.value)
    assert "tables: expect_column_values_to_be_between(unknown_share) does not hold for 1 of 6 rows" in message
    assert "First: demonstrations: '0.0" in message
    assert "pretrain.checkpoint" in message
    assert "evaluation: expect_column_values_to_be_between(tokens)" in message and "validate.max_tokens" in message


def test_unknown_share_counts_tokens(tables: Path) -> None:
    rows = [demonstration("how many glorp ?", "answer : blarg", "by hand").__dict__]
    known = load_tokenizer(tables.parent / "models" / "tokenizer")
    tables_of = {"demonstrations": rows, "validation": [], "prompts": [], "evaluation": []}
    found = dict(frames_of(tables_of, overview_of(tables_of), known))
    assert (found["demonstrations"][0]["tokens"], found["demonstrations"][0]["unknown"]) == (11, 2)
    assert found["tables"][0]["unknown_share"] == pytest.approx(2 / 11)


def test_both_sides_of_a_pair_are_counted(tables: Path) -> None:
    row = {"prompt": "how many glorp ?", "chosen": "answer : blarg", "rejected": "answer : 1 2 3"}
    known = load_tokenizer(tables.parent / "models" / "tokenizer")
    found = dict(frames_of({"preferences": [row]}, overview_of({"preferences": [row]}), known))
    (pair,) = found["preferences"]  # 7 of the prompt with its frame; 4 and 6 of the responses, end tokens included
    assert (pair["tokens"], pair["all_tokens"], pair["unknown"]) == (7 + 6, 7 + 4 + 7 + 6, 1 + 1 + 1)
    assert found["tables"][0]["unknown_share"] == pytest.approx(3 / 24)


GEMMA_LIKE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def test_a_chat_that_the_template_refuses_is_named_and_stops(tables: Path, stage_of: StageOf) -> None:
    chat = [{"role": "system", "content": "obey"}, {"role": "user", "content": "how many ?"}]
    row = demonstration(chat, "answer : 1", "by hand").__dict__
    edit(tables / "demonstrations.jsonl", lambda rows: rows.append(row))
    known = load_tokenizer(tables.parent / "models" / "tokenizer")
    known.chat_template = GEMMA_LIKE + known.chat_template
    known.save_pretrained(tables.parent / "models" / "tokenizer")
    stage = stage_of("validate")
    with pytest.raises(StageError) as caught:
        validate.main(stage)
    assert broken_rules(stage) == {"demonstrations not_encoded values_to_be_null": [row["id"]]}
    told = f"does not hold for 1 of 21 rows. First: {row['id']}: \"the tokenizer's chat template refuses it: System role not"
    assert told in str(caught.value) and "leave these rows out of the source" in str(caught.value)


def test_texts_that_cannot_be_encoded_are_named_and_stop(tables: Path, stage_of: StageOf) -> None:
    """The normaliser makes the end token out of another character; the texts themselves are cut in the message."""
    long = "first " * 200 + "\u00df"
    row, prompt = demonstration("how many ?", long, "by hand").__dict__, demonstration("\u00df ?", None, "by hand").__dict__
    edit(tables / "validation.jsonl", lambda rows: rows.append(row))
    edit(tables / "prompts.jsonl", lambda rows: rows.append(prompt))
    folder = tables.parent / "models" / "tokenizer"
    model = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    model.pre_tokenizer, model.normalizer = pre_tokenizers.WhitespaceSplit(), normalizers.Replace("\u00df", "<eos>")
    model.add_special_tokens(["<eos>"])
    shutil.rmtree(folder)  # its chat template too
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    stage = stage_of("validate", **{"validate.max_unknown_share": 1.0})
    with pytest.raises(StageError) as caught:
        validate.main(stage)
    assert broken_rules(stage) == {
        "validation not_encoded values_to_be_null": [row["id"]],
        "prompts not_encoded values_to_be_null": [prompt["id"]],
    }
    message = str(caught.value)
    assert f"First: {row['id']}: \"no encoding without the reserved token '<eos>'; leave the row out: 'first" in message
    assert long not in message and message.count("first ") < 30


def test_a_tokenizer_that_brings_code_is_refused(tables: Path, stage_of: StageOf) -> None:
    config = tables.parent / "models" / "tokenizer" / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["modeling_own.Own", None]}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))
    with pytest.raises(StageError, match=r"tokenizer_config.json: `auto_map` asks for code of the checkpoint's own"):
        validate.main(stage_of("validate"))


def test_class_balance_and_empty_tables(tables: Path, stage_of: StageOf) -> None:
    def unbalance(rows: list[dict[str, Any]]) -> None:
        del rows[5:]
        for number, row in enumerate(rows):
            row["quality"] = "poor" if number == 0 else "mixed"

    edit(tables / "suboptimal.jsonl", unbalance)  # with the 20 experts: 1 poor and 4 mixed
    (tables / "validation.jsonl").write_text("")
    validate_with = {"validate.max_class_share": 0.79}
    stage = stage_of("validate", **validate_with)
    with pytest.raises(StageError, match=r"largest_class_share.*demonstrations: '0\.8'"):
        validate.main(stage)
    assert broken_rules(stage) == {
        "tables rows values_to_be_between": ["validation"],
        "tables largest_class_share values_to_be_between": ["demonstrations"],
    }


def test_an_expectation_that_cannot_run_is_no_pass() -> None:
    import great_expectations.expectations as gxe

    from tasks.expectations import Checks

    rule = gxe.ExpectColumnValuesToMatchRegex(column="id", regex="(")
    with pytest.raises(RuntimeError, match=r"expect_column_values_to_match_regex\(id\) on t could not be computed"):
        Checks({"t": [rule]}).check("t", [{"id": "a"}])


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


def test_a_table_in_pieces_has_the_outcomes_of_the_whole(
    tables: Path, stage_of: StageOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With rows that break rules in several pieces, one of them for a row in another."""

    def break_some(rows: list[dict[str, Any]]) -> None:
        rows[19]["id"] = rows[0]["id"]
        for number in (2, 9, 14, 17):
            rows[number]["quality"] = "superb"

    edit(tables / "demonstrations.jsonl", break_some)
    found = []
    for size in (20_000, 7, 1):
        monkeypatch.setattr(frames, "PIECE", size)
        stage = stage_of("validate")
        with pytest.raises(StageError):
            validate.main(stage)
        found.append((outcomes_of(stage), json.loads((stage.reports / "metrics.json").read_text())))
    assert found[0] == found[1] == found[2]
    rules = broken_rules(stage)
    assert (
        len(rules["demonstrations quality values_to_be_in_set"]) == 3
        and "demonstrations rows_of_id values_to_be_in_set" in rules
    )
    (broken,) = (o for o in found[0][0] if (o["table"], o["column"]) == ("demonstrations", "rows_of_id"))
    assert (broken["checked"], broken["unexpected"]) == (20, 2)
    total = 1 + sum(SIZES.values()) - SIZES["evaluation"] + 60 + len(read_jsonl(tables / "answers.jsonl"))  # one row a piece
    assert f"{total}/{total} " in capsys.readouterr().out


def test_who_stands_where_is_known_over_all_tables(tables: Path) -> None:
    one, other = ({"prompt": prompt, "response": "r", "id": prompt} for prompt in ("a  b", "a b"))
    found = overview_of(
        {"demonstrations": [one, one], "evaluation": [other], "answers": [{"prompt_id": prompt_id("a b")}], "prompts": []}
    )
    assert found.rows == {"demonstrations": 2, "evaluation": 1, "answers": 1, "prompts": 0}
    assert found.columns("demonstrations", one) == {"rows_of_id": 2, "splits_of_prompt": 2}
    assert found.columns("evaluation", other) == {"rows_of_id": 1, "splits_of_prompt": 2}
    assert found.columns("answers", {"prompt_id": prompt_id("a b")})["splits_of_prompt"] == 2
    assert list(found.splits.values()) == [{"train", "evaluation"}]
