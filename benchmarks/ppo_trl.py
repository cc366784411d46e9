"""TRL's side of the PPO comparison: its trainer as shipped, given the self-reward and a critic as it asks for them."""

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apprentice.logps import token_logps
from benchmarks.measure import BenchmarkError
from benchmarks.ppo import CLIP, EPOCHS, KL, LAMBDA, RATE, WORKLOADS, Workload, figures, order
from benchmarks.shapes import MADE, Material, computing_plainly, material
from benchmarks.worker import Figures, Prepare


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
        self.score = nn.Linear(model.config.hidden_size, 1, device=model.device, dtype=model.dtype)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)


def trainer_of_trl(work: Workload, given: Material, seed: str, rate: float = RATE) -> Any:
    """TRL's trainer as shipped, over the prompts in the order that ours draws them."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from trl.experimental.ppo import PPOTrainer

    computing_plainly()
    tokenizer = copy.deepcopy(given.tokenizer)
    if work.forced:  # ids outside the models' vocabulary: neither can be drawn
        tokenizer.add_special_tokens({"pad_token": "<no pad>", "eos_token": "<no end>"})
    batches = order(work, len(given.prompts), seed)
    chosen = [row for rows in [*batches, batches[0]] for row in rows]  # after the last batch accelerate accumulates no more
    pad, width = tokenizer.pad_token_id, max(map(len, given.prompts))
    rows = [[pad] * (width - len(given.prompts[i])) + given.prompts[i] for i in chosen]
    sft = given.plain_model("sft")
    trainer = PPOTrainer(
        args=trl_arguments(work, int(seed), rate),
        processing_class=tokenizer,
        model=sft,
        ref_model=given.plain_model("sft"),
        reward_model=LogRatio(given.plain_model("sft"), given.plain_model("base"), width),
        value_model=ValueModel(sft),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=collated,
    )
    trainer.dataloader = trainer.accelerator.prepare(
        DataLoader(trainer.train_dataset, batch_size=work.batch, collate_fn=collated)
    )
    return trainer


def collated(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Prompts of one length as TRL's loop takes them."""
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


def trl_arguments(work: Workload, seed: int, rate: float = RATE, **changes: Any) -> Any:
    """Our settings by TRL's names, on a CPU in float32; `changes`: what another device asks for."""
    from trl.experimental.ppo import PPOConfig

    settings: dict[str, Any] = dict(
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
    return PPOConfig(**(settings | changes))


def trl(workload: str, collect: bool = True) -> Prepare:
    """TRL's side; `collect` False makes its calls of gc.collect do nothing."""
    from trl.experimental.ppo import ppo_trainer

    work = WORKLOADS[workload]
    given = material(work.shape)
    if not collect:
        ppo_trainer.gc = types.SimpleNamespace(collect=lambda: None)  # type: ignore[attr-defined]

    def prepare(repeat: int) -> Callable[[], Figures]:
        trainer, steps = trainer_of_trl(work, given, str(repeat)), list[int]()
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))

        def train() -> Figures:
            trainer.train()
            if len(steps) != work.updates * EPOCHS:
                raise BenchmarkError(f"TRL made {len(steps)} steps where ours makes {work.updates * EPOCHS}, one an epoch")
            logged = [row for row in trainer.state.log_history if "objective/scores" in row]
            return figures(
                [row["objective/scores"] for row in logged],
                [row["objective/kl"] for row in logged],
                trainer.reward_model.scorer.tokens,
            )

        return train

    return prepare
