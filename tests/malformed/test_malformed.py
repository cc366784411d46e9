"""Every malformed source through the stage itself: a clear message, or every row accounted for; nothing else."""

import dataclasses
import json
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.config import Params, ParamsError, parse
from apprentice.tokens import SPECIAL, encode_prompt, encode_response, train_word_tokenizer
from tasks import ingest
from tasks.sources import MAX_LINE, read_source
from tasks.stage import Stage, StageError
from tests.conftest import ROOT, Project, changed
from tests.malformed.cases import GOOD, HARMLESS, MANY, Case, cases, swelling

CASES = cases()
RAW = changed(yaml.safe_load((ROOT / "params.yaml").read_text()), {"ingest.max_rejected_share": 1.0})
SHIPPED = parse(RAW)
TABLES = ("demonstrations", "validation", "evaluation", "suboptimal", "prompts")
SECONDS = 60  # a case takes milliseconds, on a busy machine with 50 MB a few seconds


@dataclass
class Outcome:
    """What became of a case."""

    crash: str = ""
    stopped: str = ""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def params_of(case: Case) -> Params:
    """The shipped params with the case's source and changes."""
    params = parse(changed(RAW, case.changes)) if case.changes else SHIPPED
    source = dataclasses.replace(params.ingest.source, kind=case.kind, path=case.file)
    return dataclasses.replace(params, ingest=dataclasses.replace(params.ingest, source=source))


def run_case(case: Case, folder: Path) -> Outcome:
    """Run `ingest` in an empty project; any error but ours is a crash."""
    project = folder / "project"
    project.mkdir(parents=True)
    case.make(project)
    found, began = Outcome(), time.monotonic()
    try:
        stage = Stage("ingest", params_of(case))
        stage.data, stage.reports = project / "data", project / "data" / "reports"
        ingest.main(stage)
    except (StageError, ParamsError) as error:
        found.stopped = str(error)
    except Exception as error:
        found.crash = f"{type(error).__name__}: {error}"
    found.seconds = time.monotonic() - began
    metrics, clean = project / "data" / "reports" / "metrics.json", project / "data" / "clean"
    if metrics.exists():
        found.figures = json.loads(metrics.read_text())
        found.tables = {name: strict_rows(clean / f"{name}.jsonl") for name in TABLES}
    if (clean / "rejected.jsonl").exists():
        found.rejected = strict_rows(clean / "rejected.jsonl")
    return found


def strict_rows(path: Path) -> list[dict[str, Any]]:
    """A JSONL file by the letter of the standard."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path.name} holds {name}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All cases, each run once."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("malformed")
    patch.delenv("DVC_ROOT", raising=False)
    found = {case.name: run_case(case, folder / str(number)) for number, case in enumerate(CASES)}
    patch.undo()
    return found


def faults(case: Case, found: Outcome) -> list[str]:
    """What is wrong with an outcome; rows are accounted for by reading the tables again, not by the stage's counts alone."""
    if found.crash:
        return [f"crash: {found.crash}"]
    wrong = [] if found.seconds < SECONDS else [f"took {found.seconds:.0f} s"]
    if bool(case.stops) != bool(found.stopped) or not re.search(case.stops, found.stopped):
        wrong.append(f"said {found.stopped!r}, expected {case.stops!r}")
    if found.stopped and ("Traceback" in found.stopped or "\n" in found.stopped or not found.stopped.isprintable()):
        wrong.append(f"no plain message: {found.stopped!r}")
    reasons, given = [reason for reason in case.rows if reason], [row["reason"] for row in found.rejected]
    if len(given) != len(reasons) or not all(map(str.startswith, given, reasons)):
        wrong.append(f"rejected {given}, expected {reasons}")
    if case.first_line is not None and found.rejected and None not in case.rows:
        lines = list(range(case.first_line, case.first_line + len(reasons)))
        if [row["line"] for row in found.rejected] != lines:
            wrong.append(f"rejected lines {[row['line'] for row in found.rejected]}, expected {lines}")
    if any(len(json.dumps(row)) > 50_000 for row in found.rejected):
        wrong.append("a rejected row is not shortened")
    return wrong + (unaccounted(case, found) if found.figures else [])


def unaccounted(case: Case, found: Outcome) -> list[str]:
    """Rows that are neither in a table, nor rejected, nor counted as unused."""
    figures, read = found.figures, case.good + len(case.rows)
    kept = read - sum(reason is not None for reason in case.rows)
    counts = {"rows_read": read, "rows_kept": kept, "rows_rejected": len(found.rejected)}
    wrong = [f"{name} {figures[name]}, expected {count}" for name, count in counts.items() if figures[name] != count]
    placed = sum(len(found.tables[name]) for name in TABLES[:-1]) + figures["unused"]
    sources = {row["source"] for name in TABLES[:-1] for row in found.tables[name]}
    alone = sum(row["source"] not in sources for row in found.tables["prompts"])  # prompts of the pool without a response
    if placed + alone != kept:
        wrong.append(f"{kept} rows kept, {placed} placed and {alone} in the pool alone")
    prompts = {json.dumps(row["prompt"]) for name in TABLES for row in found.tables[name]}
    lost = [row["prompt"] for row in GOOD[: case.good] if json.dumps(row["prompt"]) not in prompts]
    return wrong + ([f"lost {lost[:3]}"] if lost else [])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_malformed_source_becomes_what_the_case_says(case: Case, outcomes: dict[str, Outcome]) -> None:
    assert faults(case, outcomes[case.name]) == []


def test_no_case_crashes_and_no_row_is_unaccounted_for(outcomes: dict[str, Outcome]) -> None:
    kinds = Counter(
        "stopped" if found.stopped else "rows rejected" if found.rejected else "accepted" for found in outcomes.values()
    )
    crashes = [name for name, found in outcomes.items() if found.crash]
    rows = [case.name for case in CASES if outcomes[case.name].figures and unaccounted(case, outcomes[case.name])]
    print(f"{len(CASES)} cases, {dict(kinds)}, {len(crashes)} crashes, {len(rows)} with rows unaccounted for")
    assert len({case.name for case in CASES}) == len(CASES) >= 200
    assert crashes == [] and rows == []
    assert min(kinds[kind] for kind in ("stopped", "rows rejected", "accepted")) >= 30


def test_a_line_of_50_mb_is_never_held_in_memory(tmp_path: Path) -> None:
    (case,) = [case for case in CASES if case.name == "line: 50 MB, middle"]
    case.make(tmp_path)
    tracemalloc.start()
    try:
        raws = list(read_source(params_of(case).ingest.source, tmp_path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(raws) == 1 + len(GOOD)
    assert peak < 5 * MAX_LINE < MANY


def test_of_a_source_only_the_rows_that_can_be_used_are_held(tmp_path: Path, stage_of: Callable[..., Any]) -> None:
    """30 MB of a row without a response."""
    path, pair = tmp_path / "source.jsonl", json.dumps({"prompt": "why? " * 4000, "response": ""})
    path.write_text(f"{pair}\n" * 1500 + "".join(json.dumps({"prompt": f"{n}?", "response": "so"}) + "\n" for n in range(500)))
    own = {"source.kind": "jsonl", "source.path": "source.jsonl", "max_rejected_share": 1.0}
    stage = stage_of("ingest", **{f"ingest.{name}": value for name, value in own.items()})
    tracemalloc.start()
    try:
        ingest.main(stage)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert json.loads((stage.reports / "metrics.json").read_text())["rows_read"] == 2000
    assert peak < 8 * 2**20 < path.stat().st_size


READING = """
import resource, sys
from pathlib import Path
from tasks.parquet import rows_of
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    found = sum(isinstance(row, int) for row in rows_of(Path(sys.argv[1]), 2**22))
except MemoryError:
    found = -1
print(found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
@pytest.mark.parametrize(("cell", "rows", "found"), [(5 * 2**20, 1000, 1000), (MANY, 200, -1)])
def test_parquet_that_swells_to_gigabytes_is_read_in_bounded_memory(tmp_path: Path, cell: int, rows: int, found: int) -> None:
    """5 and 10 GiB in files of a few MB; the peak of a process of its own, in MiB."""
    path = tmp_path / "source.parquet"
    path.write_bytes(swelling(cell, rows))
    assert path.stat().st_size < 5 * 2**20
    done = subprocess.run([sys.executable, "-c", READING, path], cwd=ROOT, capture_output=True, text=True, check=True)
    rejected, peak = map(int, done.stdout.split())
    assert rejected == found and peak < 1200


@pytest.mark.parametrize("name", HARMLESS)
def test_text_that_looks_like_special_tokens_stays_text(name: str) -> None:
    tokenizer = train_word_tokenizer([*HARMLESS.values()], 4096)
    special = set(tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    marks = [token for token in encode_prompt(tokenizer, HARMLESS[name]) if token in special]
    assert tokenizer.convert_ids_to_tokens(marks) == ["<bos>", "<user>", "<assistant>"]
    assert [token for token in encode_response(tokenizer, HARMLESS[name]) if token in special] == [tokenizer.eos_token_id]


@pytest.mark.slow
def test_the_program_says_one_line_and_no_traceback(project: Project) -> None:
    wanted = (
        "file: utf-16 as jsonl",
        "file: ugly columns",
        "file: parquet of broken pages",
        "file: quote never closed",
        "path: a link out",
        "path: a NUL",
    )
    found = {case.name: case for case in CASES if case.name in wanted}
    project.without_git()
    for name in wanted:
        found[name].make(project.root)
        project.set(ingest__source__kind=found[name].kind, ingest__source__path=found[name].file)
        done = project.run("-m", "tasks.ingest", PYTHONIOENCODING="ascii:strict")
        assert done.returncode == 2, name
        (said,) = done.stderr.splitlines()
        assert re.match(rf"\[ingest\] StageError: .*({found[name].stops})", said), (name, said)


@pytest.mark.slow
def test_the_program_goes_on_past_rows_that_cannot_be_used(project: Project) -> None:
    (case,) = [case for case in CASES if case.name == "line: nested 900 deep, unusable, middle"]
    case.make(project.root)
    project.without_git()
    project.set(ingest__source__kind="jsonl", ingest__source__path=case.file)
    done = project.run("-m", "tasks.ingest")
    assert done.returncode == 0, done.stderr
    assert "61 rows read, 60 kept, 1 rejected (1 wrong type)" in done.stdout
