"""The canonical schema: ids, the split and the files."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.demonstrations import (
    Demonstration,
    atomic_write,
    demonstration,
    digest,
    fsync_folder,
    prompt_id,
    prompt_text,
    question,
    read_demonstrations,
    split_of,
    write_demonstrations,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), max_size=3)
prompts = st.one_of(texts, messages)
shares = st.floats(0, 0.5)


def test_id_follows_prompt_and_response_alone() -> None:
    row = demonstration("2 + 2", "4", "a.jsonl:1")
    assert row.id == demonstration("2 + 2", "4", "b.jsonl:9", quality="poor", answer="4", meta={"x": 1}).id
    assert row.id != demonstration("2 + 2", "5", "a.jsonl:1").id
    assert row.id != demonstration("2 + 2", None, "a.jsonl:1").id
    assert row.id == "6aa6625f2af3e520"  # a changed hash would rename every row and move every split


def test_digest_ignores_the_order_of_keys_only() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(["a", "b"]) != digest(["b", "a"]) != digest("ab")
    assert prompt_id([{"role": "user", "content": "x"}]) == prompt_id([{"content": "x", "role": "user"}])


VARIANTS = [
    "How many caf\u00e9s  are\there?",
    "How many\u00a0caf\u00e9s\n\nare here?",
    " How many cafe\u0301s are here? ",
    "How many ca\u200bf\u00e9s are here?",
    "How many ca\u00adf\u00e9s are here?",
    "\ufeffHow many caf\u00e9s are\u2060 here?",
    "\u202eHow many cafe\u200d\u0301s are here?\u202c",
    "How many caf\u00e9s\ufe0f are here?",
]


def test_one_question_however_it_is_spaced_or_encoded_lies_on_one_side() -> None:
    plain = "How many caf\u00e9s are here?"
    assert question(plain) == plain
    assert {question(text) for text in VARIANTS} == {plain}
    assert len({prompt_id(text) for text in [plain, *VARIANTS]}) == len(VARIANTS) + 1  # the rows stay apart
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert len({split_of(text, 0.05, share) for text in [plain, *VARIANTS]}) == 1
        chats = [[{"role": "system", "content": "x"}, {"role": "user", "content": text}] for text in [plain, *VARIANTS]]
        assert len({split_of(chat, 0.05, share) for chat in chats}) == 1
    assert question("x\u00b2 + 1") != question("x2 + 1") and question("Tom") != question("tom")


def test_shares_of_the_split() -> None:
    counts = {"train": 0, "validation": 0, "evaluation": 0}
    for number in range(10000):
        counts[split_of(f"prompt {number}", 0.1, 0.2)] += 1
    assert counts["train"] == pytest.approx(7000, abs=200)
    assert counts["validation"] == pytest.approx(1000, abs=150)
    assert counts["evaluation"] == pytest.approx(2000, abs=200)


@given(prompts, shares, st.floats(0, 0.4))
def test_a_larger_validation_share_takes_from_train_alone(prompt: object, evaluation: float, more: float) -> None:
    before, after = (split_of(prompt, share, evaluation) for share in (0.05, 0.05 + more))
    assert before == after or (before, after) == ("train", "validation")


@given(prompts)
def test_split_at_the_ends(prompt: object) -> None:
    assert split_of(prompt, 0, 0) == "train"
    assert split_of(prompt, 0, 1) == "evaluation"
    assert split_of(prompt, 1, 0) == "validation"


@given(st.lists(st.builds(demonstration, prompts, st.none() | texts, texts, answer=st.none() | texts), max_size=5))
def test_tables_survive_the_file(tmp_path_factory: pytest.TempPathFactory, rows: list[Demonstration]) -> None:
    path = tmp_path_factory.mktemp("tables") / "rows.jsonl"
    write_demonstrations(path, rows)
    assert read_demonstrations(path) == rows
    assert path.read_bytes().count(b"\n") == len(rows)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_on_disk_before_it_has_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, forced = tmp_path / "rows.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda handle: forced.append((os.fstat(handle).st_ino, path.exists())))
    with atomic_write(path) as file:
        file.write("rows")
    assert forced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_only_a_file_system_without_fsync_of_folders_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    def fails(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with nullcontext() if passes else pytest.raises(OSError, match=os.strerror(errno.EIO)):
        assert fsync_folder(tmp_path) is None


def test_prompt_text_reads_a_chat_in_order() -> None:
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert prompt_text(chat) == "system: be brief\nuser: hi"
    assert prompt_text("hi") == "hi"
