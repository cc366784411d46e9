"""What every fine-tuning stage shares: they differ in their rows, their start and their settings."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from apprentice.demonstrations import Demonstration
from tasks.stage import Stage


def fine_tune_stage(stage: Stage, rows: Sequence[Demonstration], *, init: str, config: Any = None) -> None:
    """Fine-tune a model of the pipeline on rows; write model, history and metrics, the label-free gate if it is asked for.

    `config` replaces the stage's section where it is derived.
    """
    from tasks.checkpoints import batch_of, compute_of, tokenizer_of

    compute, tokenizer = compute_of(stage), tokenizer_of(stage, init)
    fine_tune_on(stage, batch_of(tokenizer, rows, compute), tokenizer, compute, init=init, config=config)


def fine_tune_on(
    stage: Stage,
    train: Any,
    tokenizer: Any,
    compute: Any,
    *,
    init: str,
    config: Any = None,
    weights: Any = None,
    figures: dict[str, Any] | None = None,
) -> None:
    """The same on a batch, with optional [N, T] weights; the tokenizer is saved with the model, `figures` with its metrics."""
    from apprentice.policy import freeze
    from apprentice.sft import HeldOut, fine_tune
    from tasks.checkpoints import batch_of, save_model, table
    from tasks.needs import fine_tuned
    from tasks.resume import StageRecorder
    from tasks.roles import preflight, roles_of

    config = config or stage.config
    needs = fine_tuned(config, init)
    preflight(stage, compute, *needs)
    (model, scorers), validation = roles_of(stage, init, needs.frozen, compute), table(stage, "validation")
    stage.say(f"{len(train.ids)} rows, {len(validation)} held out, {config.epochs} epochs, from {init}")
    shares = _gate(stage, model, scorers["base"], validation, tokenizer, compute) if scorers else None
    by_gate = _mean_of(shares) if shares and config.select == "gate" else None
    result = fine_tune(
        model,
        train,
        HeldOut(batch_of(tokenizer, validation, compute), by_gate),
        config,
        seed=f"{stage.params.seed}/sft",
        compute=compute,
        recorder=StageRecorder(stage, "loss", "held_out_loss"),
        weights=weights,
    )
    stage.say(f"kept epoch {result['epoch']}, held-out loss {result['held_out_loss']:.4f}")
    metrics = {"held_out_loss": round(result["held_out_loss"], 6), "epoch": result["epoch"], "rows": len(train.ids)}
    metrics |= figures or {}
    if shares:
        freeze(model)
        metrics["gate"] = _report_gate(stage, shares())
    stage.metrics(metrics)
    save_model(stage, stage.name, model, tokenizer, [init], metrics)


def _gate(
    stage: Stage, model: Any, base: Any, validation: Sequence[Demonstration], tokenizer: Any, compute: Any
) -> Callable[[], list[float]]:
    """The label-free gate for the model as it is when called."""
    from apprentice.sft import GateQuestions, gate
    from tasks.checkpoints import batch_of, prompt_keys

    held_out = validation[: stage.config.gate_prompts]
    batch = batch_of(tokenizer, held_out, compute)
    questions = GateQuestions(
        batch,
        prompt_keys(held_out),
        stage.config.gate_samples,
        2 * int(batch.response_lengths.max()),
        tokenizer.eos_token_id,
        f"{stage.params.seed}/gate",
    )
    return lambda: gate(model, base, questions, compute)


def _mean_of(shares: Callable[[], list[float]]) -> Callable[[], float]:
    return lambda: statistics.fmean(shares())


def _report_gate(stage: Stage, shares: Sequence[float]) -> dict[str, Any]:
    """Share of held-out demonstrations that beat the model's own samples in self-reward, with its interval."""
    from apprentice.sft import GATE_FLOOR
    from tasks.intervals import mean_interval

    found = {name: None if value is None else round(value, 6) for name, value in mean_interval(shares).items()}
    stage.say("label-free gate " + " ".join(f"{name} {value}" for name, value in found.items()))
    if found["mean"] < GATE_FLOOR:
        stage.warn(
            "the gate is below one half: this model's self-reward prefers its own samples to held-out demonstrations, so "
            "raising it cannot help. As a reward target take a gentler fine-tuning (fewer epochs, a lower learning rate)"
        )
    return found
