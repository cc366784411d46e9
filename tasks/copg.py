"""Contrastive policy gradient (2406.19185) from the SFT model on scored candidates, off-policy, any sequence reward."""

from tasks.stage import Stage, StageError, run


def main(stage: Stage) -> None:
    """Write data/models/copg, its history and metrics."""
    from apprentice.copg import optimise_contrast, with_rewards
    from apprentice.demonstrations import demonstration
    from tasks.candidates import prompt_groups
    from tasks.checkpoints import batch_of, compute_of, save_model, tokenizer_of
    from tasks.resume import StageRecorder
    from tasks.roles import preflight, roles_of

    compute, config = compute_of(stage), stage.config
    preflight(stage, compute, ["sft"], ["sft"], samples=False)
    tokenizer, (policy, scorers) = tokenizer_of(stage, "sft"), roles_of(stage, "sft", ["sft"], compute)
    size = config.group
    rows = []
    for group in prompt_groups(stage, config.candidates):
        ended = [row for row in group if row["ended"]]
        rows += ended[: len(ended) - len(ended) % size]
    if not rows:
        raise StageError(f"copg: no prompt has {size} finished candidates; lower copg.group or raise pairs.max_new_tokens")
    batch = batch_of(tokenizer, [demonstration(row["prompt"], row["response"], "candidates") for row in rows], compute)
    rewards = batch.mask.new_tensor([row["reward"] for row in rows]).view(-1, size)
    stage.say(f"{len(rewards)} groups of {size} candidates, beta {config.beta}, {config.epochs} epochs")
    result = optimise_contrast(
        policy,
        with_rewards(scorers["sft"], batch, rewards, compute),
        config,
        seed=f"{stage.params.seed}/copg",
        compute=compute,
        recorder=StageRecorder(stage, "loss"),
    )
    metrics = {"groups": len(rewards), **{name: round(value, 6) for name, value in result.items()}}
    stage.metrics(metrics)
    save_model(stage, "copg", policy, tokenizer, ["sft"], metrics)


run(__name__, main, __doc__)
