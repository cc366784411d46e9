"""Rows of a Parquet file in bounded memory: a page may swell to a thousand times its size in the file, as no header tells."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import RecordBatch
from pyarrow.parquet import ParquetFile

BATCH = 16  # rows decoded at once
DECODED = 2**30  # bytes that this may take


def columns_of(path: Path) -> list[str]:
    """The names of the columns. Raises what pyarrow raises on broken bytes."""
    with ParquetFile(path) as file:
        return list(file.schema_arrow.names)


def rows_of(path: Path, largest: int) -> Iterator[dict[str, Any] | int]:
    """The rows in their order; of one that takes more than `largest` bytes only how many.

    Raises MemoryError where a batch takes more than DECODED bytes (on Linux), else what pyarrow raises.
    """
    with ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=BATCH, use_threads=False)
        while True:
            with _limited_memory():
                batch = next(batches, None)
            if batch is None:
                return
            if batch.nbytes <= largest:
                yield from batch.to_pylist()
            else:
                yield from (_row(batch.slice(number, 1), largest) for number in range(batch.num_rows))


def _row(one: RecordBatch, largest: int) -> dict[str, Any] | int:
    """A batch of one row; the dictionary of a column counts for what the row has of it."""
    cells = (cell.dictionary_decode() if hasattr(cell, "dictionary_decode") else cell for cell in one.columns)
    size = sum(cell.nbytes for cell in cells)
    return size if size > largest else one.to_pylist()[0]


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process take DECODED bytes more and no further, on Linux."""
    if sys.platform != "linux":
        yield
        return
    kept = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + DECODED
    resource.setrlimit(resource.RLIMIT_AS, (limit if kept[0] == resource.RLIM_INFINITY else min(limit, kept[0]), kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)
