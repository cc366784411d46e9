"""Activations computed again: the same numbers, less memory, refusals in a line."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from apprentice.compute import CPU
from apprentice.layers import set_layers
from apprentice.policy import Critic, load_policy, response_scores, save_policy
from apprentice.sampling import Request, sample
from apprentice.tokens import Batch, train_word_tokenizer
from tests.apprentice.families import FAMILIES, tiny
from tests.apprentice.toys import END, demonstrations, gradient, relative_error

AGAIN = dataclasses.replace(CPU, gradient_checkpointing=True)


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that a forward pass keeps for the way back, the weights themselves left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = response_scores(model, batch).logps.sum()
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_computed_again_give_the_same_gradients_from_less_memory(family: str) -> None:
    batch, kept = demonstrations(12, seed=0, vocab=40), {}
    models = {"plain": set_layers(tiny(family), CPU), "again": set_layers(tiny(family), AGAIN)}
    for name, model in models.items():
        kept[name] = saved_bytes(model, batch)
    assert relative_error(gradient(models["again"]), gradient(models["plain"])) < 1e-6
    assert kept["again"] < 0.6 * kept["plain"]
    asked = [Request([1, 2, 5], "k", n) for n in range(8)]
    plain, again = (sample(model, asked, seed="0", end=END, max_new_tokens=6) for model in models.values())
    assert torch.equal(plain.logps, again.logps), "sampling keeps its cache"


def test_a_copy_of_such_a_model_trains_its_own_layers() -> None:
    batch, model = demonstrations(5, seed=0, vocab=40), set_layers(tiny("llama"), AGAIN)
    critic = Critic(model)
    nn.init.normal_(critic.head.weight)
    critic(batch).sum().backward()
    assert gradient(critic).abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = Critic(tiny("llama"))
    plain.head.load_state_dict(critic.head.state_dict())
    plain(batch).sum().backward()
    assert relative_error(gradient(critic), gradient(plain)) < 1e-6


def test_a_folder_is_loaded_so_and_saved_as_ever(tmp_path) -> None:
    tokenizer = train_word_tokenizer(["a b c"], 10)
    save_policy(tiny("llama", vocab=len(tokenizer)), tokenizer, tmp_path / "plain", "")
    compute = dataclasses.replace(AGAIN, attention="eager")
    loaded = load_policy(tmp_path / "plain", compute)
    assert loaded.config._attn_implementation == "eager"
    assert saved_bytes(loaded, demonstrations(3, 0)) < saved_bytes(load_policy(tmp_path / "plain"), demonstrations(3, 0))
    save_policy(loaded, tokenizer, tmp_path / "again", "")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compute\.gradient_checkpointing: Linear has no layers"):
        set_layers(nn.Linear(2, 2), AGAIN)
