"""Values of TRL's losses on a few fixed log-probabilities, for tests to compare ours with: `python -m benchmarks.loss_values`.

Writes tests/apprentice/trl_values.json: inputs, values, versions. TRL's own code runs on them as shipped, models replaced by
tables of logits: the loss of `DPOTrainer`, that of `CPOTrainer` without its likelihood term, the loop of `PPOTrainer`.
"""

import contextlib
import importlib.metadata
import json
import math
import subprocess
import sys
import types
from collections import defaultdict
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.measure import ENVIRONMENT, ROOT
from benchmarks.peer_environment import PPO, python_with_trl

FILE = ROOT / "tests" / "apprentice" / "trl_values.json"
ROWS, WIDTH = 4, 5  # responses and tokens
TOKEN, END, PAD = 0, 1, 2
BETA, CLIP, KL = 0.3, 0.2, 0.05
RAGGED, FULL = [5, 2, 4, 1], [WIDTH] * ROWS
CASES = (  # TRL pays a response that leaves room one place after its last token, so gamma and lambda are 1 there
    {"lengths": FULL, "gamma": 0.9, "gae_lambda": 0.8, "kl_estimator": "k1"},
    {"lengths": RAGGED, "gamma": 1.0, "gae_lambda": 1.0, "kl_estimator": "k3"},
)


def main() -> None:
    """Write the file, under the interpreter that has TRL."""
    if "--here" not in sys.argv:
        command = [python_with_trl(PPO), "-m", "benchmarks.loss_values", "--here"]
        raise SystemExit(subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}).returncode)
    generator = torch.Generator().manual_seed(0)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}
    found = {"versions": versions, "preferences": preferences(generator), "ppo": [ppo(generator, **case) for case in CASES]}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers of three decimals."""
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 1000).round() / 1000


def logps_of(generator: torch.Generator) -> Tensor:
    """[ROWS, WIDTH] log-probabilities, below 0."""
    return -0.2 - drawn(generator, ROWS, WIDTH).abs()


def logits_of(logps: Tensor) -> Tensor:
    """[..., 3] logits under which TOKEN has these log-probabilities, and the other two share the rest."""
    rest = torch.log1p(-logps.exp()) - math.log(2)
    return torch.stack([logps, rest, rest], -1)


def preferences(generator: torch.Generator) -> dict[str, Any]:
    """Losses of pairs, each the mean over rows."""
    sides = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    lengths = {"chosen": RAGGED, "rejected": [3, 5, 2, 4]}
    inputs = {side: logps_of(generator) for side in sides}
    values = {f"dpo/{kind}": dpo(inputs, lengths, kind) for kind in ("sigmoid", "hinge", "ipo")}
    values |= {f"cpo/{kind}": cpo(inputs, lengths, kind) for kind in ("hinge", "ipo")}
    return {"beta": BETA, "lengths": lengths, **{side: logps.tolist() for side, logps in inputs.items()}, "values": values}


def inside(lengths: list[int]) -> Tensor:
    """[ROWS, WIDTH] 1 where a response has a token."""
    return (torch.arange(WIDTH) < torch.tensor(lengths)[:, None]).double()


def dpo(inputs: dict[str, Tensor], lengths: dict[str, list[int]], kind: str) -> float:
    """The loss of TRL's `DPOTrainer`."""
    from trl import DPOTrainer

    masks = {side: inside(lengths[side]) for side in ("chosen", "rejected")}
    logits = logits_of(torch.cat([inputs["chosen"], inputs["rejected"]]))
    batch = {
        "input_ids": torch.full((2 * ROWS, WIDTH + 1), TOKEN),
        "attention_mask": torch.ones(2 * ROWS, WIDTH + 1),
        "completion_mask": nn.functional.pad(torch.cat([masks["chosen"], masks["rejected"]]), (1, 0)),
        "ref_chosen_logps": (inputs["reference_chosen"] * masks["chosen"]).sum(1),
        "ref_rejected_logps": (inputs["reference_rejected"] * masks["rejected"]).sum(1),
    }
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=BETA,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    tables = nn.functional.pad(logits, (0, 0, 0, 1))  # what follows the last token is asked for and not read
    return float(DPOTrainer._compute_loss(trainer, lambda **_: types.SimpleNamespace(logits=tables), batch, False))


def cpo(inputs: dict[str, Tensor], lengths: dict[str, list[int]], kind: str) -> float:
    """The loss of TRL's `CPOTrainer`, which knows no reference: `hinge` on log-probabilities, `ipo` on log-ratios."""
    from trl.experimental.cpo import CPOTrainer

    settings = {"alpha": 0.0, "loss_type": kind, "beta": BETA, "label_smoothing": 0.0}
    trainer = types.SimpleNamespace(accelerator=types.SimpleNamespace(device="cpu"), **settings)
    sides = []
    for side in ("chosen", "rejected"):
        logps = inputs[side] - (inputs[f"reference_{side}"] if kind == "ipo" else 0.0)
        sides.append((logps * inside(lengths[side])).sum(1))
    return float(CPOTrainer.cpo_loss(trainer, *sides)[0].mean())


def ppo(generator: torch.Generator, lengths: list[int], **settings: Any) -> dict[str, Any]:
    """One update of TRL's `PPOTrainer` on fixed rollouts: its advantages, before and after whitening, and its losses."""
    from trl.experimental.ppo import ppo_trainer

    inputs = {name: logps_of(generator) for name in ("old_logps", "anchor_logps")}
    inputs["logps"] = (inputs["old_logps"] + 0.3 * drawn(generator, ROWS, WIDTH)).clamp(max=-0.05)
    inputs |= {name: drawn(generator, ROWS, WIDTH) for name in ("old_values", "new_values")}
    inputs["scores"] = drawn(generator, ROWS)
    responses = torch.where(inside(lengths) == 1, TOKEN, PAD)
    noted: dict[str, Any] = {}
    trainer = ppo_loop(settings, noted)
    ids = nn.functional.pad(responses, (1, 0), value=TOKEN)
    whiten = ppo_trainer.masked_whiten

    def noting(values: Tensor, mask: Tensor, **options: Any) -> Tensor:
        noted["advantages"] = values
        noted["whitened"] = whiten(values, mask, **options)
        return noted["whitened"]

    def at_start(table: Tensor) -> Tensor:  # TRL asks from the prompt's one token on, and drops what follows the last
        return nn.functional.pad(table, [0, 0] * (table.dim() - 2) + [0, 1])

    def forward(model: Any, *_: Any) -> Any:
        if model is trainer.ref_model:
            return types.SimpleNamespace(logits=at_start(logits_of(inputs["anchor_logps"])))
        still = 0 * trainer.model.still  # so that there is a gradient
        values = at_start(inputs["new_values"])[..., None] + still
        return types.SimpleNamespace(logits=at_start(logits_of(inputs["logps"])) + still), values

    def get_reward(model: Any, *_: Any) -> Any:
        return at_start(inputs["old_values"])[..., None], inputs["scores"].clone(), None

    parts = {
        "batch_generation": lambda *_: (ids, logits_of(inputs["old_logps"])),
        "unwrap_model_for_generation": lambda model, *_, **__: contextlib.nullcontext(model),
        "forward": forward,
        "get_reward": get_reward,
        "masked_whiten": noting,
    }
    in_order = mock.patch.object(ppo_trainer.np.random, "permutation", ppo_trainer.np.arange)  # of rows
    with mock.patch.multiple(ppo_trainer, **parts), in_order:
        ppo_trainer.PPOTrainer.train(trainer)
    mask = inside(lengths)
    values = {name: (noted[name] * mask).tolist() for name in ("advantages", "whitened")}
    values |= {"policy_loss": noted["loss/policy_avg"], "value_loss": noted["loss/value_avg"]}
    given = {name: tensor.tolist() for name, tensor in inputs.items()}
    return {"lengths": lengths, **settings, "kl_coef": KL, "clip_range": CLIP, **given, "values": values}


def ppo_loop(settings: dict[str, Any], noted: dict[str, Any]) -> Any:
    """What the loop of TRL's `PPOTrainer` asks of its trainer; what it logs is `noted`."""
    from accelerate import Accelerator

    model = nn.Module()
    model.still = nn.Parameter(torch.zeros((), dtype=torch.float64))
    model.policy, model.value_model = nn.Module(), nn.Module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    control = types.SimpleNamespace(should_save=False)
    callbacks = {name: lambda *_: control for name in ("on_train_begin", "on_step_end", "on_train_end", "on_save")}
    return types.SimpleNamespace(
        args=ppo_arguments(**settings),
        accelerator=Accelerator(cpu=True),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        model=model,
        ref_model=nn.Module(),
        reward_model=nn.Module(),
        processing_class=types.SimpleNamespace(pad_token_id=PAD, eos_token_id=END),
        dataloader=[{"input_ids": torch.full((ROWS, 1), TOKEN)}],
        state=types.SimpleNamespace(),
        control=control,
        callback_handler=types.SimpleNamespace(**callbacks),
        is_deepspeed_enabled=False,
        stop_token_id=None,
        train_dataset_len=ROWS,
        log=noted.update,
    )


def ppo_arguments(kl_estimator: str, gamma: float, gae_lambda: float) -> Any:
    """The settings that the loop reads."""
    rest = dict.fromkeys(("logging_steps", "eval_steps", "save_steps", "missing_eos_penalty"))
    return types.SimpleNamespace(
        **{name: ROWS for name in ("local_batch_size", "local_mini_batch_size", "per_device_train_batch_size", "batch_size")},
        **{name: 1 for name in ("num_ppo_epochs", "num_mini_batches", "gradient_accumulation_steps", "num_total_batches")},
        **rest,
        local_rollout_forward_batch_size=ROWS,
        total_episodes=ROWS,
        response_length=WIDTH,
        temperature=1 - 1e-7,  # TRL divides by temperature + 1e-7
        num_sample_generations=0,
        ds3_gather_for_generation=False,
        whiten_rewards=False,
        kl_coef=KL,
        kl_estimator=kl_estimator,
        gamma=gamma,
        lam=gae_lambda,
        cliprange=CLIP,
        cliprange_value=CLIP,
        vf_coef=1.0,
    )


if __name__ == "__main__":
    main()
