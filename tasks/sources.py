"""Reading a source of demonstrations: its rows as they stand, and which shape they have."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

from apprentice.sections import SourceConfig
from tasks.stage import StageError

Row = dict[str, Any]
MAX_LINE = 2**22  # bytes of a JSONL line or Parquet row, characters of a CSV line or cell: no longer one is held in memory
SHOWN = 1000  # characters of a text that cannot be used
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


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
        yield from _read_hub(source)
        return
    path = root / source.path
    try:
        if not path.is_file():
            raise StageError(f"ingest.source.path: no file {source.path!r}")
        yield from {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}[source.kind](path)
    except OSError as error:
        raise StageError(f"ingest.source.path: {source.path!r} cannot be read: {error.strerror or error}") from error


def _read_jsonl(path: Path) -> Iterator[Raw]:
    _expect_utf8(path)
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(MAX_LINE)
            if not line:
                return
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                length = len(line) + _skip_line(file)
                yield Raw(number, _shown(line), f"line of {length} bytes, expected fewer than {MAX_LINE}")
            elif line.strip():
                yield _parse_json(number, line)


def _skip_line(file: IO[bytes]) -> int:
    """Read on to the end of the line; how many bytes it had left."""
    skipped = 0
    while chunk := file.readline(MAX_LINE):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def _parse_json(number: int, line: bytes) -> Raw:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_whole)
    except UnicodeDecodeError as error:
        return Raw(number, _shown(line), f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Raw(number, _shown(line), f"not JSON, {error}")
    except RecursionError:
        return Raw(number, _shown(line), "nested too deeply")
    except ValueError as error:  # of the three below
        return Raw(number, _shown(line), str(error))
    if not isinstance(row, dict):
        return Raw(number, _shown(line), f"expected a JSON object, got {type(row).__name__}")
    return Raw(number, row)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"key more than once, {_listed(_twice([name for name, _ in pairs]))}")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"not JSON, {name} is no JSON value")


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:  # Python reads no more than 4300
        raise ValueError(f"a number of {len(digits)} digits") from error


def _shown(line: bytes) -> str:
    return line[:SHOWN].decode("utf-8", errors="backslashreplace").strip()[:SHOWN]


def _line(error: Exception) -> str:
    """A library's message as one line, its control characters as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))


def _twice(names: Sequence[str]) -> set[str]:
    return {name for name, times in Counter(names).items() if times > 1}


def _listed(names: Iterable[str], most: int = 20) -> str:
    """Names from outside, fit for one line of a message."""
    plain = [name if name.isprintable() else ascii(name) for name in sorted(names)]
    rest = f" and {len(plain) - most} more" if len(plain) > most else ""
    return ", ".join(name if len(name) <= 60 else f"{name[:60]}..." for name in plain[:most]) + rest


def _expect_utf8(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(2) in UTF_16:
            raise StageError(
                f"{path.name}: expected UTF-8, got UTF-16 by its first two bytes; `iconv -f UTF-16 -t UTF-8` converts it"
            )


def _read_csv(path: Path) -> Iterator[Raw]:
    """Every cell is text (a data-frame reader would turn the response "72" into a number); an empty one is missing."""
    _expect_utf8(path)
    csv.field_size_limit(MAX_LINE)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader, line = csv.reader(_bounded_lines(file), strict=True), 1
        try:
            header: list[str] = []
            for cells in reader:
                if cells and not header:
                    header = cells
                    _expect_once(path, header)
                elif cells and len(cells) == len(header):
                    yield Raw(line, {name: cell or None for name, cell in zip(header, cells, strict=True)})
                elif cells:
                    yield Raw(line, ",".join(cells)[:SHOWN], f"{len(cells)} cells under {len(header)} columns")
                line = reader.line_num + 1
        except csv.Error as error:
            raise StageError(f"{path.name}: the CSV row that begins on line {line} is broken: {error}") from error


def _bounded_lines(file: IO[str]) -> Iterator[str]:
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise csv.Error(f"line of {MAX_LINE} characters or more")
        yield line


def _expect_once(path: Path, columns: Sequence[str]) -> None:
    if twice := _twice(columns):
        raise StageError(f"{path.name}: expected each column once, got {_listed(twice)} more than once; rename or drop it")


def _read_parquet(path: Path) -> Iterator[Raw]:
    from tasks.parquet import BATCH, DECODED, columns_of, rows_of

    number = 0
    try:
        names = columns_of(path)
        _expect_once(path, names)
        for number, row in enumerate(rows_of(path, MAX_LINE), 1):
            if isinstance(row, int):
                yield Raw(number, f"columns {_listed(names)}", f"row of {row} bytes, expected at most {MAX_LINE}")
            else:
                yield Raw(number, row)
    except StageError:
        raise
    except MemoryError as error:
        raise StageError(
            f"{path.name}: after row {number} it takes more than {DECODED:,} bytes to decode {BATCH} rows; write it again "
            "without the cells that are so large"
        ) from error
    except Exception as error:  # pyarrow raises all sorts on broken bytes
        where = f"after row {number}" if number else "from its start"
        raise StageError(
            f"{path.name}: expected a Parquet file, and it cannot be read as one {where}: {_line(error)}"
        ) from error


def _read_hub(source: SourceConfig) -> Iterator[Raw]:
    from datasets import load_dataset

    if Path(str(source.name)).exists():
        raise StageError(f"ingest.source.name: {source.name!r} is a local path, expected a data set of the hub")
    try:
        rows = load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
        for number, row in enumerate(rows, 1):
            yield Raw(number, dict(row))
    except Exception as error:  # of datasets, fsspec or the network
        raise StageError(f"ingest.source: cannot load {source.name!r} from the hub: {_line(error)}") from error


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


def recognise(rows: Iterable[Raw], fields: dict[str, str]) -> Shape:
    """The shape of most rows, with `ingest.fields` laid over it; of the rows only their columns are kept.

    Raises StageError, naming the columns found, when no row can be read, no shape fits or a mapped column does not exist.
    """
    columns, first, read = Counter[frozenset[str]](), None, 0
    for raw in rows:
        first, read = first or raw, read + 1
        if isinstance(raw.row, dict):
            columns[frozenset(raw.row)] += 1
    if first is None:
        raise StageError("no rows in it")
    if not columns:
        raise StageError(f"none of the {read} rows can be read; the first, line {first.line}: {first.error}")
    found = _listed(set().union(*columns)) or "none"
    for field, column in fields.items():
        if not any(column in names for names in columns):
            raise StageError(f"ingest.fields.{field}: no column {column!r} in the source; its columns: {found}")
    if {"prompt", "response"} <= set(fields):
        return Shape("ingest.fields", tuple(fields.values()), _by_columns(fields))
    counts = {shape: sum(times * names.issuperset(shape.columns) for names, times in columns.items()) for shape in SHAPES}
    best = max(SHAPES, key=lambda shape: counts[shape])
    if not counts[best]:
        known = "; ".join(" + ".join(shape.columns) for shape in SHAPES)
        raise StageError(
            f"the source has the columns {found}; known are {known}. "
            "Name yours in params.yaml, e.g. ingest.fields: {prompt: my_column, response: my_other_column}"
        )
    read, mapped = best.read, _by_columns(fields)
    return best._replace(read=lambda row: {**read(row), **mapped(row)})
