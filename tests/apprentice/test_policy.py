"""Log-probabilities against a softmax written out, and what must not change them."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from apprentice.compute import CPU, Compute
from apprentice.losses import next_token_loss
from apprentice.policy import (
    Critic,
    checkpoint_arguments,
    decode_responses,
    file_hashes,
    freeze,
    load_policy,
    load_tokenizer,
    response_scores,
    save_policy,
    score,
    values_of,
    weights,
)
from apprentice.tokens import collate, train_word_tokenizer
from tests.apprentice.toys import END, SMALL, demonstrations, enumerated, hash_of, markov, naive_logps, tiny_llama


class Logits(nn.Module):
    """Stands for a model: its logits are a parameter, one row for each position of the batch."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Parameter(torch.randn(*shape))
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, use_cache: bool, output_hidden_states: bool
    ) -> object:
        return type("Output", (), {"logits": self.logits[:, logits_to_keep]})


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_scores_match_one_pass_a_token(temperature: float) -> None:
    model, batch = tiny_llama(0, vocab=12), demonstrations(7, seed=0, vocab=12)
    logps = score(model, batch, temperature=temperature)
    for row, (p, r) in enumerate(zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist(), strict=True)):
        ids = batch.ids[row].tolist()
        wanted = naive_logps(model, ids[:p], ids[p : p + r], temperature)
        assert logps[row, :r].tolist() == pytest.approx(wanted, abs=1e-5)
        assert logps[row, r:].tolist() == [0] * (logps.size(1) - r)


def test_scores_of_a_model_that_is_a_table() -> None:
    # after 0: (1/2, 1/4, 1/4), after 1: (1/7, 2/7, 4/7)
    ln = math.log
    model = markov([[ln(2), ln(1), ln(1)], [ln(1), ln(2), ln(4)], [0, 0, 0]])
    batch = collate([[0]], [[1, 1, 2]], 0)
    scores = response_scores(model, batch, entropy=True)
    assert scores.logps[0].tolist() == pytest.approx([ln(1 / 4), ln(2 / 7), ln(4 / 7)], abs=1e-5)
    assert scores.entropy is not None
    assert float(scores.entropy[0, 0]) == pytest.approx(1.5 * ln(2), abs=1e-5)
    assert not scores.entropy.requires_grad
    assert scores.logps.requires_grad


def test_G1_padding_and_batch_mates_change_nothing() -> None:
    model, batch = tiny_llama(0, vocab=12), demonstrations(9, seed=1, vocab=12)
    together = score(model, batch)
    alone = score(model, batch, SMALL)
    assert torch.allclose(together, alone, atol=1e-5)
    other = torch.where(torch.arange(batch.ids.size(1)) < torch.tensor(batch.lengths())[:, None], batch.ids, 5)
    assert torch.equal(score(model, type(batch)(other, batch.prompt_lengths, batch.response_lengths)), together)
    reversed_rows = list(range(8, -1, -1))
    assert torch.allclose(score(model, batch.rows(reversed_rows)), together[reversed_rows], atol=1e-5)


@pytest.mark.parametrize("compute", [CPU, SMALL, Compute(CPU.device, CPU.dtype, 30)])
def test_equal_rows_are_scored_once(monkeypatch: pytest.MonkeyPatch, compute: Compute) -> None:
    model, some = tiny_llama(0, vocab=12), demonstrations(6, seed=3, vocab=12)
    order = [0, 3, 0, 5, 1, 3, 3, 2, 4, 0]
    batch, seen = some.rows(order), list[tuple[int, ...]]()

    def spy(model, part, *options):
        seen.extend(
            (p, *ids[:n]) for p, ids, n in zip(part.prompt_lengths.tolist(), part.ids.tolist(), part.lengths(), strict=True)
        )
        return response_scores(model, part, *options)

    monkeypatch.setattr("apprentice.policy.response_scores", spy)
    found = score(model, batch, compute, 0.7)
    assert len(seen) == len(set(seen)) == 6
    monkeypatch.undo()
    assert torch.allclose(found, score(model, some, SMALL, 0.7)[order], atol=1e-5)
    assert torch.equal(found[0], found[2])
    assert found.shape == batch.mask.shape


def test_the_same_ids_cut_elsewhere_are_another_row() -> None:
    model = tiny_llama(0, vocab=12)
    batch = collate([[1, 2], [1], [1, 2]], [[5, END], [2, 5, END], [5, END]], 0)
    found = score(model, batch)
    for row, (prompt, response) in enumerate([([1, 2], [5, END]), ([1], [2, 5, END]), ([1, 2], [5, END])]):
        assert found[row, : len(response)].tolist() == pytest.approx(naive_logps(model, prompt, response), abs=1e-5)
        assert (found[row, len(response) :] == 0).all()


def test_G2_the_probabilities_of_all_responses_add_up_to_1() -> None:
    for prompt in ([0, 2], [1]):
        logps = score(tiny_llama(3), enumerated(prompt)).double().sum(1)
        assert float(logps.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_G3_copies_are_bit_identical_and_dropout_is_refused_until_frozen() -> None:
    batch = demonstrations(6, seed=2)
    one, copy = (tiny_llama(0, attention_dropout=0.5) for _ in range(2))
    assert torch.equal(score(one, batch), score(copy, batch))
    copy.train()
    assert not torch.equal(one(batch.ids).logits, copy(batch.ids).logits)
    with pytest.raises(ValueError, match="training mode"):
        score(copy, batch)
    freeze(copy)
    assert torch.equal(score(one, batch), score(copy, batch))
    assert not any(parameter.requires_grad for parameter in copy.parameters())


def test_G5_prompt_and_padding_receive_exactly_no_gradient() -> None:
    batch = collate([[1, 2, 0], [2]], [[0, END], [1, 2, 2, END]], 0)
    model = Logits(2, batch.ids.size(1), 4)
    scores = response_scores(model, batch)
    next_token_loss(scores.logps, batch.mask)[0].backward()
    assert model.logits.grad is not None
    touched = (model.logits.grad != 0).any(-1).tolist()
    # the logits of a token are those of the position before it
    assert touched == [[False, False, True, True, False], [True, True, True, True, False]]


def test_scores_come_in_float32_under_bfloat16() -> None:
    bf16 = Compute(CPU.device, torch.bfloat16)
    model, batch = tiny_llama(0), demonstrations(3, seed=0)
    exact, rough = score(model, batch), score(model, batch, bf16)
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    assert torch.allclose(exact, rough, atol=0.3)


def test_tied_weights_appear_once() -> None:
    names = weights(tiny_llama(0)).keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert not any(tensor.requires_grad for tensor in weights(tiny_llama(0)).values())


def test_the_critic_starts_at_zero_and_leaves_its_model_alone() -> None:
    model, batch = freeze(tiny_llama(0)), demonstrations(5, seed=0)
    before, critic = hash_of(model), Critic(model)
    assert (critic(batch) == 0).all()
    assert all(parameter.requires_grad for parameter in critic.parameters())
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(1.0)
    assert hash_of(model) == before


def random_critic() -> Critic:
    critic = Critic(tiny_llama(1, vocab=12))
    nn.init.normal_(critic.head.weight)
    return critic


def test_a_value_is_read_before_its_token_is_produced() -> None:
    critic, prompt, response = random_critic(), [1, 2], [5, 6, 7, END]
    plain = critic(collate([prompt], [response], 0))[0]
    for t in range(4):
        changed = [*response[:t], 9, *response[t + 1 :]]
        moved = (critic(collate([prompt], [changed], 0))[0] - plain).abs() > 1e-6
        assert moved.tolist() == [later > t for later in range(4)]
    hidden = critic.trunk(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
    assert float(plain[0].detach()) == pytest.approx(float(critic.head(hidden).detach()), abs=1e-5)


def test_values_do_not_depend_on_batch_mates_and_are_zero_in_the_padding() -> None:
    critic, batch = random_critic(), demonstrations(8, seed=3, vocab=12)
    together = values_of(critic, batch)
    assert torch.allclose(together, values_of(critic, batch, SMALL), atol=1e-5)
    assert (together[batch.mask == 0] == 0).all()
    assert (together[batch.mask == 1] != 0).all()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint folder."""
    tokenizer = train_word_tokenizer(["a b c"], 10)
    folder = tmp_path / "model"
    save_policy(tiny_llama(0, vocab=len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer, folder, "# A card\n")
    return folder


def test_a_saved_policy_comes_back_with_the_same_logits(saved: Path) -> None:
    tokenizer = load_tokenizer(saved)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], return_tensors="pt", return_dict=False)
    wanted = tiny_llama(0, vocab=len(tokenizer))(ids).logits
    assert torch.equal(load_policy(saved)(ids).logits, wanted)
    stock = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(stock(ids).logits, wanted)
    assert stock.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not load_policy(saved).training


def test_a_saved_policy_is_whole_and_alone(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(
        file_hashes(saved)
    )
    assert (saved / "README.md").read_text() == "# A card\n"


def test_a_saved_policy_is_on_disk_before_it_has_its_name_and_its_name_after(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, forced = tmp_path / "again", []
    monkeypatch.setattr(os, "fsync", lambda handle: forced.append((os.fstat(handle).st_ino, folder.exists())))
    save_policy(load_policy(saved), load_tokenizer(saved), folder, "# A card\n")
    inside = {(path.stat().st_ino, False) for path in [folder, *folder.rglob("*")]}
    assert set(forced[:-1]) == inside and forced[-1] == (tmp_path.stat().st_ino, True)


def test_G6_equal_weights_have_equal_hashes(saved: Path, tmp_path: Path) -> None:
    tokenizer = train_word_tokenizer(["a b c"], 10)
    for seed, equal in ((0, True), (1, False)):
        folder = tmp_path / f"again{seed}"
        save_policy(tiny_llama(seed, len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer, folder, "# A card\n")
        assert (file_hashes(folder) == file_hashes(saved)) is equal


def test_a_pinned_checkpoint_must_not_change(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pin"
    folder.mkdir()
    origin = {"checkpoint": str(saved), "revision": None, "files": file_hashes(saved)}
    (folder / "pinned.json").write_text(json.dumps(origin))
    assert checkpoint_arguments(folder) == {"pretrained_model_name_or_path": str(saved), "revision": None}
    assert torch.equal(weights(load_policy(folder))["model.norm.weight"], weights(load_policy(saved))["model.norm.weight"])
    (saved / "README.md").write_text("# Another card\n")
    with pytest.raises(ValueError, match="has changed since it was pinned"):
        load_policy(folder)
    assert checkpoint_arguments(saved) == {"pretrained_model_name_or_path": str(saved)}


def test_decoded_responses_leave_special_tokens_out() -> None:
    tokenizer = train_word_tokenizer(["a b c"], 10)
    vocabulary = tokenizer.get_vocab()
    assert decode_responses(tokenizer, [[vocabulary["a"], vocabulary["c"], vocabulary["<eos>"]], []]) == ["a c", ""]
