"""What every stage shares that optimises preferences from the SFT model: they differ in their pairs."""

from collections.abc import Sequence
from typing import Any

from tasks.stage import Stage


def prefer_stage(stage: Stage, rows: Sequence[dict[str, Any]], figures: dict[str, Any] | None = None) -> None:
    """Optimise the SFT model on rows of prompt, chosen and rejected; write model, history and metrics (`figures` included)."""
    from apprentice.demonstrations import demonstration
    from tasks.checkpoints import batch_of, compute_of, tokenizer_of

    compute, tokenizer = compute_of(stage), tokenizer_of(stage, "sft")
    chosen, rejected = (
        batch_of(tokenizer, [demonstration(row["prompt"], row[side], "pairs") for row in rows], compute)
        for side in ("chosen", "rejected")
    )
    prefer(stage, chosen, rejected, compute, figures)


def prefer(stage: Stage, chosen: Any, rejected: Any, compute: Any, figures: dict[str, Any] | None = None) -> None:
    """The same on two batches, row by row of one prompt."""
    from apprentice.preference import optimise_preferences, with_reference
    from tasks.checkpoints import save_model, tokenizer_of
    from tasks.needs import PREFERRED
    from tasks.resume import StageRecorder
    from tasks.roles import preflight, roles_of

    preflight(stage, compute, *PREFERRED)
    policy, scorers = roles_of(stage, "sft", PREFERRED.frozen, compute)
    stage.say(f"{len(chosen.ids)} pairs, loss {stage.config.loss}, {stage.config.epochs} epochs")
    result = optimise_preferences(
        policy,
        with_reference(scorers["sft"], chosen, rejected, compute),
        stage.config,
        seed=f"{stage.params.seed}/rso",
        compute=compute,
        recorder=StageRecorder(stage, "loss", "accuracy", "margin"),
    )
    found = {name: round(value, 6) for name, value in result.items()}
    metrics = {"pairs": len(chosen.ids), **(figures or {}), **found}
    stage.metrics(metrics)
    save_model(stage, stage.name, policy, tokenizer_of(stage, "sft"), ["sft"], metrics)
