"""The contract of the clean tables, as Great Expectations suites, and how it is run.

Imported by `validate` alone, inside its `main`: loading Great Expectations takes seconds.
"""

from pathlib import Path
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas
from great_expectations.core.expectation_validation_result import ExpectationValidationResult
from great_expectations.expectations.expectation import Expectation
from great_expectations.expectations.row_conditions import Column

from apprentice.demonstrations import QUALITIES
from apprentice.sections import ValidateConfig
from apprentice.verifiers import VERIFIERS

TYPES = {
    "answer": ["str", "NoneType"],
    "id": ["str"],
    "meta": ["dict"],
    "prompt": ["str", "list"],
    "quality": ["str", "NoneType"],
    "response": ["str"],
    "source": ["str"],
}
PROMPT_TYPES = {**TYPES, "response": ["NoneType"], "answer": ["NoneType"]}  # what the pool must not give away
PAIR_TYPES = {name: TYPES[name] for name in ("id", "meta", "prompt", "source")} | {"chosen": ["str"], "rejected": ["str"]}
ANSWER_TYPES = {"answer": ["str"], "prompt_id": ["str"], "verifier": ["str"]}
TEXTS = {"prompts": ["prompt"], "preferences": ["prompt", "chosen", "rejected"]}
DOMAINS = ["in_domain", "long", "out_of_domain_pool", "out_of_domain_unseen"]
UNPRINTABLE = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]"
FIRST_ROWS = 3
Row = dict[str, Any]


def suite_of(table: str, config: ValidateConfig, max_characters: int) -> list[Expectation]:
    """What holds for each row of a table (the columns are made in `validate`), or for the table of tables."""
    if table == "tables":
        return [
            gxe.ExpectColumnValuesToBeBetween(column="rows", min_value=1),
            gxe.ExpectColumnValuesToBeBetween(column="unknown_share", max_value=config.max_unknown_share),
            gxe.ExpectColumnValuesToBeBetween(column="largest_class_share", max_value=config.max_class_share),
        ]
    if table == "answers":
        return [
            *_form(ANSWER_TYPES),
            gxe.ExpectColumnValuesToBeInSet(column="verifier", value_set=list(VERIFIERS)),
            gxe.ExpectColumnValuesToBeInSet(column="answer_is_accepted", value_set=[True]),
        ]
    types = {"preferences": PAIR_TYPES, "prompts": PROMPT_TYPES}.get(table, TYPES)
    suite = [
        *_form(types),
        gxe.ExpectColumnValuesToBeInSet(column="id_is_hash", value_set=[True]),
        gxe.ExpectColumnValuesToBeNull(column="not_encoded"),
        gxe.ExpectColumnValuesToBeBetween(column="tokens", min_value=1, max_value=config.max_tokens),
    ]
    for text in TEXTS.get(table, ["prompt", "response"]):
        suite += [
            gxe.ExpectColumnValueLengthsToBeBetween(column=text, min_value=1, max_value=max_characters),
            gxe.ExpectColumnValuesToNotMatchRegex(column=text, regex=UNPRINTABLE),
            gxe.ExpectColumnValuesToMatchRegex(column=text, regex=r"\w"),
        ]
    if table == "preferences":
        return [*suite, gxe.ExpectColumnValuesToBeInSet(column="responses_differ", value_set=[True])]
    return suite + _quality_suite(table) + (_evaluation_suite() if table == "evaluation" else [])


def _form(types: dict[str, list[str]]) -> list[Expectation]:
    """The fields of a table and their types, ids that occur once, and prompts of one split only."""
    return [
        gxe.ExpectColumnValuesToBeInSet(column="fields", value_set=[" ".join(sorted(types))]),
        *(gxe.ExpectColumnValuesToBeInSet(column=f"{name}_type", value_set=found) for name, found in types.items()),
        gxe.ExpectColumnValuesToBeInSet(column="rows_of_id", value_set=[1]),
        gxe.ExpectColumnValuesToBeInSet(column="splits_of_prompt", value_set=[1]),
    ]


def _quality_suite(table: str) -> list[Expectation]:
    if table != "suboptimal":
        return [gxe.ExpectColumnValuesToBeInSet(column="quality", value_set=["expert"])]
    return [
        gxe.ExpectColumnValuesToBeInSet(column="quality", value_set=[name for name in QUALITIES if name != "expert"]),
        gxe.ExpectColumnValuesToNotBeNull(column="quality"),
    ]


def _evaluation_suite() -> list[Expectation]:
    return [
        gxe.ExpectColumnValuesToBeInSet(column="domain", value_set=DOMAINS),
        gxe.ExpectColumnValuesToNotBeNull(column="domain"),
        gxe.ExpectColumnValuesToBeInSet(column="verifier", value_set=list(VERIFIERS)),
        gxe.ExpectColumnValuesToNotBeNull(column="answer", row_condition=Column("verifier").is_not_null()),
    ]


class Checks:
    """Suites, by table, put to tables that come in pieces."""

    def __init__(self, suites: dict[str, list[Expectation]]) -> None:
        self.suites, self.found = suites, dict[str, list[Row]]()
        self.context = gx.get_context(mode="ephemeral")
        self.context.variables.progress_bars = {"globally": False}
        self.checkpoints = {table: _checkpoint(self.context, table, suite) for table, suite in suites.items()}

    def check(self, table: str, rows: list[Row]) -> None:
        """Check a piece of a table.

        Raises RuntimeError when an expectation could not be computed, which is not the same as not holding.
        """
        columns = dict.fromkeys(["id", *(expectation.column for expectation in self.suites[table])])
        frame = pandas.DataFrame(rows, columns=list(columns), dtype=object)
        (result,) = self.checkpoints[table].run(batch_parameters={"dataframe": frame}).run_results.values()
        found = [_outcome(table, one, len(rows)) for one in result.results]
        before = self.found.get(table)
        self.found[table] = [_joined(*both) for both in zip(before, found, strict=True)] if before else found

    def outcomes(self) -> list[Row]:
        """One for each expectation: {table, expectation, column, success, checked, unexpected, first_rows}, no times and no ids
        of the tool."""
        return [outcome for found in self.found.values() for outcome in found]

    def build_docs(self, folder: Path) -> str | None:
        """Write the Data Docs; why they could not be built, if so."""
        store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder)}
        try:
            self.context.add_data_docs_site("apprentice", {"class_name": "SiteBuilder", "store_backend": store})
            self.context.build_data_docs(site_names=["apprentice"])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None


def _checkpoint(context: Any, table: str, expectations: list[Expectation]) -> Any:
    asset = context.data_sources.add_pandas(table).add_dataframe_asset("table")
    suite = context.suites.add(gx.ExpectationSuite(name=table, expectations=expectations))
    definition = gx.ValidationDefinition(name=table, data=asset.add_batch_definition_whole_dataframe("all"), suite=suite)
    checkpoint = gx.Checkpoint(
        name=table,
        validation_definitions=[context.validation_definitions.add(definition)],
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
    )
    return context.checkpoints.add(checkpoint)


def _joined(one: Row, more: Row) -> Row:
    """The outcome of an expectation over two pieces."""
    assert (one["expectation"], one["column"]) == (more["expectation"], more["column"]), "the tool keeps a suite's order"
    return {
        **one,
        "success": one["success"] and more["success"],
        "checked": one["checked"] + more["checked"],
        "unexpected": one["unexpected"] + more["unexpected"],
        "first_rows": (one["first_rows"] + more["first_rows"])[:FIRST_ROWS],
    }


def _outcome(table: str, result: ExpectationValidationResult, rows: int) -> dict[str, Any]:
    kind, column = result.expectation_config.type, result.expectation_config.kwargs.get("column")
    error = _raised(result.exception_info or {})
    if error:
        raise RuntimeError(f"{kind}({column}) on {table} could not be computed: {error}")
    detail = result.to_json_dict()["result"]
    found = detail.get("unexpected_index_list") or []
    return {
        "table": table,
        "expectation": kind,
        "column": column,
        "success": bool(result.success),
        "checked": detail.get("element_count", rows),
        "unexpected": detail.get("unexpected_count", 0),
        "first_rows": [{"id": row["id"], "value": row.get(column)} for row in found[:FIRST_ROWS]],
    }


def _raised(info: dict[str, Any]) -> str | None:
    """The exception's message; the tool nests it one level deeper for an error in a metric."""
    for part in [info, *(value for value in info.values() if isinstance(value, dict))]:
        if part.get("raised_exception"):
            return str(part.get("exception_message"))
    return None
