"""A generative pairwise judge (Pairwise-RL, 2504.04950) on the SFT model: is the first of two answers the better one?"""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/judge, its history and metrics."""
    from collections import Counter

    from apprentice.judge import Judge, train_judge
    from tasks.checkpoints import compute_of, save_model, tokenizer_of
    from tasks.kept import keeping
    from tasks.ranking import ranked_pairs, room
    from tasks.resume import StageRecorder
    from tasks.roles import preflight, roles_of

    compute, tokenizer = compute_of(stage), tokenizer_of(stage, "sft")
    preflight(stage, compute, ["sft"], [], samples=True)
    pairs, (model, _) = ranked_pairs(stage, tokenizer, keeping(stage, compute)), roles_of(stage, "sft", [], compute)
    stage.say(f"{len(pairs)} pairs, each in both orders: {dict(Counter(pair.source for pair in pairs))}")
    judge = Judge(model, tokenizer, room(model), compute)
    recorder = StageRecorder(stage, "loss", "accuracy", "flip_rate")
    trained = train_judge(judge, pairs, stage.config, seed=f"{stage.params.seed}/judge", recorder=recorder)
    metrics = {"pairs": len(pairs), **{name: round(value, 6) for name, value in trained.means.items()}}
    stage.metrics(metrics)
    save_model(stage, "judge", model, tokenizer, ["sft"], metrics)


run(__name__, main, __doc__)
