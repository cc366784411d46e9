"""The judge's comparison: a scalar Bradley-Terry reward model on the SFT model's trunk, from the same pairs or their scores."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/bt_reward, its history and metrics."""
    from apprentice.reward_model import encode_pairs, new_reward_model, pair_scores, train_reward_model
    from tasks.checkpoints import compute_of, save_model, tokenizer_of
    from tasks.kept import keeping
    from tasks.ranking import ranked_pairs
    from tasks.resume import StageRecorder
    from tasks.roles import model_to_train, preflight

    compute, tokenizer, config = compute_of(stage), tokenizer_of(stage, "sft"), stage.config
    preflight(stage, compute, ["sft"], [], samples=True)
    pairs = ranked_pairs(stage, tokenizer, keeping(stage, compute))
    model = model_to_train(stage, "sft", compute, new_reward_model, heads=["score"])
    stage.say(f"{len(pairs)} pairs")
    chosen, rejected = encode_pairs(tokenizer, pairs)
    scores = pair_scores(pairs, config.prompt_offset).to(compute.device) if config.objective == "scores" else None
    trained = train_reward_model(
        model,
        chosen.to(compute.device),
        rejected.to(compute.device),
        config,
        seed=f"{stage.params.seed}/judge",
        compute=compute,
        recorder=StageRecorder(stage, "loss", "accuracy", "margin"),
        scores=scores,
    )
    metrics = {"pairs": len(pairs), **{name: round(value, 6) for name, value in trained.means.items()}}
    stage.metrics(metrics)
    save_model(stage, "bt_reward", model, tokenizer, ["sft"], metrics)


run(__name__, main, __doc__)
