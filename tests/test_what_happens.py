"""README's table "What happens when": each line is covered by tests that tests/what_happens.md names, and they exist."""

import ast
import re

from tests import readme
from tests.imports import ROOT, tree_of

MAP = "tests/what_happens.md"


def rows(text: str) -> list[list[str]]:
    """Cells of the lines of a markdown table, its head left out."""
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]


def told() -> list[str]:
    """The cases that README.md tells of."""
    section = readme.text().partition("### What happens when\n")[2]
    return [row[0] for row in rows(re.split(r"^#", section, flags=re.MULTILINE)[0])]


def covered() -> list[tuple[str, list[str]]]:
    """Each case of the map with its tests, `file::function`."""
    found = rows((ROOT / MAP).read_text(encoding="utf-8"))
    return [(case, re.findall(r"`([^`]+)`", tests)) for case, tests in found]


def functions_of(path: str) -> set[str]:
    """Names of the test functions of a file, which is not run."""
    if not (ROOT / path).is_file():
        return set()
    nodes = [node for node in tree_of(path).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name for node in nodes if node.name.startswith("test_")}


def test_every_line_of_the_table_has_its_entry_and_every_entry_its_line() -> None:
    cases, entries = told(), [case for case, _ in covered()]
    assert cases and len(set(cases)) == len(cases), "README.md tells of a case twice, or has no such table"
    assert [case for case in cases if case not in entries] == [], f"add `| case | tests |` to {MAP}"
    assert [case for case in entries if case not in cases] == [], f"README.md has no such line: take it out of {MAP}"
    assert len(set(entries)) == len(entries), f"{MAP} has a case twice"


def test_every_case_is_covered_by_tests_that_exist() -> None:
    entries = covered()
    assert entries and [case for case, tests in entries if not tests] == [], "no test is named for these"
    named = [(case, *test.partition("::")[::2]) for case, tests in entries for test in tests]
    assert [entry for entry in named if entry[2] not in functions_of(entry[1])] == []
