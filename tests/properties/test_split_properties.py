"""The split: a matter of the prompt alone, in the shares asked for, and no row moves when others come."""

import copy
import dataclasses
import hashlib
import json
import math
import re
import unicodedata
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from apprentice.config import parse
from apprentice.demonstrations import Demonstration, demonstration, split_of
from tasks.cleaning import split_tables
from tests.conftest import ROOT
from tests.properties.strategies import clean_texts, good_messages, steady

CONFIG = parse(yaml.safe_load((ROOT / "params.yaml").read_text())).ingest


def asked(prompt: Any) -> Any:
    """The question of a prompt, character by character; a plain text, spaced singly and composed, is its own."""
    if isinstance(prompt, list):
        return [{"role": message["role"], "content": asked(message["content"])} for message in prompt]
    seen = [c for c in prompt if unicodedata.category(c) != "Cf" and not is_ignorable(ord(c))]
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", "".join(seen))).strip()


def is_ignorable(code: int) -> bool:
    """Characters of Unicode's Default_Ignorable_Code_Point that are assigned and of no format category."""
    single = (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0)
    return code in single or 0x180B <= code <= 0x180F or 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF


prompts = clean_texts | st.lists(good_messages, max_size=3)
shares = st.floats(0, 0.5)


@steady(100)
@given(prompts, shares, shares)
def test_the_split_is_the_hash_of_the_prompt_against_the_shares(prompt: Any, validation: float, evaluation: float) -> None:
    # written out once more: were it another hash, rows of earlier runs would change sides
    text = json.dumps(["split", asked(prompt)], sort_keys=True, separators=(",", ":"))
    place = int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=16).digest()[:6], "big") / 2**48
    sides = [("evaluation", evaluation), ("validation", evaluation + validation), ("train", 2.0)]
    wanted = next(name for name, end in sides if place < end)
    assert split_of(prompt, validation, evaluation) == wanted
    assert split_of(copy.deepcopy(prompt), validation, evaluation) == wanted
    if isinstance(prompt, list):
        turned = [dict(reversed(message.items())) for message in prompt]
        assert split_of(turned, validation, evaluation) == wanted


@steady(20)
@given(stem=clean_texts, validation=shares, evaluation=shares, chat=st.booleans())
def test_many_prompts_fall_into_the_splits_by_their_shares(stem: str, validation: float, evaluation: float, chat: bool) -> None:
    texts = [f"{stem}{number}" for number in range(2000)]
    chats = [[{"role": "system", "content": stem}, {"role": "user", "content": text}] for text in texts]
    found = [split_of(prompt, validation, evaluation) for prompt in (chats if chat else texts)]
    for name, share in {"validation": validation, "evaluation": evaluation, "train": 1 - validation - evaluation}.items():
        spread = math.sqrt(2000 * max(share * (1 - share), 0))
        assert abs(found.count(name) - 2000 * share) <= 5 * spread + 1e-6  # 5 sigma


@steady(60)
@given(prompts, shares, st.floats(0, 0.5), st.floats(0, 0.25))
def test_a_larger_evaluation_share_lets_no_prompt_leave_evaluation(
    prompt: Any, validation: float, evaluation: float, more: float
) -> None:
    before, after = (split_of(prompt, validation, share) for share in (evaluation, evaluation + more))
    if before == "evaluation":
        assert after == "evaluation"
    if after == "train":
        assert before == "train"


def row_of(fields: tuple[Any, str | None, str | None, str | None]) -> Demonstration:
    prompt, response, quality, answer = fields
    return demonstration(prompt, response, "file:1", quality=quality, answer=answer)


few = st.sampled_from([f"question {n}" for n in range(10)]) | prompts
qualities = st.sampled_from([None, "expert", "mixed", "poor"])
rows_lists = st.lists(st.tuples(few, st.none() | clean_texts, qualities, st.none() | st.just("4")).map(row_of), max_size=12)


def places(rows: list[Demonstration], config: Any) -> list[list[str]]:
    """For each row, the tables that hold it or, under `prompts`, its prompt."""
    tables = split_tables(rows, config, None)
    held = {name: [(row.prompt, row.response) for row in found] for name, found in tables.items()}
    return [[name for name in held if (row.prompt, None if name == "prompts" else row.response) in held[name]] for row in rows]


@steady(50)
@given(rows=rows_lists, more=rows_lists, at=st.integers(0, 12), validation=st.floats(0, 0.4), evaluation=st.floats(0, 0.4))
def test_rows_added_anywhere_move_no_other_row(
    rows: list[Demonstration], more: list[Demonstration], at: int, validation: float, evaluation: float
) -> None:
    known = {row.id for row in rows}
    more = [row for row in more if row.id not in known]  # as cleaning drops exact duplicates
    config = dataclasses.replace(CONFIG, validation_share=validation, evaluation_share=evaluation)
    before, after = places(rows, config), places([*rows[:at], *more, *rows[at:]], config)
    assert [*after[:at], *after[at + len(more) :]] == before if at <= len(rows) else after[: len(rows)] == before


@steady(60)
@given(rows=rows_lists, order=st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_no_rows_tables(rows: list[Demonstration], order: Any) -> None:
    indices = list(range(len(rows)))
    order.shuffle(indices)
    moved = places([rows[i] for i in indices], CONFIG)
    assert moved == [places(rows, CONFIG)[i] for i in indices]
