"""Preference optimisation of the SFT model on the pairs, with a named loss."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/rso, its history and metrics."""
    from apprentice.demonstrations import demonstration, read_jsonl
    from apprentice.policy import freeze
    from apprentice.preference import optimise_preferences, with_reference
    from tasks.checkpoints import batch_of, compute_of, policy_of, save_model, tokenizer_of
    from tasks.resume import StageRecorder

    compute = compute_of(stage)
    tokenizer, policy = tokenizer_of(stage, "sft"), policy_of(stage, "sft", compute)
    rows = read_jsonl(stage.data / "pairs" / "pairs.jsonl")
    chosen, rejected = (
        batch_of(tokenizer, [demonstration(row["prompt"], row[side], "pairs") for row in rows], compute)
        for side in ("chosen", "rejected")
    )
    stage.say(f"{len(rows)} pairs, loss {stage.config.loss}, {stage.config.epochs} epochs")
    result = optimise_preferences(
        policy,
        with_reference(freeze(policy_of(stage, "sft", compute)), chosen, rejected, compute),
        stage.config,
        seed=stage.params.seed,
        compute=compute,
        recorder=StageRecorder(stage, "loss", "accuracy", "margin"),
    )
    metrics = {"pairs": len(rows), **{name: round(value, 6) for name, value in result.items()}}
    stage.metrics(metrics)
    save_model(stage, "rso", policy, tokenizer, ["sft"], metrics)


run(__name__, main, __doc__)
