"""Rows of prompt and response: the one schema, its files, its ids and its split.

An id is a hash of the content, the split a hash of the prompt's question alone: adding rows moves no other row, and one
question never lies on both sides, however it is spaced or encoded.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

Message = dict[str, str]
Prompt = str | list[Message]
Split = Literal["train", "validation", "evaluation"]
OUT_OF_DOMAIN = ("out_of_domain_pool", "out_of_domain_unseen")  # domains that together are `out_of_domain`
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
QUALITIES = ("expert", "mixed", "poor")  # the closed set of quality classes


@dataclass(frozen=True)
class Demonstration:
    """One canonical row.

    `prompt` is text or a list of chat messages ({"role", "content"}); `response` is None where only the prompt is known;
    `answer` serves a verifier, `quality` one of QUALITIES, `source` where the row came from (file:line), `meta` the rest
    (`domain`, `kind`, `verifier` in evaluation rows).
    """

    id: str
    prompt: Prompt
    response: str | None
    source: str
    quality: str | None = None
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def demonstration(prompt: Prompt, response: str | None, source: str, **optional: Any) -> Demonstration:
    """Make a row; its id is the hash of prompt and response."""
    return Demonstration(digest([prompt, response])[:16], prompt, response, source, **optional)


def digest(value: Any) -> str:
    """Hex hash of a JSON value; equal values give equal hashes."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def prompt_id(prompt: Prompt) -> str:
    """The key of a prompt, whatever its responses."""
    return digest(prompt)[:16]


def question(prompt: Prompt) -> Prompt:
    """What a prompt asks, for the split and the check for leaks: composed (NFC), runs of white space as one space, invisible
    characters left out."""
    if not isinstance(prompt, str):
        return [{**message, "content": str(question(message["content"]))} for message in prompt]
    visible = "".join(character for character in prompt if unicodedata.category(character) != "Cf")
    return " ".join(unicodedata.normalize("NFC", _INVISIBLE.sub("", visible)).split())


def split_of(prompt: Prompt, validation_share: float, evaluation_share: float) -> Split:
    """Where a prompt belongs, for ever: decided by the hash of its question alone."""
    place = int(digest(["split", question(prompt)])[:12], 16) / 16**12
    if place < evaluation_share:
        return "evaluation"
    return "validation" if place < evaluation_share + validation_share else "train"


def prompt_text(prompt: Prompt) -> str:
    """The prompt as one text, for lengths and for reading."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def fsync_folder(folder: Path) -> None:
    """Return once the folder's entries are on disk: until then a power cut can undo a rename in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts have no such call
            raise
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[str]]:
    """Open a text file that appears under its name only when it is whole, and is on disk, name and all, when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        fsync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def partial_of(folder: Path) -> Path:
    """Where a folder is written that appears under its name only when it is whole."""
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that appears under its name only when it is whole (until then it is `partial_of` it), and is on disk, name
    and all, when this returns."""
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        fsync_inside(partial)
        partial.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fsync_inside(folder: Path) -> None:
    """Return once all files and folders of a folder are on disk, it itself included."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in [folder, *filter(Path.is_dir, folder.rglob("*"))]:
        fsync_folder(path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")


@dataclass(frozen=True)
class JsonLines:
    """The rows of a file that `write_jsonl` wrote, read anew each time they are gone through."""

    path: Path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a file that `write_jsonl` wrote."""
    return list(JsonLines(path))


def write_demonstrations(path: Path, rows: Iterable[Demonstration]) -> None:
    """Write a table of the canonical schema."""
    write_jsonl(path, (asdict(row) for row in rows))


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Read a table of the canonical schema."""
    return [Demonstration(**row) for row in read_jsonl(path)]
