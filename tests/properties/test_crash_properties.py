"""A crash at any point of a write: what stood there before stays whole and readable, and the next write goes through."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from apprentice.demonstrations import atomic_write, read_jsonl, write_jsonl
from tasks.resume import load_state, save_state
from tests.conftest import ROOT
from tests.properties.strategies import printable, steady


class Crash(BaseException):
    """Stands for the end of the process."""


@contextmanager
def crash_at(point: int, half: bool, *steps: tuple[Any, str]) -> Iterator[list[str]]:
    """Raise at the call of that number, counted from 0 over all these functions: before it, or once it has done half its work.

    Yields the names of the calls begun so far.
    """
    begun: list[str] = []
    patches = pytest.MonkeyPatch()

    def counted(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            begun.append(name)
            if len(begun) <= point:
                return whole(*given, **options)
            if len(begun) == point + 1 and half and name in HALVES:
                HALVES[name](*given)
            raise Crash  # also in what would run after it: the process is gone

        return call

    for owner, name in steps:
        patches.setattr(owner, name, counted(name, getattr(owner, name)))
    try:
        yield begun
    finally:
        patches.undo()


def half_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode()[: len(text) // 2])


def half_removed(folder: Path, ignore_errors: bool = True) -> None:
    for path in sorted(folder.iterdir())[:1] if folder.exists() else []:
        path.unlink()


HALVES: dict[str, Callable[..., Any]] = {
    "write_text": half_text,
    "rmtree": half_removed,
    "save_file": lambda tensors, path: path.write_bytes(b"torn"),
}
FILE_STEPS = ((tempfile, "mkstemp"), (os, "fsync"), (os, "chmod"), (os, "replace"), (Path, "unlink"))
STATE_STEPS = (
    *((Path, name) for name in ("mkdir", "rename", "write_text")),
    (shutil, "rmtree"),
    (os, "fsync"),
    (safetensors.torch, "save_file"),
)
contents = st.lists(printable | st.sampled_from(["\n", "x" * 20000]), max_size=4)


@steady(60)
@given(old=st.none() | printable, pieces=contents, stop=st.integers(0, 5), surrogate=st.booleans())
def test_an_error_while_writing_leaves_the_old_file_and_no_other(
    old: str | None, pieces: list[str], stop: int, surrogate: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        if old is not None:
            path.write_bytes(old.encode())
        before = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        with pytest.raises(UnicodeEncodeError if surrogate else Crash), atomic_write(path) as file:
            for piece in pieces[:stop]:
                file.write(piece)
                assert old is None or path.read_bytes() == old.encode()
            if surrogate:
                file.write("\ud800")  # what UTF-8 cannot hold
                file.flush()
            raise Crash
        assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == before


@steady(60)
@given(old=contents, new=contents, point=st.integers(0, 5))
def test_a_crash_at_any_step_leaves_the_old_file_or_the_new_one_whole(old: list[str], new: list[str], point: int) -> None:
    rows = [[{"text": text} for text in some] for some in (old, new)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_jsonl(path, rows[0])
        with suppress(Crash), crash_at(point, False, *FILE_STEPS) as begun:
            write_jsonl(path, rows[1])
        assert read_jsonl(path) == rows[point >= 4]
        steps = [name for name in begun if name != "unlink"]  # that one is tried after the crash, in vain
        # it is on disk before it has the name, and then the name is
        assert steps == ["mkstemp", "fsync", "chmod", "replace", "fsync"][: point + 1]
        write_jsonl(path, rows[0])
        assert read_jsonl(path) == rows[0]


@pytest.mark.parametrize("step", ["writing", "fsync", "chmod", "replace"])
def test_a_killed_process_leaves_the_old_file(tmp_path: Path, step: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")
    code = (
        "import os, signal, sys; from pathlib import Path; from apprentice.demonstrations import atomic_write\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[2] != 'writing': setattr(os, sys.argv[2], die)\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write('x' * 100000)\n"
        "    if sys.argv[2] == 'writing': die()\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path), step], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old\n"


tensors = st.builds(
    lambda values, dtype, columns: torch.tensor(values).to(dtype).reshape(-1, columns).mT,
    st.lists(st.floats(width=32), max_size=3).map(lambda values: values * 2),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    st.sampled_from([1, 2]),
)
# no "/" in a name, as a tensor's place is written a/b/c, and none as long as "tensor", which refers to one
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), max_size=4)
leaves = st.one_of(tensors, st.lists(tensors, max_size=3), st.none(), st.booleans(), st.integers(), st.floats(), printable)
states = st.dictionaries(
    names,
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6),
    max_size=3,
)


def plain(value: Any) -> Any:
    """A state as JSON text would have it, tensors by type, shape and bytes: equal ones are equal bit for bit, NaN included."""
    if isinstance(value, torch.Tensor):
        bits = value.contiguous().view(-1).view(torch.uint8) if value.numel() else value.new_zeros(0)
        return ["tensor", str(value.dtype), list(value.shape), bits.tolist()]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def text_of(state: Any) -> str:
    return json.dumps(plain(state), sort_keys=True)


@steady(60)
@given(states)
def test_a_state_comes_back_bit_for_bit(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "last", state)
        assert text_of(load_state(Path(folder) / "last")) == text_of(state)
        assert [path.name for path in Path(folder).iterdir()] == ["last"]


def state_of(number: int) -> dict[str, Any]:
    return {"step": number, "weights": torch.full((3,), float(number))}


@pytest.mark.parametrize("rename", [0, 1])
def test_a_crash_at_either_rename_leaves_the_previous_state(tmp_path: Path, rename: int) -> None:
    save_state(tmp_path / "last", state_of(1))
    with pytest.raises(Crash), crash_at(rename, False, (Path, "rename")) as begun:
        save_state(tmp_path / "last", state_of(2))
    assert begun == ["rename"] * (rename + 1)
    assert text_of(load_state(tmp_path / "last")) == text_of(state_of(1))
    save_state(tmp_path / "last", state_of(3))
    assert text_of(load_state(tmp_path / "last")) == text_of(state_of(3))


@steady(60)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=6))
def test_crashes_at_any_steps_of_any_saves_leave_the_last_whole_state(crashes: list[tuple[int, bool]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "last"
        kept = 0
        for number, (point, half) in enumerate(crashes, 1):
            with suppress(Crash), crash_at(point, half, *STATE_STEPS):
                save_state(folder, state_of(number))
            found = load_state(folder)
            assert found is not None or not kept
            if found is not None:
                assert found["step"] in (kept, number)  # the previous one, or the new one once it has its name
                assert text_of(found) == text_of(state_of(found["step"]))
                kept = found["step"]
        save_state(folder, state_of(99))
        assert text_of(load_state(folder)) == text_of(state_of(99))
        assert [path.name for path in Path(name).iterdir()] == ["last"]


def test_no_two_crashes_in_a_row_lose_the_state() -> None:
    """Every step of one save, then every step of the next."""
    for first, second in itertools.product(range(13), repeat=2):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "last"
            save_state(folder, state_of(1))
            for number, point in ((2, first), (3, second)):
                with suppress(Crash), crash_at(point, False, *STATE_STEPS):
                    save_state(folder, state_of(number))
            assert load_state(folder) is not None, (first, second)
