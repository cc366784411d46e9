"""Every further method learns, in a second: through its own stage, on the words of tests/tables.py.

After a prompt that ends in q the SFT model says x or y as often, and after y ends or says y again; right is `y` alone, a chance
of 1/4. Whatever a method learns from (the verifier, labelled pairs, rewards, qualities, a reward model) says so, and the chance
must rise.
"""

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.calibration import pair_accuracy
from apprentice.compute import CPU
from apprentice.demonstrations import demonstration, write_demonstrations, write_jsonl
from apprentice.judge import Judge, PreferencePair, train_judge
from apprentice.judge import win_logits as judge_logits
from apprentice.policy import load_policy, load_tokenizer
from apprentice.recorder import Recorder
from apprentice.reward_model import encode_pairs, new_reward_model, train_reward_model
from apprentice.sft import HeldOut, fine_tune
from apprentice.tokens import collate, encode_prompt, encode_response
from apprentice.vectors import add, difference
from tasks.stage import Stage
from tests.apprentice.toys import sft_config, tiny_llama
from tests.tables import candidates, speaker, words, write_answers, write_candidates, write_model, write_table

PROMPTS = [f"{before} q" for before in ("p", "q", "p p", "p q", "q p", "q q", "p p p", "p p q")]
PAIRS = [PreferencePair(prompt, "y", wrong, "test") for prompt in PROMPTS for wrong in ("x", "y y")]
TUNING = {"epochs": 4, "batch_size": 8, "learning_rate": 0.03}
PREFERRING = {"epochs": 4, "batch_size": 8, "learning_rate": 0.02, "gamma": 0.5}
PPO = {"iterations": 8, "batch_size": 32, "minibatch_size": 32, "learning_rate": 0.01, "kl_coef": 0.05, "kl_stop": None}
PPO |= {"max_new_tokens": 4}
STEPS = {"separator": "y", "prompts": 8, "negatives": 4, "completions": 4, "max_new_tokens": 4, **PREFERRING}
METHODS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("rft", "raft", "rest", "self_rft"), TUNING),
    **dict.fromkeys(("direct", "sft_sample_rank", "whole_pairs"), PREFERRING),
    **dict.fromkeys(("verifier_ppo", "pairwise_ppo", "bt_ppo"), PPO),
    "crlft": TUNING,
    "perstep": STEPS,
}
CASES = [(name, {}) for name in METHODS if name != "perstep"]
CASES += [("perstep", {"variant": variant}) for variant in ("practical", "shared_prefix", "advantage_weighted")]


@pytest.fixture
def stage(stage_of: Callable[..., Stage], request: pytest.FixtureRequest) -> Stage:
    """The stage that a test names, with everything that any method reads."""
    name, changes = request.param
    settings = {f"{name}.{entry}": value for entry, value in (METHODS[name] | changes).items()}
    stage = stage_of(name, **settings, **{"compute.device": "cpu", "pairs.accepted": 4})
    stage.__dict__["key"] = "0123"  # without a DVC project there is none to compute
    for model in ("base", "sft"):
        write_model(stage.data, model, speaker())
    write_table(stage.data, "prompts", *((prompt, None) for prompt in PROMPTS))
    write_table(stage.data, "demonstrations", *((prompt, "y") for prompt in PROMPTS[:4]))
    write_table(stage.data, "validation", ("q", "y"))
    poor = [demonstration(prompt, "x", "test", quality="poor") for prompt in PROMPTS]
    write_demonstrations(stage.data / "clean" / "suboptimal.jsonl", poor)
    write_answers(stage.data, dict.fromkeys(PROMPTS, "y"))
    labelled = [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in PAIRS]
    write_jsonl(stage.data / "clean" / "preferences.jsonl", labelled)
    drawn = (("x", 0.0), ("y", 2.0), ("y y", 0.5), ("x", 0.0))
    write_candidates(stage.data, *(candidates(prompt, *drawn) for prompt in PROMPTS))
    return stage


def write_reward_models(data: Path) -> None:
    """A judge and a Bradley-Terry reward, trained on the pairs."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.1}
    judge = Judge(tiny_llama(0, len(words()), **shape), words(), 64)
    config = sft_config(epochs=50, batch_size=16)
    train_judge(judge, PAIRS, config, seed="0", recorder=Recorder())
    assert pair_accuracy(judge_logits(judge, [(pair.prompt, pair.chosen, pair.rejected) for pair in PAIRS])) == 1
    write_model(data, "judge", judge.model)
    write_model(data, "trunk", tiny_llama(0, len(words()), **shape))
    model = new_reward_model(data / "models" / "trunk")
    train_reward_model(model, *encode_pairs(words(), PAIRS), config, seed="0", compute=CPU, recorder=Recorder())
    write_model(data, "bt_reward", model)


def chance(model: Any, tokenizer: Any, prompt: str = "q") -> float:
    """The chance of `y` alone in reply to a prompt."""
    asked, response = encode_prompt(tokenizer, prompt), encode_response(tokenizer, "y")
    with torch.no_grad():
        logps = model(torch.tensor([asked + response])).logits[0].log_softmax(-1)
    return float(sum(logps[len(asked) + i - 1, token] for i, token in enumerate(response)).exp())


@pytest.mark.parametrize("stage", CASES, indirect=True, ids=lambda case: "/".join([case[0], *case[1].values()]))
def test_a_method_makes_the_right_response_likelier(stage: Stage) -> None:
    if stage.name in ("pairwise_ppo", "bt_ppo"):
        write_reward_models(stage.data)
    importlib.import_module(f"tasks.{stage.name}").main(stage)
    folder = stage.data / "models" / stage.name
    assert chance(speaker(), words()) == pytest.approx(0.25, abs=1e-3)
    after = chance(load_policy(folder), load_tokenizer(folder))
    assert after > 0.4


def test_a_vector_makes_the_right_response_likelier_in_another_model() -> None:
    def tuned(*rows: tuple[str, str]) -> Any:
        model = copy.deepcopy(speaker()).requires_grad_(True)
        batch = collate(*zip(*[(encode_prompt(words(), a), encode_response(words(), b)) for a, b in rows], strict=True), 0)
        config = sft_config(epochs=4, batch_size=4, learning_rate=0.03)
        fine_tune(model, batch, HeldOut(batch), config, seed="0", compute=CPU, recorder=Recorder())
        return model.eval()

    plus, target = tuned(*((prompt, "y") for prompt in PROMPTS)), tuned(*((f"{prompt} p", "x x") for prompt in PROMPTS))
    before = chance(target, words())
    after = chance(add(target, difference(plus, speaker()), 1.0), words())
    assert after > before + 0.2
