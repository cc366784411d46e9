"""Reading a source of demonstrations: its rows as they stand, and which shape they have."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apprentice.sections import SourceConfig
from tasks.stage import StageError

Row = dict[str, Any]


class Raw(NamedTuple):
    """One row of a source: its line (or number, without lines), what stood there, and why it is unreadable."""

    line: int
    row: Row | str
    error: str | None = None


class Shape(NamedTuple):
    """A known arrangement of columns and how it becomes prompt, response, answer, quality and source."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Row]


def read_source(source: SourceConfig, root: Path) -> Iterator[Raw]:
    """The rows of a source, its path under `root`, in their order; an unreadable one comes with its error.

    Raises StageError where the source as a whole cannot be read.
    """
    if source.kind == "hub":
        return _read_hub(source)
    path = root / source.path
    if not path.is_file():
        raise StageError(f"ingest.source.path: no file {source.path!r}")
    return {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}[source.kind](path)


def _read_jsonl(path: Path) -> Iterator[Raw]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse_json(number, line)


def _parse_json(number: int, line: bytes) -> Raw:
    shown = line.decode("utf-8", errors="backslashreplace").strip()[:1000]
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return Raw(number, shown, f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Raw(number, shown, f"not JSON, {error}")
    if not isinstance(row, dict):
        return Raw(number, shown, f"expected a JSON object, got {type(row).__name__}")
    return Raw(number, row)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _read_csv(path: Path) -> Iterator[Raw]:
    """Every cell is text (a data-frame reader would turn the response "72" into a number); an empty one is missing."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader, line = csv.reader(file, strict=True), 1
        try:
            header, line = next(reader, []), reader.line_num + 1
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise StageError(
                    f"{path.name}: expected each column once, got {', '.join(twice)} more than once; rename or drop it"
                )
            for cells in reader:
                if len(cells) == len(header):
                    yield Raw(line, {name: cell or None for name, cell in zip(header, cells, strict=True)})
                elif cells:
                    yield Raw(line, ",".join(cells)[:1000], f"{len(cells)} cells under {len(header)} columns")
                line = reader.line_num + 1
        except csv.Error as error:
            raise StageError(f"{path.name}: the CSV row that begins on line {line} is broken: {error}") from error


def _read_parquet(path: Path) -> Iterator[Raw]:
    from datasets import load_dataset

    try:
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield Raw(number, dict(row))
    except Exception as error:  # of pyarrow, datasets or fsspec
        raise StageError(f"{path.name}: expected a Parquet file, and it cannot be read as one: {error}") from error


def _read_hub(source: SourceConfig) -> Iterator[Raw]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
    except Exception as error:
        raise StageError(f"ingest.source: cannot load {source.name!r} from the hub: {error}") from error
    return (Raw(number, dict(row)) for number, row in enumerate(rows, 1))


def _by_columns(mapping: dict[str, str]) -> Callable[[Row], Row]:
    return lambda row: {field: row.get(column) for field, column in mapping.items()}


def _read_messages(row: Row) -> Row:
    """The last assistant message is the response; a chat that ends otherwise is a prompt alone."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return {"prompt": messages}
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") == "assistant":
        return {"prompt": messages[:-1], "response": last.get("content")}
    return {"prompt": messages}


def _read_alpaca(row: Row) -> Row:
    instruction, context = row.get("instruction"), row.get("input")
    if isinstance(instruction, str) and isinstance(context, str) and context.strip():
        instruction = f"{instruction}\n\n{context}"
    return {"prompt": instruction, "response": row.get("output")}


def _prompt_and(response: str) -> Callable[[Row], Row]:
    return _by_columns({"prompt": "prompt", "response": response, "answer": "answer", "quality": "quality"})


SHAPES = (
    Shape("messages", ("messages",), _read_messages),
    Shape("prompt/completion", ("prompt", "completion"), _prompt_and("completion")),
    Shape("prompt/response", ("prompt", "response"), _prompt_and("response")),
    Shape("alpaca", ("instruction", "output"), _read_alpaca),
    Shape("question/answer", ("question", "answer"), _by_columns({"prompt": "question", "response": "answer"})),
)


def recognise(rows: Sequence[Raw], fields: dict[str, str]) -> Shape:
    """The shape of most rows, with `ingest.fields` laid over it.

    Raises StageError, naming the columns found, when no shape fits or a mapped column does not exist.
    """
    columns = [set(raw.row) for raw in rows if isinstance(raw.row, dict)]
    found = ", ".join(sorted(set().union(*columns))) or "none"
    for field, column in fields.items():
        if not any(column in names for names in columns):
            raise StageError(f"ingest.fields.{field}: no column {column!r} in the source; its columns: {found}")
    if {"prompt", "response"} <= set(fields):
        return Shape("ingest.fields", tuple(fields.values()), _by_columns(fields))
    counts = {shape: sum(names.issuperset(shape.columns) for names in columns) for shape in SHAPES}
    best = max(SHAPES, key=lambda shape: counts[shape])
    if not counts[best]:
        known = "; ".join(" + ".join(shape.columns) for shape in SHAPES)
        raise StageError(
            f"the source has the columns {found}; known are {known}. "
            "Name yours in params.yaml, e.g. ingest.fields: {prompt: my_column, response: my_other_column}"
        )
    read, mapped = best.read, _by_columns(fields)
    return best._replace(read=lambda row: {**read(row), **mapped(row)})
