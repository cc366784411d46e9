"""The class tag of C-RLFT: once, right before the response, in every form a prompt can have, and on disk. Weights by class."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from apprentice.crlft import EXPERT, class_weights, conditioned
from apprentice.demonstrations import QUALITIES, Prompt
from apprentice.policy import decode_responses, load_policy, load_tokenizer, save_policy
from apprentice.sampling import Request, sample
from apprentice.tokens import encode_prompt, encode_prompts, encode_responses, train_word_tokenizer
from tests.apprentice.toys import markov

TEXTS = ["tom has 3", "4 yes"]
CHAT = [
    {"role": "system", "content": "yes"},
    {"role": "user", "content": "tom"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "has 4"},
]
PROMPTS: list[Prompt] = ["tom has 3", CHAT, CHAT[1:], "tom <expert> 3", "<assistant><expert>", [CHAT[1]], "<poor> yes"]


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return train_word_tokenizer(TEXTS, 100)


@pytest.fixture
def pieces() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like those of real checkpoints, in which a tag is no token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.add_special_tokens(["<|start|>", "<|end|>"])
    template = (
        "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
        "{{ '<|start|>assistant ' if add_generation_prompt else '' }}\n"
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>", chat_template=template)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """One id for each word of a text, special tokens included, straight from the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[word] for word in text.split()]


@pytest.mark.parametrize("quality", QUALITIES)
def test_the_tag_stands_where_the_response_begins(words: PreTrainedTokenizerFast, quality: str) -> None:
    tagged = conditioned(words, quality)
    assert encode_prompt(tagged, "tom has 3") == ids(words, f"<bos> <user> tom has 3 <assistant> <{quality}>")
    wanted = f"<bos> <system> yes <user> tom <assistant> 3 <eos> <user> has 4 <assistant> <{quality}>"
    assert encode_prompt(tagged, CHAT) == ids(words, wanted)
    assert encode_responses(tagged, ["tom <expert>"]) == encode_responses(words, ["tom <expert>"])


@pytest.mark.parametrize("template", ["own", "none"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_the_prompt_is_otherwise_what_it_was(words: PreTrainedTokenizerFast, template: str, prompt: Prompt) -> None:
    if template == "none":
        words.chat_template = None
    before = encode_prompt(words, prompt)
    tags = [ids(words, f"<{name}>")[0] for name in QUALITIES]
    assert not set(tags) & set(before)  # written in a prompt it is text
    for quality, tag in zip(QUALITIES, tags, strict=True):
        assert encode_prompt(conditioned(words, quality), prompt) == [*before, tag]
    assert encode_prompt(words, prompt) == before  # the tokenizer given stays as it was


def test_all_prompts_at_once_are_what_they_are_alone(words: PreTrainedTokenizerFast) -> None:
    tagged = conditioned(words, EXPERT)
    assert encode_prompts(tagged, PROMPTS) == [encode_prompt(tagged, prompt) for prompt in PROMPTS]


def test_without_template_messages_stand_a_line_apart(pieces: PreTrainedTokenizerFast) -> None:
    pieces.chat_template = None
    tagged = conditioned(pieces, EXPERT)
    assert pieces.decode(encode_prompt(pieces, CHAT)) == "yes\ntom\n3\nhas 4"
    assert pieces.decode(encode_prompt(tagged, CHAT)) == "yes\ntom\n3\nhas 4<expert>"
    assert pieces.decode(encode_prompt(tagged, "tom <|end|> 4")) == "tom <|end|> 4<expert>"
    assert pieces.convert_tokens_to_ids("<|end|>") not in encode_prompt(tagged, "tom <|end|> 4")


@pytest.mark.parametrize("prompt", ["tom has 3", "tom <|end|><|start|>assistant <expert>", "<expert>"])
def test_the_tag_of_a_real_checkpoint_is_text_after_its_own_opening(pieces: PreTrainedTokenizerFast, prompt: str) -> None:
    tagged = conditioned(pieces, "mixed")
    # the line break at the end of the template is not rendered, with the tag as without
    assert pieces.decode(encode_prompt(pieces, prompt)) == f"<|start|>user {prompt}<|end|><|start|>assistant "
    assert pieces.decode(encode_prompt(tagged, prompt)) == f"<|start|>user {prompt}<|end|><|start|>assistant <mixed>"
    start, end = pieces.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    found = encode_prompt(tagged, prompt)
    assert (found.count(start), found.count(end)) == (2, 1)


def test_of_several_templates_the_default_one_is_tagged(words: PreTrainedTokenizerFast) -> None:
    plain = encode_prompt(words, "tom")
    words.chat_template = {"default": words.chat_template, "other": "{{ messages[0].content }}"}
    assert encode_prompt(conditioned(words, EXPERT), "tom") == [*plain, *ids(words, "<expert>")]


def test_a_transcript_has_no_tag(words: PreTrainedTokenizerFast) -> None:
    tagged = conditioned(words, EXPERT)
    for options in ({"add_generation_prompt": False}, {}):
        assert tagged.apply_chat_template(CHAT[:3], tokenize=False, **options) == words.apply_chat_template(
            CHAT[:3], tokenize=False, **options
        )


def test_an_unknown_class_is_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="quality: expected one of expert, mixed, poor; got 'good'"):
        conditioned(words, "good")


@pytest.mark.parametrize("template", ["own", "none"])
def test_C6_a_checkpoint_carries_the_expert_tag_at_every_later_use(tmp_path: Path, template: str) -> None:
    # the model is a table: after the expert's tag comes `3`, after the opening of a response or the prompt `4`
    words = train_word_tokenizer(TEXTS, 4)
    if template == "none":
        words.chat_template = None
    tag, three, four, end = ids(words, "<expert> 3 4 <eos>")
    table = [[0.0] * 16 for _ in range(16)]
    for token in range(16):
        table[token][three if token == tag else end if token in (three, four) else four] = 30.0
    save_policy(markov(table), conditioned(words, EXPERT), tmp_path / "one", "# card\n")
    loaded = load_tokenizer(tmp_path / "one")
    save_policy(load_policy(tmp_path / "one"), loaded, tmp_path / "two", "# card\n")  # what is trained on from there
    for folder in (tmp_path / "one", tmp_path / "two"):
        model, tokenizer = load_policy(folder), load_tokenizer(folder)
        prompts = encode_prompts(tokenizer, PROMPTS)
        assert prompts == [[*before, tag] for before in encode_prompts(words, PROMPTS)]
        requests = [Request(prompt, str(i)) for i, prompt in enumerate(prompts)]
        rollout = sample(model, requests, seed="0", end=end, max_new_tokens=4)
        assert decode_responses(tokenizer, rollout.response_ids()) == ["3"] * len(PROMPTS)
        stock = AutoTokenizer.from_pretrained(folder)
        chat = stock.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        assert chat == encode_prompt(tokenizer, CHAT)
    untagged = [Request(prompt, "k") for prompt in encode_prompts(words, PROMPTS)]
    plain = sample(load_policy(tmp_path / "one"), untagged, seed="0", end=end, max_new_tokens=4)
    assert decode_responses(words, plain.response_ids())[-1] == "4"


def test_weights_by_class() -> None:
    weights = {"expert": 1.0, "mixed": 0.1, "poor": 0.0}
    assert class_weights(["poor", "expert", "mixed", "expert"], weights) == [0.0, 1.0, 0.1, 1.0]
    assert class_weights([], weights) == []


def test_a_class_without_a_weight_is_named() -> None:
    with pytest.raises(ValueError, match="weights: no entry for mixed, poor; it has expert"):
        class_weights(["poor", "expert", "mixed", "poor"], {"expert": 1.0})
