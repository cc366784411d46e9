"""Broken bytes through the readers: rows, rejected rows or one clear message come out, nothing else.

Case N of a format is the same on every machine, so a failure is repeated by its number. A few seconds by default;
`make fuzz SECONDS=600` goes on for longer.
"""

import os
import random
import time
from itertools import count
from pathlib import Path

import pytest

from tasks import ingest
from tasks.cleaning import clean
from tasks.sources import read_source, recognise
from tasks.stage import StageError
from tests.malformed.cases import GOOD, LINES, Case, among, csv_among, table
from tests.malformed.test_malformed import params_of, strict_rows

SECONDS = float(os.environ.get("FUZZ_SECONDS", "2"))  # for each format
LEAST = 20  # cases, however slow the machine
CHAT = [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "4"}]} for row in GOOD]
SEEDS = {
    "jsonl": [among([line for _, line, _ in LINES]), among([])],
    "csv": [csv_among(['"a ""b""\n",4', "1,2,3", ","]), csv_among([]).replace(b"\n", b"\r\n")],
    "parquet": [table(GOOD), table(CHAT), table([{**row, "answer": 1.5, "more": {"a": [1, None]}} for row in GOOD])],
}
PIECES = [
    b'"',
    b"\n",
    b"\r",
    b",",
    b"\\",
    b"{",
    b"[",
    b"]",
    b"}",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b"1e999",
    b"NaN",
]
PIECES += [b"9" * 5000, b"[" * 3000, b'"prompt": ', b"<eos>", b"PAR1", b"\x7f\xff\xff\xff", b"\xed\xa0\x80"]


def mutated(seeds: list[bytes], rng: random.Random) -> bytes:
    """A seed after one to eight changes: bytes set, parts cut out, doubled, put elsewhere or taken from another seed."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 8)):
        start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        end = min(end, start + rng.choice([1, 10, 1000]))
        match rng.randrange(6):
            case 0:
                data[start:end] = rng.randbytes(end - start)
            case 1:
                data[start:start] = rng.choice(PIECES)
            case 2:
                del data[start:end]
            case 3:
                data[start:start] = data[start:end] * rng.randint(1, 3)
            case 4:
                other = rng.choice(seeds)
                at = rng.randrange(len(other))
                data[start:end] = other[at : at + end - start]
            case 5:
                del data[max(start, 1) :]
        data = data or bytearray(b"\n")
    return bytes(data)


def read(kind: str, folder: Path) -> None:
    """What `ingest` does with a file up to its tables; every row of it is kept or rejected, once."""
    config = params_of(Case("fuzz", kind, lambda folder: None, f"source.{kind}")).ingest
    raws = list(read_source(config.source, folder))
    if not raws:
        return
    found = clean(raws, recognise(raws, {}).read, config, "source")
    ingest._write_rejected(folder / "rejected.jsonl", found.rejected, raws)
    rejected = strict_rows(folder / "rejected.jsonl")
    lines = [line for line, _ in found.kept] + [row["line"] for row in rejected]
    assert sorted(lines) == [raw.line for raw in raws] and len(set(lines)) == len(lines) and min(lines) > 0
    assert all(row["reason"] for row in rejected)


@pytest.mark.parametrize("kind", SEEDS)
def test_broken_bytes_give_rows_or_one_of_our_errors(kind: str, tmp_path: Path) -> None:
    end, stopped = time.monotonic() + SECONDS, 0
    for number in count():
        if number >= LEAST and time.monotonic() > end:
            break
        (tmp_path / f"source.{kind}").write_bytes(mutated(SEEDS[kind], random.Random(f"{kind} {number}")))
        try:
            read(kind, tmp_path)
        except StageError as error:
            stopped += 1
            assert str(error).isprintable(), f"{kind} {number}: {error}"
        except Exception as error:
            raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
    print(f"{kind}: {number} cases, {stopped} stopped with a message")
