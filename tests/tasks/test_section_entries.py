"""Entries of sections that choose what a stage learns from or answers as, without training anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apprentice.demonstrations import demonstration, write_demonstrations
from apprentice.tokens import encode_prompt, train_word_tokenizer
from tasks import checkpoints, crlft, fine_tuning
from tasks.ppo_training import prompts_of
from tasks.stage import Stage, StageError

StageOf = Callable[..., Stage]


def row(prompt: str, response: str | None, quality: str | None = None) -> Any:
    return demonstration(prompt, response, "by hand", quality=quality)


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Two demonstrated prompts, one of them twice; a pool of one of them and two more; a poor row."""
    folder = tmp_path / "data" / "clean"
    folder.mkdir(parents=True)
    shown = [row("a", "x", "expert"), row("a", "y", "expert"), row("b", "x", "expert")]
    write_demonstrations(folder / "demonstrations.jsonl", shown)
    write_demonstrations(folder / "prompts.jsonl", [row(prompt, None) for prompt in "bcd"])
    write_demonstrations(folder / "suboptimal.jsonl", [row("c", "y", "poor")])
    return folder


@pytest.mark.parametrize(("prompts", "expected"), [("pool", "bcd"), ("demonstrated", "ab"), ("new", "cd")])
@pytest.mark.parametrize("stage", ["srppo", "srppo_tuned"])
def test_ppo_takes_the_prompts_that_its_section_names(
    clean: Path, stage_of: StageOf, stage: str, prompts: str, expected: str
) -> None:
    assert [one.prompt for one in prompts_of(stage_of(stage, **{f"{stage}.prompts": prompts}))] == list(expected)


def test_a_pool_that_is_all_demonstrated_has_no_new_prompt(clean: Path, stage_of: StageOf) -> None:
    write_demonstrations(clean / "prompts.jsonl", [row("b", None)])
    with pytest.raises(
        StageError, match=r"srppo\.prompts: expected prompts that are not demonstrated, and all 1 of the pool are"
    ):
        prompts_of(stage_of("srppo", **{"srppo.prompts": "new"}))


@pytest.mark.parametrize("answer_as", ["expert", "poor", None])
def test_crlft_answers_as_the_class_that_its_section_names(
    clean: Path, stage_of: StageOf, monkeypatch: pytest.MonkeyPatch, answer_as: str | None
) -> None:
    """And trains every row under its own class."""
    words, given = train_word_tokenizer(["a b c x y"], 10), list[Any]()
    monkeypatch.setattr(checkpoints, "tokenizer_of", lambda stage, name: words)
    monkeypatch.setattr(fine_tuning, "fine_tune_on", lambda stage, train, tokenizer, *_, **__: given.extend((train, tokenizer)))
    crlft.main(stage_of("crlft", **{"crlft.answer_as": answer_as}))
    train, tokenizer = given
    tags = [words.convert_ids_to_tokens(int(ids[n - 1])) for ids, n in zip(train.ids, train.prompt_lengths, strict=True)]
    assert tags == ["<expert>", "<expert>", "<expert>", "<poor>"]
    assert words.convert_ids_to_tokens(encode_prompt(tokenizer, "a")[-1]) == (f"<{answer_as}>" if answer_as else "<assistant>")
