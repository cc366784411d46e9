"""PPO with the self-reward against TRL 1.12.0, the last release that has PPO: the same work on both sides, checked first.

Both sides: the same starting weights (policy, anchor, critic, the two scorers), the same prompts in the same order, separate
critic, AdamW with the same settings, no clipping of gradients (TRL's loop has none), one optimiser step an epoch. wide_forced
decodes exactly `response` tokens (no end token is there to be drawn), tiny_natural stops at the end token.
"""

import copy
import dataclasses
import random
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apprentice.policy import freeze, token_logps
from apprentice.ppo import PPO, Prompts
from apprentice.recorder import Recorder
from apprentice.sampling import Rollout
from apprentice.sections import SRPPOConfig
from apprentice.srppo import SelfReward
from benchmarks.measure import BenchmarkError, Side, Worker, alternate
from benchmarks.peer_environment import PPO as TRL
from benchmarks.peer_environment import python_with_trl
from benchmarks.results import Results
from benchmarks.shapes import MADE, Material, computing, make, material
from benchmarks.worker import Figures

FIRST_GAP = 1e-3  # nats; the two sides' first rewards, advantages and ratio may differ by roundings


@dataclass(frozen=True)
class Workload:
    """What one run is: `updates` rollouts of `batch` responses of at most `response` tokens, two epochs of one step each.
    forced: no response ends by itself. micro: rows in a forward pass of TRL's training."""

    shape: str
    forced: bool
    response: int
    batch: int
    updates: int
    micro: int


WORKLOADS = {
    "wide_forced": Workload("wide", True, 32, 64, 1, 8),
    "tiny_natural": Workload("tiny", False, 48, 128, 4, 32),
}
EPOCHS, RATE, KL, CLIP, LAMBDA = 2, 1e-4, 0.05, 0.2, 0.95


def family(results: Results, runs: int) -> None:
    """Check both sides on the same rollouts, then measure them on both workloads."""
    python = python_with_trl(TRL)
    for name, work in WORKLOADS.items():
        make(work.shape)
        sides = {
            "ours": Side("benchmarks.ppo:ours", {"workload": name}, python),
            "trl_as_shipped": Side("benchmarks.ppo:trl", {"workload": name}, python),
            "trl_without_gc": Side("benchmarks.ppo:trl", {"workload": name, "collect": False}, python),
        }
        if work.forced:
            results.gate(f"ppo/{name}", _gate(name, python))
        results.compare(f"ppo/{name}", alternate(sides, runs))


def _gate(workload: str, python: str) -> Figures:
    """Both sides' first update on identical rollouts. Raises BenchmarkError where they differ."""
    found = {}
    for side in ("ours", "trl"):
        worker = Worker(Side(f"benchmarks.ppo_first:{side}", {"workload": workload}, python))
        try:
            found[side] = worker.run(0)["figures"]
        finally:
            worker.close()
    ours, trl = found["ours"], found["trl"]
    differences = {
        "rewards": max(abs(a - b) for a, b in zip(ours["rewards"], trl["rewards"], strict=True)),
        "advantages": max(abs(a - b) for a, b in zip(ours["advantages"], trl["advantages"], strict=True)),
        "kl": abs(ours["kl"] - trl["kl"]),
        "our_ratio_from_1": abs(ours["ratio"] - 1),
        "trl_ratio_from_1": abs(trl["ratio"] - 1),
    }
    if max(differences.values()) > FIRST_GAP:
        raise BenchmarkError(f"the two sides do not do the same work: {differences}")
    return differences


def order(work: Workload, pool: int, seed: str) -> list[list[int]]:
    """The prompts that our PPO draws for each update: TRL is given them in this order."""
    return [random.Random(f"{seed}/{n}").sample(range(pool), work.batch) for n in range(work.updates)]


def config(work: Workload) -> SRPPOConfig:
    """Our settings, equal to TRL's in `_trl_arguments`."""
    return SRPPOConfig(
        init="sft",
        kl_anchor="sft",
        missing_eos_reward=0.0,
        kl_coef=KL,
        kl_estimator="k1",
        kl_stop=None,
        iterations=work.updates,
        batch_size=work.batch,
        epochs=EPOCHS,
        minibatch_size=work.batch,
        temperature=1.0,
        max_new_tokens=work.response,
        critic_init="sft",
        gamma=1.0,
        gae_lambda=LAMBDA,
        whiten=True,
        reward_std_floor=1e-6,
        clip_range=CLIP,
        value_clip_range=CLIP,
        old_logps="auto",
        learning_rate=RATE,
        critic_learning_rate=RATE,
        max_grad_norm=1e9,
        reward_target="sft",
        reward_baseline="base",
        baseline_weight=1.0,
        placement="eos",
        span="sum",
    )


class EveryResponse(SelfReward):
    """The self-reward paid to every response, ended or not, as TRL pays it."""

    def __call__(self, rollout: Rollout, logps: Any) -> Any:
        return super().__call__(dataclasses.replace(rollout, ended=torch.ones_like(rollout.ended)), logps)


def trainer_of_ours(work: Workload, given: Material, seed: str, policy: Any) -> PPO:
    compute = computing()
    end = -1 if work.forced else given.end
    classes = torch.zeros(len(given.tokenizer), dtype=torch.long)
    keys = [str(i) for i in range(len(given.prompts))]
    prompts = Prompts(given.prompts, keys, end, classes, ("all",))
    scorers = {name: freeze(given.model(name)) for name in ("sft", "base")}
    settings = config(work)
    return PPO(policy, scorers, prompts, EveryResponse(settings, prompts), settings, seed=seed, compute=compute)


def ours(workload: str) -> Callable[[int], Callable[[], Figures]]:
    """Our side: a fresh trainer for each repeat, its training timed."""
    work = WORKLOADS[workload]
    given = material(work.shape)

    def prepare(repeat: int) -> Callable[[], Figures]:
        trainer, recorder = trainer_of_ours(work, given, str(repeat), given.model("sft")), Recorder()

        def train() -> Figures:
            trainer.train(recorder)
            rows = recorder.rows
            tokens = sum((row["length"] or 0) * work.batch for row in rows)
            return _figures([row["reward"] for row in rows], [row["kl_to_anchor"] for row in rows], tokens)

        return train

    return prepare


def _figures(rewards: list[Any], kls: list[Any], tokens: float) -> Figures:
    """Reward and KL to the anchor (nats a response) of the first and the last rollout; response tokens without padding."""
    return {
        "first_reward": rewards[0],
        "last_reward": rewards[-1],
        "first_kl": kls[0],
        "last_kl": kls[-1],
        "tokens": tokens,
    }


class LogRatio(nn.Module):
    """The self-reward as the reward model TRL asks for: at each position the sum so far of log sft - log base over response
    tokens, read by TRL at the response's last token."""

    base_model_prefix = "scorer"

    def __init__(self, target: nn.Module, baseline: nn.Module, prompt: int) -> None:
        super().__init__()
        self.scorer, self.score = _Scorer(target, baseline, prompt), nn.Identity()


class _Scorer(nn.Module):
    def __init__(self, target: nn.Module, baseline: nn.Module, prompt: int) -> None:
        super().__init__()
        self.target, self.baseline, self.prompt, self.tokens = target, baseline, prompt, 0.0

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> Any:
        response = input_ids.size(1) - self.prompt
        mask, ids = attention_mask[:, self.prompt :], input_ids[:, self.prompt :]
        self.tokens += float(mask.sum())
        logps = [
            token_logps(
                model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    use_cache=False,
                    logits_to_keep=response + 1,
                ).logits[:, :-1],
                ids,
            )
            for model in (self.target, self.baseline)
        ]
        totals = nn.functional.pad(((logps[0] - logps[1]) * mask).cumsum(1), (self.prompt, 0))
        return types.SimpleNamespace(hidden_states=(totals[..., None],))


class ValueModel(nn.Module):
    """The critic TRL asks for: a trunk and a scalar head that starts at zero, as ours does."""

    base_model_prefix = "model"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = copy.deepcopy(model.base_model)
        self.score = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)


def trainer_of_trl(work: Workload, given: Material, seed: str, rate: float = RATE) -> Any:
    """TRL's trainer as shipped, over the prompts in the order that ours draws them."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from trl.experimental.ppo import PPOTrainer

    computing()
    tokenizer = copy.deepcopy(given.tokenizer)
    if work.forced:  # ids outside the models' vocabulary: neither can be drawn
        tokenizer.add_special_tokens({"pad_token": "<no pad>", "eos_token": "<no end>"})
    chosen = [row for rows in order(work, len(given.prompts), seed) for row in rows]
    pad, width = tokenizer.pad_token_id, max(map(len, given.prompts))
    rows = [[pad] * (width - len(given.prompts[i])) + given.prompts[i] for i in chosen]
    sft = given.model("sft")
    trainer = PPOTrainer(
        args=_trl_arguments(work, int(seed), rate),
        processing_class=tokenizer,
        model=sft,
        ref_model=given.model("sft"),
        reward_model=LogRatio(given.model("sft"), given.model("base"), width),
        value_model=ValueModel(sft),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=_collate,
    )
    trainer.dataloader = trainer.accelerator.prepare(
        DataLoader(trainer.train_dataset, batch_size=work.batch, collate_fn=_collate)
    )
    return trainer


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def _trl_arguments(work: Workload, seed: int, rate: float) -> Any:
    from trl.experimental.ppo import PPOConfig

    return PPOConfig(
        output_dir=str(MADE / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        num_sample_generations=0,
        disable_tqdm=True,
        logging_steps=1,
        seed=seed,
        per_device_train_batch_size=work.micro,
        gradient_accumulation_steps=work.batch // work.micro,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=work.batch * work.updates,
        local_rollout_forward_batch_size=work.batch,
        response_length=work.response,
        stop_token=None if work.forced else "eos",
        temperature=1.0,
        kl_coef=KL,
        kl_estimator="k1",
        learning_rate=rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        cliprange=CLIP,
        cliprange_value=CLIP,
        vf_coef=1.0,
        gamma=1.0,
        lam=LAMBDA,
    )


def trl(workload: str, collect: bool = True) -> Callable[[int], Callable[[], Figures]]:
    """TRL's side; `collect` False makes its calls of gc.collect do nothing."""
    from trl.experimental.ppo import ppo_trainer

    work = WORKLOADS[workload]
    given = material(work.shape)
    if not collect:
        ppo_trainer.gc = types.SimpleNamespace(collect=lambda: None)  # type: ignore[attr-defined]

    def prepare(repeat: int) -> Callable[[], Figures]:
        trainer = trainer_of_trl(work, given, str(repeat))

        def train() -> Figures:
            trainer.train()
            logged = [row for row in trainer.state.log_history if "objective/scores" in row]
            return _figures(
                [row["objective/scores"] for row in logged],
                [row["objective/kl"] for row in logged],
                trainer.reward_model.scorer.tokens,
            )

        return train

    return prepare
