"""The Bradley-Terry reward model: where its reward is read, its loss, its training, its files."""

import copy
import itertools
import logging
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from apprentice.calibration import pair_accuracy
from apprentice.compute import CPU, Compute
from apprentice.judge import PreferencePair
from apprentice.policy import load_policy, load_tokenizer, save_policy
from apprentice.recorder import Recorder
from apprentice.reward_model import (
    bt_rewards,
    bt_step,
    bt_win_logits,
    encode_pairs,
    load_reward_model,
    new_reward_model,
    train_reward_model,
)
from apprentice.tokens import Batch, collate, train_word_tokenizer
from tests.apprentice.toys import (
    END,
    SMALL,
    Interrupted,
    Keeping,
    demonstrations,
    gradient,
    hash_of,
    relative_error,
    sft_config,
    tiny_llama,
)

CHOSEN = demonstrations(9, seed=0)
PROMPTS = [row[:n] for row, n in zip(CHOSEN.ids.tolist(), CHOSEN.prompt_lengths.tolist(), strict=True)]
REJECTED = collate(PROMPTS, [[0, 1, 2][: i % 4] + [2] * (i % 3) + [END] for i in range(9)], END)
TOKENIZER = train_word_tokenizer([], 100, [*"abcdefgh", "q", "good", "bad"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Causal language models: a Llama of four tokens, one with its head of its own, one of many words; a GPT-2."""
    gpt2 = GPT2Config(vocab_size=4, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=END)
    torch.manual_seed(0)
    models = {
        "llama": tiny_llama(0),
        "untied": tiny_llama(1, tie_word_embeddings=False),
        "words": tiny_llama(0, len(TOKENIZER), hidden_size=32, intermediate_size=64, initializer_range=0.1),
        "gpt2": GPT2LMHeadModel(gpt2),
    }
    root = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        save_policy(model, TOKENIZER, root / name, "a language model")
    return {name: root / name for name in models}


@pytest.fixture
def model(folders: dict[str, Path]) -> PreTrainedModel:
    return with_head(new_reward_model(folders["llama"]))


def with_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with a head that is not zero."""
    nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    return model


def naive_rewards(model: PreTrainedModel, batch: Batch) -> list[float]:
    """Row by row without padding: the head on the last hidden state, written out."""
    rewards = []
    for row, length in zip(batch.ids.tolist(), batch.lengths(), strict=True):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([row[:length]])).last_hidden_state[0, -1]
        rewards.append(float(sum(h * w for h, w in zip(hidden, model.score.weight[0].detach(), strict=True))))
    return rewards


@pytest.mark.parametrize("name", ["llama", "untied", "gpt2"])
def test_a_new_model_has_the_trunk_and_no_opinion(folders: dict[str, Path], name: str) -> None:
    model = new_reward_model(folders[name])
    assert hash_of(model.base_model) == hash_of(load_policy(folders[name]).base_model)
    assert bt_rewards(model, CHOSEN).tolist() == [0.0] * 9
    assert not model.training


@pytest.mark.parametrize("compute", [CPU, SMALL, Compute(CPU.device, CPU.dtype, 30)])
def test_rewards_match_a_loop_over_rows(model: PreTrainedModel, compute: Compute) -> None:
    wanted = naive_rewards(model, CHOSEN)
    assert max(wanted) - min(wanted) > 0.5
    found = bt_rewards(model, CHOSEN, compute)
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)
    assert found.requires_grad


def test_the_id_of_the_padding_makes_no_difference(model: PreTrainedModel) -> None:
    responses = [row[p : p + r] for row, p, r in zip(*(x.tolist() for x in rows_of(CHOSEN)), strict=True)]
    wanted = bt_rewards(model, CHOSEN).tolist()
    for pad in range(END + 1):
        model.config.pad_token_id = pad
        assert bt_rewards(model, collate(PROMPTS, responses, pad)).tolist() == pytest.approx(wanted, abs=1e-5)
    # the library's own forward looks for the last token that is no padding, and so misses the end token
    model.config.pad_token_id = END
    with torch.no_grad():
        library = model(CHOSEN.ids).logits[:, 0]
    assert (library - bt_rewards(model, CHOSEN).detach()).abs().max() > 0.1


def rows_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.ids, batch.prompt_lengths, batch.response_lengths


def test_a_response_without_end_token_is_read_at_its_last_token(model: PreTrainedModel) -> None:
    cut = collate([[0], [1, 2]], [[1, 2], [2, 2, 0, 1]], END)
    assert bt_rewards(model, cut).tolist() == pytest.approx(naive_rewards(model, cut), abs=1e-4)


def test_dropout_is_refused(model: PreTrainedModel) -> None:
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        bt_rewards(model, CHOSEN)


class Offset(nn.Module):
    """A reward model whose rewards are another's plus `offset` times the prompt's first token."""

    def __init__(self, model: PreTrainedModel, offset: float) -> None:
        super().__init__()
        self.inner, self.offset = model, offset
        self.score = model.score
        self.eval()

    def base_model(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.inner.base_model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        head = self.inner.score.weight[0].detach()
        moved = self.offset * input_ids[:, :1, None] * head / (head @ head)
        return SimpleNamespace(last_hidden_state=hidden + moved)


def test_W3_an_offset_of_the_prompt_moves_the_reward_and_teaches_nothing(model: PreTrainedModel) -> None:
    other = Offset(copy.deepcopy(model), 0.7)
    moved = bt_rewards(other, CHOSEN) - bt_rewards(model, CHOSEN)
    assert moved.tolist() == pytest.approx([0.7 * prompt[0] for prompt in PROMPTS], abs=1e-4)
    assert moved.max() > 0.5
    wanted = bt_win_logits(model, CHOSEN, REJECTED).tolist()
    assert bt_win_logits(other, CHOSEN, REJECTED).tolist() == pytest.approx(wanted, abs=1e-4)
    assert bt_step(other, CHOSEN, REJECTED, CPU)["loss"] == pytest.approx(
        bt_step(model, CHOSEN, REJECTED, CPU)["loss"], abs=1e-5
    )
    assert relative_error(gradient(other.inner), gradient(model)) < 1e-4


def test_the_figures_of_a_step_match_a_loop(model: PreTrainedModel) -> None:
    chosen, rejected = naive_rewards(model, CHOSEN), naive_rewards(model, REJECTED)
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert any(m > 0 for m in margins) and any(m < 0 for m in margins)
    figures = bt_step(model, CHOSEN, REJECTED, SMALL)
    assert figures["loss"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 9, abs=1e-4)
    assert figures["accuracy"] == pytest.approx(sum((m > 0) + 0.5 * (m == 0) for m in margins) / 9, abs=1e-6)
    assert figures["margin"] == pytest.approx(sum(margins) / 9, abs=1e-4)


def test_the_first_step_is_that_of_equal_rewards(folders: dict[str, Path]) -> None:
    assert bt_step(new_reward_model(folders["llama"]), CHOSEN, REJECTED, CPU) == pytest.approx(
        {"loss": math.log(2), "accuracy": 0.5, "margin": 0.0}
    )


@pytest.mark.parametrize("budget", [1, 25, 60])
def test_G4_the_gradient_does_not_depend_on_the_split_or_the_order(model: PreTrainedModel, budget: int) -> None:
    found = []
    for rows, compute in (
        (list(range(9)), CPU),
        (list(range(9)), Compute(CPU.device, CPU.dtype, budget)),
        (list(range(8, -1, -1)), CPU),
    ):
        double = copy.deepcopy(model).double()
        figures = bt_step(double, CHOSEN.rows(rows), REJECTED.rows(rows), compute)
        found.append((figures, gradient(double)))
    for figures, grad in found[1:]:
        assert figures == pytest.approx(found[0][0], rel=1e-5)
        assert relative_error(grad, found[0][1]) < 1e-9


def test_win_logits_are_differences_without_gradient(model: PreTrainedModel) -> None:
    forward, backward = bt_win_logits(model, CHOSEN, REJECTED), bt_win_logits(model, REJECTED, CHOSEN)
    wanted = [c - r for c, r in zip(naive_rewards(model, CHOSEN), naive_rewards(model, REJECTED), strict=True)]
    assert forward.tolist() == pytest.approx(wanted, abs=1e-4)
    assert torch.equal(forward, -backward)
    assert not forward.requires_grad


# Training and files


def toy_pairs() -> list[PreferencePair]:
    """Pairs of three words an answer: the chosen one says good where the rejected one says bad."""
    rng = random.Random(0)
    pairs = []
    for letter, place, _ in itertools.product("abcdefgh", range(3), range(4)):
        answers = [[rng.choice("abcdefgh") for _ in range(2)] for _ in range(2)]
        for answer, verdict in zip(answers, ("good", "bad"), strict=True):
            answer.insert(place, verdict)
        pairs.append(PreferencePair(f"q {letter}", *map(" ".join, answers), source="toy"))
    return rng.sample(pairs, len(pairs))


def train(model: PreTrainedModel, pairs: list[PreferencePair], seed: str, recorder: Recorder, **changes: object) -> Any:
    chosen, rejected = encode_pairs(TOKENIZER, pairs)
    config = sft_config(batch_size=16, **changes)
    return train_reward_model(model, chosen, rejected, config, seed=seed, compute=CPU, recorder=recorder)


def test_pairs_are_encoded_row_by_row(folders: dict[str, Path]) -> None:
    def ids(text: str) -> list[int]:
        found: list[int] = TOKENIZER.convert_tokens_to_ids(text.split())
        return found

    pairs = [PreferencePair("q", "a <eos> good", "b", "x"), PreferencePair("q a", "c", "<assistant>", "y")]
    chosen, rejected = encode_pairs(TOKENIZER, pairs)
    for batch, texts in (
        (chosen, ["<bos> <user> q <assistant> a <unk> good <eos>", "<bos> <user> q a <assistant> c <eos>"]),
        (rejected, ["<bos> <user> q <assistant> b <eos>", "<bos> <user> q a <assistant> <unk> <eos>"]),
    ):
        rows = [row[:n] for row, n in zip(batch.ids.tolist(), batch.lengths(), strict=True)]
        assert rows == [ids(text) for text in texts]
        assert batch.prompt_lengths.tolist() == [4, 5]


def test_training_learns_the_preference(folders: dict[str, Path]) -> None:
    pairs, recorder = toy_pairs(), Recorder()
    model = new_reward_model(folders["words"])
    result = train(model, pairs[:72], "0", recorder, epochs=8)
    assert pair_accuracy(bt_win_logits(model, *encode_pairs(TOKENIZER, pairs[72:]))) >= 0.95
    assert recorder.rows[0]["loss"] == pytest.approx(math.log(2))
    assert result.means["loss"] < 0.1
    assert result.means["accuracy"] == 1.0


def test_an_interrupted_training_ends_in_the_same_weights(folders: dict[str, Path]) -> None:
    pairs, whole, broken = toy_pairs()[:40], Keeping(), Keeping(keep_at=4)
    wanted, again, other = (new_reward_model(folders["words"]) for _ in range(3))
    train(wanted, pairs, "0", whole, epochs=2)
    with pytest.raises(Interrupted):
        train(new_reward_model(folders["words"]), pairs, "0", broken, epochs=2)
    resumed = Keeping(saved=broken.saved)
    train(with_head(again), pairs, "0", resumed, epochs=2)
    assert hash_of(again) == hash_of(wanted)
    assert resumed.rows == whole.rows
    train(other, pairs, "1", Recorder(), epochs=2)
    assert hash_of(other) != hash_of(wanted)


@pytest.mark.parametrize("name", ["llama", "untied", "gpt2"])
def test_a_saved_model_comes_back(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = with_head(new_reward_model(folders[name]))
    save_policy(model, TOKENIZER, tmp_path / "reward", "a reward model")
    loaded = load_reward_model(tmp_path / "reward")
    assert hash_of(loaded) == hash_of(model)
    assert bt_rewards(loaded, CHOSEN).tolist() == pytest.approx(bt_rewards(model, CHOSEN).tolist(), abs=1e-5)
    assert (loaded.config.num_labels, loaded.training) == (1, False)
    assert load_tokenizer(tmp_path / "reward").get_vocab() == TOKENIZER.get_vocab()
    assert (tmp_path / "reward" / "README.md").read_text() == "a reward model"
    assert list((tmp_path / "reward").glob("*.safetensors"))


def test_another_kind_of_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train one first"):
        load_reward_model(folders["llama"])
    save_policy(new_reward_model(folders["llama"]), TOKENIZER, tmp_path / "reward", "a reward model")
    with pytest.raises(ValueError, match="causal language model"):
        new_reward_model(tmp_path / "reward")


def test_a_fresh_head_is_no_news(folders: dict[str, Path]) -> None:
    class Collected(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    told, handler, library = list[str](), Collected(), logging.getLogger("transformers")
    verbosity = library.level
    library.addHandler(handler)
    try:
        new_reward_model(folders["llama"])
        assert (told, library.level) == ([], verbosity)
        AutoModelForSequenceClassification.from_pretrained(folders["llama"])
        assert "score.weight" in "".join(told)  # what would have been told
    finally:
        library.removeHandler(handler)


def test_a_tokenizer_whose_padding_is_its_end_makes_no_difference(folders: dict[str, Path]) -> None:
    tokenizer: PreTrainedTokenizerFast = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token
    model = with_head(new_reward_model(folders["words"]))
    for one, other in zip(encode_pairs(TOKENIZER, toy_pairs()[:8]), encode_pairs(tokenizer, toy_pairs()[:8]), strict=True):
        assert bt_rewards(model, one).tolist() == pytest.approx(bt_rewards(model, other).tolist(), abs=1e-5)
