"""Per-step negatives (2406.14532): find where the SFT model's wrong responses go wrong, and learn from that."""

from tasks.stage import Stage, StageError, run


def main(stage: Stage) -> None:
    """Write data/models/perstep, its history and metrics. Uses the verifier: not demonstrations-only."""
    from apprentice.tokens import collate, pad_id
    from tasks.checkpoints import compute_of, tokenizer_of
    from tasks.fine_tuning import fine_tune_on
    from tasks.kept import keeping
    from tasks.preferring import prefer
    from tasks.roles import preflight
    from tasks.stepping import as_weights, lessons

    compute, tokenizer = compute_of(stage), tokenizer_of(stage, "sft")
    preflight(stage, compute, ["sft"], ["sft"], samples=True)
    found, figures = lessons(stage, tokenizer, keeping(stage, compute))
    stage.say(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if not found.prompts:
        raise StageError(
            "perstep: nothing to learn from; the figures above say what was dropped. Raise perstep.prompts, perstep.negatives "
            "or perstep.completions, or check perstep.separator"
        )
    pad = pad_id(tokenizer)
    if stage.config.variant == "advantage_weighted":
        batch = collate(found.prompts, found.responses, pad).to(compute.device)
        config = as_weights(stage.config)
        fine_tune_on(
            stage, batch, tokenizer, compute, init="sft", config=config, weights=found.padded(compute.device), figures=figures
        )
    else:
        chosen, rejected = (collate(found.prompts, side, pad).to(compute.device) for side in (found.chosen, found.rejected))
        prefer(stage, chosen, rejected, compute, figures)


run(__name__, main, __doc__)
