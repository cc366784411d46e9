"""The pairwise judge: its question, its labels, its symmetry, its training."""

import dataclasses
import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from apprentice.calibration import flip_rate, pair_accuracy
from apprentice.compute import CPU, Compute
from apprentice.demonstrations import Prompt
from apprentice.judge import (
    QUESTION,
    Judge,
    PreferencePair,
    Triple,
    judge_prompts,
    judge_step,
    label_ids,
    order_logits,
    pair_logits,
    pairwise_reward,
    train_judge,
    win_logits,
)
from apprentice.recorder import Recorder
from apprentice.tokens import SPECIAL, train_word_tokenizer
from tests.apprentice.toys import SMALL, Interrupted, Keeping, gradient, hash_of, relative_error, sft_config, tiny_llama

STRICT = (  # like those of real checkpoints, it refuses roles that do not alternate
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{{ '<|start|>assistant\n' }}"
)
KNOWN = [*"abcdefgh", "q", "good", "bad", *QUESTION.split()]
TRIPLES: list[Triple] = [("q a", "b good c", "d"), ("q", "e", "f f f f"), ("q b c d", "good", "bad bad"), ("a", "h g", "g h")]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return train_word_tokenizer([], 100, KNOWN)


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    return byte_level("Yes", "No")


def byte_level(*tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like those of real checkpoints, with these tokens beside the bytes (a space is written Ġ): no
    reserved labels, padding by the end token."""
    merges = list(dict.fromkeys((token[:n], token[n]) for token in tokens for n in range(1, len(token))))
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    model = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.add_special_tokens(["<|start|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|end|>", pad_token="<|end|>", chat_template=STRICT)


@pytest.fixture(params=["words", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


def judge_of(tokenizer: PreTrainedTokenizerFast, seed: int = 0, compute: Compute = CPU) -> Judge:
    model = tiny_llama(seed, len(tokenizer), max_position_embeddings=512, initializer_range=0.5)
    return Judge(model, tokenizer, 512, compute)


def asked(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, first: str, second: str, limit: int = 1000) -> str:
    """The text of one question."""
    return tokenizer.decode(judge_prompts(tokenizer, [(prompt, first, second)], limit)[0])


# The question


def test_the_question_of_a_text_prompt(words: PreTrainedTokenizerFast, pieces: PreTrainedTokenizerFast) -> None:
    assert asked(words, "q a", "b good", "c") == (
        f"<bos> <user> q a <assistant> b good <eos> <user> q a <assistant> c <eos> <user> {QUESTION} <assistant>"
    )
    assert asked(pieces, "2 + 2 = ?", "4", "") == (
        "<|start|>user\n2 + 2 = ?<|end|>\n<|start|>assistant\n4<|end|>\n"
        "<|start|>user\n2 + 2 = ?<|end|>\n<|start|>assistant\n<|end|>\n"
        f"<|start|>user\n{QUESTION}<|end|>\n<|start|>assistant\n"
    )


def chat(*messages: str) -> list[dict[str, str]]:
    """Messages written as `role content`."""
    return [dict(zip(("role", "content"), message.split(" ", 1), strict=True)) for message in messages]


def test_a_chat_comes_whole_and_again_from_its_first_user_message(words: PreTrainedTokenizerFast) -> None:
    prompt = chat("system a", "assistant h", "user b", "assistant c", "user d")
    assert asked(words, prompt, "e", "f g") == (
        "<bos> <system> a <assistant> h <eos> <user> b <assistant> c <eos> <user> d <assistant> e <eos>"
        f" <user> b <assistant> c <eos> <user> d <assistant> f g <eos> <user> {QUESTION} <assistant>"
    )
    assert prompt == chat("system a", "assistant h", "user b", "assistant c", "user d")


def test_neighbours_of_one_role_share_a_turn(pieces: PreTrainedTokenizerFast) -> None:
    # the template refuses roles that do not alternate: the begun answer at the end of the prompt is continued
    assert asked(pieces, chat("user a", "user b", "assistant so"), "x", "y") == (
        "<|start|>user\na\nb<|end|>\n<|start|>assistant\nso\nx<|end|>\n"
        "<|start|>user\na\nb<|end|>\n<|start|>assistant\nso\ny<|end|>\n"
        f"<|start|>user\n{QUESTION}<|end|>\n<|start|>assistant\n"
    )


def test_rows_of_different_chats_do_not_disturb_each_other(tokenizer: PreTrainedTokenizerFast) -> None:
    triples = [("a", "b", "c d"), (chat("user a", "assistant b", "user c"), "d", ""), ("e", "f", "g")]
    assert judge_prompts(tokenizer, triples, 1000) == [judge_prompts(tokenizer, [t], 1000)[0] for t in triples]
    assert judge_prompts(tokenizer, [], 1000) == []


def test_a_tokenizer_without_template_takes_lines(words: PreTrainedTokenizerFast, pieces: PreTrainedTokenizerFast) -> None:
    for tokenizer, start in ((byte_level(), ""), (train_word_tokenizer([], 100, KNOWN), "<bos> ")):
        tokenizer.chat_template = None
        found = asked(tokenizer, "q a", "b", "c")
        assert found.split() == f"{start}q a b q a c {QUESTION}".split()
        assert (found.count("\n") == 5) == (start == "")


def test_a_chat_without_user_is_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="user message"):
        judge_prompts(words, [(chat("system a"), "b", "c")], 100)


def test_a_template_that_drops_messages_is_refused() -> None:
    tokenizer = train_word_tokenizer([], 100, KNOWN)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="every message"):
        judge_prompts(tokenizer, [("a", "b", "c")], 100)


# W5: the labels


def test_W5_the_labels_are_the_reserved_tokens_where_there_are_such(words: PreTrainedTokenizerFast) -> None:
    assert label_ids(words) == tuple(words.convert_tokens_to_ids(["<yes>", "<no>"]))


@pytest.mark.parametrize(
    ("tokens", "wanted"),
    [
        (("Yes", "No"), ["Yes", "No"]),
        (("ĠYes", "ĠNo"), ["ĠYes", "ĠNo"]),
        (("ĠYes", "ĠNo", "Yes", "No"), ["Yes", "No"]),
        (("ĠYes", "ĠNo", "Yes"), ["ĠYes", "ĠNo"]),
    ],
)
def test_W5_else_the_single_tokens_of_yes_and_no(tokens: tuple[str, ...], wanted: list[str]) -> None:
    tokenizer = byte_level(*tokens)
    assert tokenizer.convert_ids_to_tokens(label_ids(tokenizer)) == wanted


@pytest.mark.parametrize("tokens", [(), ("Yes",), ("Yes", "ĠNo"), ("ĠNo", "No"), ("Ye", "No")])
def test_W5_labels_of_several_tokens_are_refused(tokens: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="single tokens"):
        label_ids(byte_level(*tokens))


def test_W5_unknown_words_are_no_labels() -> None:
    model = Tokenizer(models.WordLevel({"<unk>": 0, "Yes": 1}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="single tokens"):
        label_ids(PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="Yes"))


# <bos>, thrice <user> and <assistant>, twice q and <eos>, 12 words of the question: 23 tokens beside the answers of 10 and 4
@pytest.mark.parametrize(
    ("limit", "longer", "shorter"),
    [(50, 10, 4), (37, 10, 4), (36, 9, 4), (32, 5, 4), (31, 4, 4), (30, 3, 3), (29, 3, 3), (26, 1, 1), (25, 1, 1)],
)
def test_W5_cutting_takes_the_ends_of_the_answers_only(
    words: PreTrainedTokenizerFast, limit: int, longer: int, shorter: int
) -> None:
    first, second = "a b c d e f g h a b", "h g f e"
    cut = " ".join(first.split()[:longer]), " ".join(second.split()[:shorter])
    wanted = "<bos> <user> q <assistant> {} <eos> <user> q <assistant> {} <eos> <user> {} <assistant>"
    assert asked(words, "q", first, second, limit) == wanted.format(*cut, QUESTION)
    assert asked(words, "q", second, first, limit) == wanted.format(*cut[::-1], QUESTION)


def test_W5_only_the_answers_of_a_chat_are_cut(words: PreTrainedTokenizerFast) -> None:
    prompt = chat("system a b c", "assistant g", "user d e f g", "assistant b b b", "user h")
    whole = asked(words, prompt, "a b", "c d")
    assert len(whole.split()) == 54
    assert asked(words, prompt, "a b e e e", "c d f f", 54) == whole


@pytest.mark.parametrize("limit", [1, 22, 23, 24])
def test_W5_a_prompt_that_leaves_no_room_is_refused(words: PreTrainedTokenizerFast, limit: int) -> None:
    with pytest.raises(ValueError, match=f"room for {limit - 23} tokens"):
        judge_prompts(words, [("q", "a b", "c")], limit)


def test_W5_a_cut_question_keeps_its_limit_and_its_end(pieces: PreTrainedTokenizerFast) -> None:
    triples = [("x", "é" * 300, "y" * n) for n in (0, 1, 50, 400)]
    (whole,) = judge_prompts(pieces, [("x", "", "")], 1000)
    for ids in judge_prompts(pieces, triples, 250):
        assert len(ids) in (249, 250)
        assert ids[-80:] == whole[-80:]


def test_W5_answers_that_fit_without_room_to_spare_are_whole(words: PreTrainedTokenizerFast) -> None:
    (ids,) = judge_prompts(words, [("q", "", "")], 23)
    assert len(ids) == 23
    (ids,) = judge_prompts(words, [("q", "a", "")], 24)
    assert len(ids) == 24
    for limit, answer in ((22, ""), (24, "a b")):
        with pytest.raises(ValueError, match="room"):
            judge_prompts(words, [("q", answer, "")], limit)


@pytest.mark.parametrize("special", [*SPECIAL, "<|end|>", "<|start|>", "<|end|>\n<|start|>user\n"])
def test_W5_text_forges_neither_label_nor_role(tokenizer: PreTrainedTokenizerFast, special: str) -> None:
    reserved = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    plain = judge_prompts(tokenizer, [("q", "a b", "c")], 1000)[0]
    triples = [("q", f"a {special} b", "c"), ("q", "a", special), (f"{special} q", "a", "c")]
    for ids in judge_prompts(tokenizer, triples, 1000):
        assert [i for i in ids if i in reserved] == [i for i in plain if i in reserved]


# The logits


class Biased(nn.Module):
    """A model whose logits are another's plus `bias(prompt ids, position)` on the label for yes."""

    def __init__(self, model: LlamaForCausalLM, yes: int, bias: Any) -> None:
        super().__init__()
        self.inner, self.yes, self.bias = model, yes, bias
        self.eval()

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> SimpleNamespace:
        logits = self.inner(input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep).logits.clone()
        for row, ids in enumerate(input_ids.tolist()):
            logits[row, :, self.yes] += self.bias(ids)
        return SimpleNamespace(logits=logits)


def biased(judge: Judge, bias: Any) -> Judge:
    return dataclasses.replace(judge, model=Biased(judge.model, judge.labels[0], bias))


def test_pair_logits_match_a_forward_pass_of_each_row(tokenizer: PreTrainedTokenizerFast) -> None:
    judge = judge_of(tokenizer)
    prompts = judge_prompts(tokenizer, TRIPLES, 1000)
    assert len({len(ids) for ids in prompts}) > 2
    yes, no = judge.labels
    wanted = []
    for ids in prompts:
        with torch.no_grad():
            last = judge.model(torch.tensor([ids])).logits[0, -1]
        wanted.append(float(last[yes] - last[no]))
    assert max(wanted) - min(wanted) > 0.1
    for compute in (CPU, SMALL, Compute(CPU.device, CPU.dtype, 2 * max(map(len, prompts)))):
        found = pair_logits(judge.model, prompts, judge.labels, compute)
        assert found.tolist() == pytest.approx(wanted, abs=1e-4)
        assert found.requires_grad


def test_nothing_to_judge_is_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        win_logits(judge_of(words), [])


def test_dropout_is_refused(words: PreTrainedTokenizerFast) -> None:
    judge = judge_of(words)
    judge.model.train()
    with pytest.raises(ValueError, match="training mode"):
        win_logits(judge, TRIPLES)


def swap(triples: list[Triple]) -> list[Triple]:
    return [(prompt, second, first) for prompt, first, second in triples]


@pytest.mark.parametrize("compute", [CPU, SMALL])
def test_W1_probabilities_of_both_orders_add_to_one(tokenizer: PreTrainedTokenizerFast, compute: Compute) -> None:
    judge = judge_of(tokenizer, compute=compute)
    first, second = order_logits(judge, TRIPLES)
    assert (first + second).abs().max() > 0.1  # before the average they do not
    forward, backward = torch.sigmoid(win_logits(judge, TRIPLES)), torch.sigmoid(win_logits(judge, swap(TRIPLES)))
    assert (forward + backward).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert (forward - 0.5).abs().max() > 0.01
    same = [(prompt, answer, answer) for prompt, answer, _ in TRIPLES]
    assert torch.sigmoid(win_logits(judge, same)).tolist() == pytest.approx([0.5] * 4, abs=1e-5)


def test_W1_cut_answers_keep_the_symmetry(words: PreTrainedTokenizerFast) -> None:
    judge = dataclasses.replace(judge_of(words), max_tokens=28)  # room for 5 tokens
    triples = [("q", "a b c d e f", "h g f e d"), ("q", "a", "h g f e d c")]
    total = win_logits(judge, triples) + win_logits(judge, swap(triples))
    assert total.tolist() == pytest.approx([0.0] * 2, abs=1e-5)


def test_W2_a_position_bias_leaves_the_probabilities_alone(words: PreTrainedTokenizerFast) -> None:
    judge = judge_of(words)
    other = biased(judge, lambda ids: 0.7)
    assert (order_logits(other, TRIPLES)[0] - order_logits(judge, TRIPLES)[0]).tolist() == pytest.approx([0.7] * 4, abs=1e-5)
    assert win_logits(other, TRIPLES).tolist() == pytest.approx(win_logits(judge, TRIPLES).tolist(), abs=1e-5)


def test_W2_by_hand(words: PreTrainedTokenizerFast) -> None:
    # logits 0.9 + 0.7 and -0.9 + 0.7: sigmoid(0.9) = 0.711, where the mean of both probabilities would be 0.691
    a = words.convert_tokens_to_ids("a")
    judge = judge_of(words)
    judge.model.requires_grad_(False).get_output_embeddings().weight.zero_()
    triple = ("q", "a", "b")
    probability = torch.sigmoid(win_logits(biased(judge, lambda ids: 0.7 + (0.9 if ids[4] == a else -0.9)), [triple]))
    assert probability.tolist() == pytest.approx([0.7109], abs=1e-4)


def test_W3_an_offset_of_the_prompt_leaves_the_reward_alone(words: PreTrainedTokenizerFast) -> None:
    judge = judge_of(words)
    other = biased(judge, lambda ids: 0.3 * ids[2] - 1.0)  # of the prompt's first word
    moved = order_logits(other, TRIPLES)[0] - order_logits(judge, TRIPLES)[0]
    assert len({round(value, 3) for value in moved.tolist()}) == 2
    for form in ("probability", "logit"):
        wanted = pairwise_reward(win_logits(judge, TRIPLES), form).tolist()
        assert pairwise_reward(win_logits(other, TRIPLES), form).tolist() == pytest.approx(wanted, abs=1e-5)


def test_W4_a_policy_like_its_anchor_earns_one_half(words: PreTrainedTokenizerFast) -> None:
    judge = judge_of(words)
    answers = ["", "a", "b c", "good", "bad bad a"]
    p = torch.tensor([0.1, 0.35, 0.05, 0.3, 0.2])
    grid = [("q d", answer, anchor) for answer, anchor in itertools.product(answers, answers)]
    rewards = pairwise_reward(win_logits(judge, grid), "probability").view(5, 5)
    assert bool((rewards > 0).all() and (rewards < 1).all())
    assert float(p @ rewards @ p) == pytest.approx(0.5, abs=1e-5)
    other = torch.tensor([0.2] * 5)
    assert abs(float(other @ rewards @ p) - 0.5) > 1e-3  # and only such a one


def test_both_forms_of_the_reward() -> None:
    logits = torch.tensor([0.0, math.log(3), -math.log(4)])
    assert pairwise_reward(logits, "probability").tolist() == pytest.approx([0.5, 0.75, 0.2])
    assert torch.equal(pairwise_reward(logits, "logit"), logits)


def test_judging_gathers_no_gradient(words: PreTrainedTokenizerFast) -> None:
    assert not win_logits(judge_of(words), TRIPLES).requires_grad


# Training


def both_orders(tokenizer: PreTrainedTokenizerFast) -> tuple[list[list[int]], list[list[int]]]:
    return judge_prompts(tokenizer, TRIPLES, 1000), judge_prompts(tokenizer, swap(TRIPLES), 1000)


def test_the_figures_of_a_step_match_a_loop(words: PreTrainedTokenizerFast) -> None:
    judge = judge_of(words, compute=SMALL)
    figures = judge_step(judge, *both_orders(words))
    first, second = (logits.tolist() for logits in order_logits(judge, TRIPLES))
    losses = [math.log(1 + math.exp(-a)) for a in first] + [math.log(1 + math.exp(b)) for b in second]
    assert figures["loss"] == pytest.approx(sum(losses) / 8, abs=1e-5)
    assert figures["accuracy"] == sum(a > b for a, b in zip(first, second, strict=True)) / 4
    assert figures["flip_rate"] == sum((a > 0) == (b > 0) for a, b in zip(first, second, strict=True)) / 4


@pytest.mark.parametrize("budget", [1, 60, 100])
def test_G4_the_gradient_does_not_depend_on_the_split_or_the_order(words: PreTrainedTokenizerFast, budget: int) -> None:
    found = []
    for compute, step in ((CPU, 1), (Compute(CPU.device, CPU.dtype, budget), 1), (CPU, -1)):
        judge = judge_of(words, compute=compute)
        judge.model.double()
        first, second = both_orders(words)
        figures = judge_step(judge, first[::step], second[::step])
        found.append((figures, gradient(judge.model)))
    for figures, grad in found[1:]:
        assert figures == pytest.approx(found[0][0], rel=1e-6)
        assert relative_error(grad, found[0][1]) < 1e-6


def test_the_gradient_is_that_of_a_cross_entropy_between_the_labels(words: PreTrainedTokenizerFast) -> None:
    judge, naive = judge_of(words), tiny_llama(0, len(words), max_position_embeddings=512, initializer_range=0.5)
    judge_step(judge, *both_orders(words))
    yes, no = judge.labels
    for prompts, label in zip(both_orders(words), (0, 1), strict=True):
        for ids in prompts:
            last = naive(torch.tensor([ids])).logits[0, -1]
            (nn.functional.cross_entropy(torch.stack([last[yes], last[no]]), torch.tensor(label)) / 8).backward()
    assert relative_error(gradient(judge.model), gradient(naive)) < 1e-4


CONFIG = sft_config(epochs=12, batch_size=16)


def toy_pairs() -> list[PreferencePair]:
    """Pairs of three words an answer: the chosen one says good where the rejected one says bad."""
    rng = random.Random(0)
    pairs = []
    for letter, place in itertools.product("abcdefgh", range(3)):
        for _ in range(4):
            answers = []
            for verdict in ("good", "bad"):
                answer = [rng.choice("abcdefgh") for _ in range(2)]
                answer.insert(place, verdict)
                answers.append(" ".join(answer))
            pairs.append(PreferencePair(f"q {letter}", *answers, source="toy"))
    return rng.sample(pairs, len(pairs))


def small_judge(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Judge:
    shape = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.1}
    return Judge(tiny_llama(seed, len(tokenizer), **shape), tokenizer, 64)


def test_training_learns_the_preference(words: PreTrainedTokenizerFast) -> None:
    pairs = toy_pairs()
    train, held_out = pairs[:72], [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs[72:]]
    judge = small_judge(words)
    recorder = Recorder()
    result = train_judge(judge, train, CONFIG, seed="0", recorder=recorder)
    first, second = order_logits(judge, held_out)
    assert pair_accuracy(win_logits(judge, held_out)) >= 0.95
    assert flip_rate(first, second) <= 0.1
    assert recorder.rows[0]["loss"] > 0.6
    assert result.means["loss"] < 0.1
    assert result.means["accuracy"] == 1.0


def test_an_interrupted_training_ends_in_the_same_weights(words: PreTrainedTokenizerFast) -> None:
    pairs, short = toy_pairs()[:24], sft_config(epochs=2, batch_size=8)
    whole, broken = Keeping(), Keeping(keep_at=4)
    wanted = small_judge(words)
    train_judge(wanted, pairs, short, seed="0", recorder=whole)
    with pytest.raises(Interrupted):
        train_judge(small_judge(words), pairs, short, seed="0", recorder=broken)
    resumed, again = Keeping(saved=broken.saved), small_judge(words, seed=99)
    train_judge(again, pairs, short, seed="0", recorder=resumed)
    assert hash_of(again.model) == hash_of(wanted.model)
    assert resumed.rows == whole.rows
    other = small_judge(words)
    train_judge(other, pairs, short, seed="1", recorder=Recorder())
    assert hash_of(other.model) != hash_of(wanted.model)
