"""Roles on one trunk: equal to the merged model, to separate copies and to nothing trained; what is written, read, refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from apprentice.compute import CPU
from apprentice.epochs import train_epochs
from apprentice.footprint import footprint, shape_of
from apprentice.foreign_checkpoint import inspect_checkpoint
from apprentice.lora import ADAPTER, Role, Trunk, adapter_shape, read_origin
from apprentice.optimise import Optimiser
from apprentice.policy import load_policy, response_scores, weights
from apprentice.recorder import Recorder
from apprentice.reward_model import bt_rewards, bt_step, load_reward_model, new_reward_model
from apprentice.sampling import Request, sample
from apprentice.sections import LoRAConfig
from apprentice.sft import train_step
from apprentice.srppo import SelfRewardingPPO
from tests.apprentice.toys import END, Interrupted, Keeping, demonstrations, hash_of, pool, sft_config, srppo_config, tiny_llama

CONFIG = LoRAConfig(rank=4, alpha=8.0, targets="all-linear")
ORIGIN = {"trunk": "base", "hash": "0123", "path": "data/models/base"}
BATCH = demonstrations(6, seed=0)


def trunk(config: LoRAConfig = CONFIG, seed: str = "s", **changes: Any) -> Trunk:
    return Trunk(tiny_llama(0, **changes), config, seed=seed, origin=ORIGIN)


def stirred(role: Role, seed: int = 1) -> Role:
    """The role, its adapter far from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return role


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=BATCH.ids).logits
    return found


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    """The folder of a model that was trained as an adapter on tiny_llama(0)."""
    stirred(trunk().train()).save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def test_the_weights_with_an_adapter_are_those_of_the_merged_model_and_the_trunk_stays() -> None:
    role, other = stirred(trunk().train()), stirred(trunk().train())
    before = logits(role)
    found = dict(role.trunk.weights_with(role.name))
    assert torch.equal(logits(role), before)
    bare = dict(role.trunk.weights_with(None))
    plain, merged = weights(tiny_llama(0)), weights(other.trunk.merge(str(other.name)))
    assert list(found) == list(merged) == list(bare)
    assert all(torch.equal(bare[name], plain[name]) for name in plain)
    assert all(torch.allclose(found[name], merged[name], atol=1e-6) for name in merged)
    assert any(not torch.equal(found[name], plain[name]) for name in plain)


def test_a_new_role_is_the_trunk_until_it_is_trained() -> None:
    one = trunk()
    role, plain = one.train(), logits(tiny_llama(0))
    assert torch.equal(logits(role), plain) and torch.equal(logits(one.role()), plain)
    assert not torch.equal(logits(stirred(role)), plain) and torch.equal(logits(one.role()), plain)


def test_merged_and_adapter_say_the_same_and_both_load_without_us(tmp_path: Path) -> None:
    role = stirred(trunk().train())
    wanted = logits(role)
    role.save_pretrained(tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=0)
    assert {name: t.shape for name, t in weights(merged).items()} == {n: t.shape for n, t in weights(tiny_llama(0)).items()}
    adapter = PeftModel.from_pretrained(tiny_llama(0), tmp_path / "m" / ADAPTER).eval()
    assert torch.equal(logits(adapter), wanted)
    assert torch.equal(logits(trunk().role(tmp_path / "m" / ADAPTER)), wanted)
    assert read_origin(tmp_path / "m") == ORIGIN and read_origin(tmp_path) is None


def test_what_is_written_does_not_depend_on_the_order_of_a_set(sft: Path) -> None:
    said = json.loads((sft / ADAPTER / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted(said["target_modules"]) and len(said["target_modules"]) == 14
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (4, 8.0, "data/models/base")


def test_a_deep_copy_is_a_new_adapter_on_the_same_trunk(sft: Path) -> None:
    role = trunk().role(sft / ADAPTER)
    own = copy.deepcopy(role)
    wanted = logits(role)
    assert torch.equal(logits(own), wanted) and own.trunk is role.trunk
    assert torch.equal(logits(copy.deepcopy(stirred(own))), logits(own)) and torch.equal(logits(role), wanted)
    assert all(p.requires_grad for p in own.parameters()) and not any(p.requires_grad for p in role.parameters())


def test_the_adapters_follow_from_the_seed_and_leave_the_others_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    a, b, other = (weights(trunk(seed=seed).train()) for seed in ("s", "s", "t"))
    one = trunk()
    second = (one.train(), weights(one.train()))[1]
    name = next(iter(a))
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], other[name]) and not torch.equal(a[name], second[name])
    model = tiny_llama(0)
    torch.manual_seed(7)
    Trunk(model, CONFIG, seed="s", origin=ORIGIN).train()
    assert torch.equal(torch.rand(1), expected)


def trainer(policy: Any, sft: Any, base: Any, critic: Any) -> SelfRewardingPPO:
    config = srppo_config(critic_init="critic", iterations=2, learning_rate=1e-2, epochs=2)
    return SelfRewardingPPO(policy, {"sft": sft, "base": base, "critic": critic}, pool(), config, seed="0", compute=CPU)


def on_one_trunk(folder: Path) -> tuple[Trunk, SelfRewardingPPO]:
    one = trunk()
    base, sft = one.role(), one.role(folder / ADAPTER)
    return one, trainer(copy.deepcopy(sft), sft, base, sft)


def test_four_roles_on_one_trunk_train_as_four_models(sft: Path) -> None:
    """Beside them the merged SFT model, the base, and a trunk of its own for the policy and for the critic."""
    apart = trainer(copy.deepcopy(trunk().role(sft / ADAPTER)), load_policy(sft), tiny_llama(0), trunk().role(sft / ADAPTER))
    _, together = on_one_trunk(sft)
    assert torch.equal(together.sample().batch.ids, apart.sample().batch.ids)
    found, expected = Recorder(), Recorder()
    together.train(found)
    apart.train(expected)
    assert len(found.rows) == 2 and found.rows[1]["kl_to_sft"] != 0
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert row == pytest.approx(other, abs=1e-4, rel=1e-4)
    torch.testing.assert_close(logits(together.policy), logits(apart.policy), atol=1e-4, rtol=0)
    rollout = apart.sample()
    (_, ours), (_, theirs) = together.evaluate(rollout), apart.evaluate(rollout)
    torch.testing.assert_close(ours.advantages, theirs.advantages, atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.returns, theirs.returns, atol=1e-3, rtol=0)


def test_gradients_reach_the_policy_and_the_critic_alone(sft: Path) -> None:
    one, ppo = on_one_trunk(sft)
    torch.nn.init.normal_(ppo.critic.head.weight)  # a head of zeros hides the critic's trunk from the gradient
    _, experience = ppo.evaluate(ppo.sample())
    ppo._gather(experience, list(range(8)))
    reached = {id(p) for p in one.model.parameters() if p.grad is not None and bool(p.grad.any())}
    trained = {id(p) for p in [*ppo.policy.parameters(), *ppo.critic.trunk.parameters()]}
    assert reached == trained and len(trained) == 2 * 2 * 14


def test_base_and_sft_say_after_training_what_they_said_before_to_the_byte(sft: Path) -> None:
    _, ppo = on_one_trunk(sft)
    before, policy = {name: logits(model) for name, model in ppo.scorers.items()}, logits(ppo.policy)
    ppo.train(Recorder())
    assert all(torch.equal(logits(model), before[name]) for name, model in ppo.scorers.items())
    assert not torch.equal(logits(ppo.policy), policy)


def test_the_trunk_is_there_once(sft: Path) -> None:
    one, ppo = on_one_trunk(sft)
    whole, adapter = shape_of(one.model.config).parameters, sum(p.numel() for p in ppo.policy.parameters())
    assert sum(p.numel() for p in one.model.parameters()) == whole + 3 * adapter  # SFT, policy, critic
    assert {id(role.trunk) for role in (ppo.policy, *ppo.scorers.values(), ppo.critic.trunk)} == {id(one)}


def test_sampling_leaves_a_policy_trainable() -> None:
    role = trunk().train()
    sample(role, [Request([0, 1], "a")], seed="0", end=END, max_new_tokens=3)
    response_scores(role, BATCH).logps.sum().backward()
    assert sum(p.grad is not None for p in role.parameters()) == 28


def fine_tuned(recorder: Recorder) -> Role:
    role = trunk().train()
    train_epochs(
        role,
        len(BATCH.ids),
        lambda rows: {"loss": train_step(role, BATCH.rows(rows), CPU)},
        sft_config(epochs=2, batch_size=2),
        seed="0",
        recorder=recorder,
    )
    return role


def test_a_snapshot_holds_the_adapter_alone_and_a_resumed_run_ends_with_the_same_bytes() -> None:
    undisturbed, stopped = hash_of(fine_tuned(Recorder())), Keeping(keep_at=3)
    with pytest.raises(Interrupted):
        fine_tuned(stopped)
    assert stopped.saved is not None
    assert sum(t.numel() for t in stopped.saved[0]["model"].values()) == adapter_shape(tiny_llama(0).config, CONFIG).parameters
    assert hash_of(fine_tuned(Keeping(saved=stopped.saved))) == undisturbed != hash_of(trunk().train())


def test_a_reward_model_trains_its_adapter_and_head_and_is_written_merged(tmp_path: Path, sft: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "base")
    one = Trunk(new_reward_model(tmp_path / "base"), CONFIG, seed="s", origin=ORIGIN, heads=["score"])
    model = copy.deepcopy(one.role(sft / ADAPTER))
    before, optimiser = one.model.model.embed_tokens.weight.clone(), Optimiser(model.parameters(), 1e-2, 1.0)
    assert len(list(model.parameters())) == 28 + 1 and bt_rewards(model, BATCH).abs().max() == 0
    for _ in range(3):
        bt_step(model, BATCH.rows([0, 1]), BATCH.rows([2, 3]), CPU)
        optimiser.clip()
        optimiser.step()
    wanted = bt_rewards(model, BATCH).detach()
    assert wanted.abs().max() > 0 and torch.equal(one.model.model.embed_tokens.weight, before)
    model.save_pretrained(tmp_path / "bt")
    torch.testing.assert_close(bt_rewards(load_reward_model(tmp_path / "bt"), BATCH), wanted, atol=1e-5, rtol=0)
    assert not (tmp_path / "bt" / ADAPTER).exists()


def test_an_adapter_of_another_form_is_refused(sft: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter of rank and alpha \(4, 8.0\), and params.yaml says .* \(2, 8.0\)"):
        trunk(LoRAConfig(2, 8.0, "all-linear")).role(sft / ADAPTER)
    with pytest.raises(ValueError, match=r"fits not the layers of lora.targets .*q_proj.*, first .*down_proj"):
        trunk(LoRAConfig(4, 8.0, r".*q_proj")).role(sft / ADAPTER)
    with pytest.raises(ValueError, match="fits not"):
        trunk(hidden_size=32).role(sft / ADAPTER)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("nothing", "names no layer of this model"),
        (r".*(q_proj|embed_tokens)", "names model.embed_tokens, which is no linear layer"),
        (r".*(q_proj|lm_head)", "names lm_head, whose weights are those of the embedding"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(targets: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"lora.targets: .*{said}"):
        trunk(LoRAConfig(4, 8.0, targets)).train()


def test_a_trunk_that_was_merged_serves_no_other_role(tmp_path: Path) -> None:
    one = trunk()
    base = one.role()
    one.train().save_pretrained(tmp_path / "m")
    with pytest.raises(RuntimeError, match="was merged into the model that was saved"):
        logits(base)


def test_a_link_that_leaves_the_folder_of_the_adapter_is_refused(sft: Path, tmp_path: Path) -> None:
    outside = (sft / ADAPTER / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (sft / ADAPTER / "adapter_model.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match="a link that leaves the folder"):
        inspect_checkpoint(sft)


def test_the_estimate_counts_the_trunk_once_and_trains_the_adapters() -> None:
    """Per layer 4 squares of 16 in attention and 3 of 16 by 32 in the MLP: 4 (4 * 32 + 3 * 48) = 1088 parameters."""
    config = tiny_llama(0).config
    whole, adapter = shape_of(config), adapter_shape(config, CONFIG)
    assert adapter.parameters == 2 * 1088 and adapter.trunk == whole.parameters
    found = footprint([adapter, adapter], [whole, adapter], CPU, samples=True)
    assert found.certain == 16 * 2 * 2176 + 4 * (whole.parameters + 2176)
    assert found.disk == 2 * 4 * (whole.parameters + 2176) + 2 * 12 * 2 * 2176
