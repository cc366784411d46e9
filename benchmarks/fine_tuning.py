"""SFT and DPO against the trainers of current TRL: one epoch over the same rows from the same weights.

Both sides: AdamW with the same settings, linear schedule, gradients clipped at norm 1, the loss over response tokens alone. TRL
as shipped, its chunked loss included, but in float32 and without gradient checkpointing, as ours. DPO's reference counts on
both sides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apprentice.epochs import train_epochs
from apprentice.policy import freeze
from apprentice.preference import optimise_preferences, with_reference
from apprentice.recorder import Recorder
from apprentice.sections import EpochsConfig, RSOConfig
from apprentice.sft import train_step
from apprentice.tokens import collate
from benchmarks.measure import Side, alternate
from benchmarks.peer_environment import CURRENT, python_with_trl
from benchmarks.results import Results
from benchmarks.shapes import MADE, computing, computing_plainly, make, material
from benchmarks.worker import Figures, Prepare


@dataclass(frozen=True)
class Work:
    """An epoch over `rows` rows (pairs), `batch` a step."""

    rows: int
    batch: int


SFT = {"tiny": Work(512, 16), "wide": Work(128, 16)}
DPO = {"tiny": Work(256, 64), "wide": Work(64, 16)}
RATE, BETA, WARMUP = 1e-4, 0.1, 0.1


def sft(results: Results, runs: int) -> None:
    """Fine-tuning on both shapes."""
    _compare("sft", results, runs)


def dpo(results: Results, runs: int) -> None:
    """DPO on both shapes."""
    _compare("dpo", results, runs)


def _compare(method: str, results: Results, runs: int) -> None:
    python = python_with_trl(CURRENT)
    for shape in ("tiny", "wide"):
        make(shape)
        sides = {
            "ours": Side(f"benchmarks.fine_tuning:our_{method}", {"shape": shape}, python, tidy=True),
            "trl": Side(f"benchmarks.fine_tuning:trl_{method}", {"shape": shape}, python, tidy=True),
        }
        results.compare(f"{method}/{shape}", alternate(sides, runs))


def _epoch(work: Work) -> dict[str, Any]:
    return {
        "epochs": 1,
        "batch_size": work.batch,
        "learning_rate": RATE,
        "warmup_share": WARMUP,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }


def our_sft(shape: str) -> Prepare:
    """An epoch of our fine-tuning."""
    work, given, compute = SFT[shape], material(shape), computing()
    train = given.demonstrated(work.rows)
    tokens = float(train.response_lengths.sum())

    def prepare(repeat: int) -> Callable[[], Figures]:
        model = given.model("base")

        def step(rows: list[int]) -> Figures:
            return {"loss": train_step(model, train.rows(rows), compute)}

        def epoch() -> Figures:
            config = EpochsConfig(**_epoch(work))
            trained = train_epochs(model, work.rows, step, config, seed=str(repeat), recorder=Recorder())
            return {"loss": trained.means["loss"], "tokens": tokens}

        return epoch

    return prepare


def trl_sft(shape: str) -> Prepare:
    """An epoch of TRL's fine-tuning."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    work, given = SFT[shape], material(shape)
    computing_plainly()
    prompts, responses = (rows[: work.rows] for rows in given.demonstrations)
    rows = Dataset.from_dict(
        {
            "input_ids": [[*p, *r] for p, r in zip(prompts, responses, strict=True)],
            "labels": [[-100] * len(p) + r for p, r in zip(prompts, responses, strict=True)],
        }
    )

    def prepare(repeat: int) -> Callable[[], Figures]:
        trainer = SFTTrainer(
            model=given.plain_model("base"),
            args=SFTConfig(**_trl_arguments(work, repeat)),
            train_dataset=rows,
            processing_class=given.tokenizer,
        )

        def epoch() -> Figures:
            return {"loss": trainer.train().training_loss, "tokens": float(sum(map(len, responses)))}

        return epoch

    return prepare


def _trl_arguments(work: Work, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(MADE / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10,
        "seed": seed,
        "per_device_train_batch_size": work.batch,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": int(WARMUP * work.rows / work.batch),
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_length": None,
    }


def our_dpo(shape: str) -> Prepare:
    """The reference's scores and an epoch of our DPO."""
    work, given, compute = DPO[shape], material(shape), computing()
    prompts, chosen, rejected = (rows[: work.rows] for rows in given.pairs)
    better, worse = collate(prompts, chosen, given.end), collate(prompts, rejected, given.end)
    tokens = float(sum(map(len, [*chosen, *rejected])))

    def prepare(repeat: int) -> Callable[[], Figures]:
        policy, reference = given.model("sft"), freeze(given.model("sft"))

        def epoch() -> Figures:
            config = RSOConfig(**_epoch(work), loss="sigmoid_norm", gamma=BETA)
            pairs = with_reference(reference, better, worse, compute)
            found = optimise_preferences(policy, pairs, config, seed=str(repeat), compute=compute, recorder=Recorder())
            return {"loss": found["loss"], "tokens": tokens}

        return epoch

    return prepare


def trl_dpo(shape: str) -> Prepare:
    """An epoch of TRL's DPO."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):
        """Takes token ids as they are: the same ids as ours."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    work, given = DPO[shape], material(shape)
    computing_plainly()
    prompts, chosen, rejected = (rows[: work.rows] for rows in given.pairs)
    rows = Dataset.from_dict({"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected})
    tokens = float(sum(map(len, [*chosen, *rejected])))

    def prepare(repeat: int) -> Callable[[], Figures]:
        trainer = Prepared(
            model=given.plain_model("sft"),
            ref_model=given.plain_model("sft"),
            args=DPOConfig(**_trl_arguments(work, repeat), beta=BETA),
            train_dataset=rows,
            processing_class=given.tokenizer,
        )

        def epoch() -> Figures:
            return {"loss": trainer.train().training_loss, "tokens": tokens}

        return epoch

    return prepare
