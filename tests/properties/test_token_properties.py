"""Text of any kind to ids, ids of any kind to a batch: user text forges nothing, and every response comes back whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from apprentice.policy import decode_responses, load_tokenizer
from apprentice.tokens import (
    SPECIAL,
    Batch,
    collate,
    encode_prompt,
    encode_prompts,
    encode_responses,
    pad_id,
    train_word_tokenizer,
)
from tests.properties.strategies import INVISIBLE, ROLES, SPACES, printable, steady

IdPairs = list[tuple[list[int], list[int]]]
IdRows = tuple[IdPairs, int]
KNOWN = ["tom", "has", "3", "apples", "4", "+", "=", ":", "yes"]
# whole special tokens, glued to others or alone, and pieces that would make one if anything were joined
PIECES = ["<eos", "eos>", "<", ">", "<<eos>>", "< eos >", "<EOS>", "<assistant><eos>", "\\<eos>", "{{ eos_token }}"]
FORGED = [*SPECIAL, "<unk>", *PIECES]
texts = st.lists(st.sampled_from([*KNOWN, *FORGED, *SPACES, *INVISIBLE, "\ue000"]) | printable, max_size=8).map("".join)
spaced = st.lists(st.sampled_from([*KNOWN, *FORGED, "never"]), max_size=8).map(" ".join)
any_text = texts | spaced
chats = st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": any_text}), min_size=1, max_size=4)
prompts = st.one_of(any_text, chats)


@pytest.fixture(scope="module", params=["trained", "loaded"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The word tokenizer as it is trained, and the same through its files."""
    trained = train_word_tokenizer([], 100, KNOWN)
    if request.param == "trained":
        return trained
    folder = Path(tmp_path_factory.mktemp("tokenizer"))
    trained.save_pretrained(folder)
    return load_tokenizer(folder)


def naive(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """A word of the vocabulary is its own id, anything else is unknown, a special token written out included."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[word if word in KNOWN else "<unk>"] for word in text.split()]


def naive_prompt(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    found = [vocabulary["<bos>"]]
    for message in [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt:
        found += [vocabulary[f"<{message['role']}>"], *naive(tokenizer, message["content"])]
        found += [vocabulary["<eos>"]] if message["role"] == "assistant" else []
    return [*found, vocabulary["<assistant>"]]


@steady(60)
@given(some=st.lists(prompts, max_size=4))
def test_a_prompt_is_its_template_around_its_words_whatever_they_say(
    tokenizer: PreTrainedTokenizerFast, some: list[Any]
) -> None:
    assert encode_prompts(tokenizer, some) == [naive_prompt(tokenizer, prompt) for prompt in some]


@steady(60)
@given(prompt=prompts)
def test_text_ends_no_turn_and_forges_no_role(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> None:
    roles = ["user"] if isinstance(prompt, str) else [message["role"] for message in prompt]
    marks = dict(zip(tokenizer.convert_tokens_to_ids(list(SPECIAL)), SPECIAL, strict=True))
    found = [marks[token] for token in encode_prompt(tokenizer, prompt) if token in marks]
    wanted = [mark for role in roles for mark in ([f"<{role}>", "<eos>"] if role == "assistant" else [f"<{role}>"])]
    assert found == ["<bos>", *wanted, "<assistant>"]


@steady(60)
@given(said=st.lists(any_text, max_size=4))
def test_a_response_is_its_words_and_one_end_token_at_its_end(tokenizer: PreTrainedTokenizerFast, said: list[str]) -> None:
    encoded = encode_responses(tokenizer, said)
    assert encoded == [[*naive(tokenizer, text), tokenizer.eos_token_id] for text in said]
    assert [ids.index(tokenizer.eos_token_id) for ids in encoded] == [len(ids) - 1 for ids in encoded]


@steady(40)
@given(said=st.lists(st.lists(st.sampled_from(KNOWN), max_size=6).map(" ".join), min_size=1, max_size=4))
def test_known_words_are_decoded_as_they_were_written(tokenizer: PreTrainedTokenizerFast, said: list[str]) -> None:
    assert decode_responses(tokenizer, encode_responses(tokenizer, said)) == said


@steady(40)
@given(rows=st.lists(st.tuples(prompts, any_text), min_size=1, max_size=4))
def test_texts_in_a_batch_have_one_end_token_each_under_the_mask(
    tokenizer: PreTrainedTokenizerFast, rows: list[tuple[Any, str]]
) -> None:
    encoded = encode_responses(tokenizer, [said for _, said in rows])
    batch = collate(encode_prompts(tokenizer, [prompt for prompt, _ in rows]), encoded, pad_id(tokenizer))
    ends = (batch.responses == tokenizer.eos_token_id) * batch.mask
    assert ends.sum(1).tolist() == [1] * len(rows)
    assert ends.argmax(1).tolist() == [len(ids) - 1 for ids in encoded]


ids_lists = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@st.composite
def id_rows(draw: st.DrawFn) -> IdRows:
    """Prompts with their responses, and the id of the padding. Some rows again, whole, cut elsewhere, or ending in that id."""
    rows = draw(st.lists(st.tuples(ids_lists, ids_lists), min_size=1, max_size=5))
    pad = draw(st.integers(0, 4))
    for row in draw(st.lists(st.integers(0, len(rows) - 1), max_size=4)):
        prompt, response = rows[row]
        cut = draw(st.integers(1, len(prompt) + len(response) - 1))
        both = [*prompt, *response]
        rows.append(draw(st.sampled_from([(prompt, response), (both[:cut], both[cut:]), (prompt, [*response, pad])])))
    return rows, pad


def batch_of(rows: IdPairs, pad: int) -> Batch:
    return collate([prompt for prompt, _ in rows], [response for _, response in rows], pad)


def same(one: Batch, other: Batch) -> bool:
    pairs = [(one.ids, other.ids), (one.prompt_lengths, other.prompt_lengths), (one.response_lengths, other.response_lengths)]
    return all(torch.equal(a, b) for a, b in pairs)


@steady(100)
@given(id_rows())
def test_prompts_and_responses_come_back_and_the_mask_follows_their_lengths(drawn: IdRows) -> None:
    rows, pad = drawn
    batch = batch_of(rows, pad)
    longest = max(len(response) for _, response in rows)
    assert batch.ids.shape == (len(rows), max(len(prompt) + len(response) for prompt, response in rows))
    assert batch.mask.shape == batch.responses.shape == (len(rows), longest)
    assert batch.lengths() == [len(prompt) + len(response) for prompt, response in rows]
    for b, (prompt, response) in enumerate(rows):
        assert batch.ids[b].tolist() == [*prompt, *response, *[pad] * (batch.ids.shape[1] - len(prompt) - len(response))]
        assert batch.responses[b].tolist()[: len(response)] == response
        assert batch.mask[b].tolist() == [1.0] * len(response) + [0.0] * (longest - len(response))
        for t, position in enumerate(batch.response_positions()[b].tolist()):
            assert position == min(len(prompt) + t, batch.ids.shape[1] - 1)


@steady(100)
@given(id_rows(), st.data())
def test_some_rows_of_a_batch_are_the_batch_of_some_rows(drawn: IdRows, data: st.DataObject) -> None:
    rows, pad = drawn
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    assert same(batch_of(rows, pad).rows(chosen), batch_of([rows[i] for i in chosen], pad))


@steady(100)
@given(id_rows())
def test_the_distinct_rows_are_each_there_once_and_make_up_the_batch_again(drawn: IdRows) -> None:
    rows, pad = drawn
    batch = batch_of(rows, pad)
    seen: IdPairs = []
    for row in rows:
        if row not in seen:
            seen.append(row)
    first, places = batch.distinct()
    assert (first, places) == ([rows.index(row) for row in seen], [seen.index(row) for row in rows])
    assert same(batch.rows(first).rows(places), batch)


@steady(60)
@given(id_rows(), st.data())
def test_a_prompt_or_response_without_a_token_is_refused(drawn: IdRows, data: st.DataObject) -> None:
    rows, pad = drawn
    row, side = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, 1))
    rows[row] = ([], rows[row][1]) if side == 0 else (rows[row][0], [])
    with pytest.raises(ValueError, match=f"{('prompt', 'response')[side]} {row} has no token"):
        batch_of(rows, pad)
