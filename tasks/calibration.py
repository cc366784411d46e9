"""Judge and Bradley-Terry reward against the verifier on the held-out prompts: accuracy on pairs, calibration, flips, gaps."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/reports/calibration/pairs.csv, one row a pair, and metrics.json."""
    from tasks.calibrating import anchor_summary, anchored, judged_pairs, logits_of, rankers_of, reward_gap, samples_of, summary
    from tasks.checkpoints import compute_of
    from tasks.kept import keeping
    from tasks.measuring import write_rows
    from tasks.ranking import reward_model_of
    from tasks.room import preflight

    compute = keeping(stage, compute_of(stage))
    preflight(stage, compute, [], ["sft", "judge", "bt_reward"], samples=True)
    drawn = samples_of(stage, compute)
    pairs, beside = judged_pairs(drawn), anchored(drawn)
    stage.say(f"{len(pairs)} pairs of a right and a wrong sample of one prompt, {len(beside)} of a sample and an anchor")
    reward_model = reward_model_of(stage, compute)
    rankers = rankers_of(stage, reward_model, compute)
    rows = logits_of(stage, pairs, rankers)
    write_rows(stage.reports / "pairs.csv", rows)
    metrics = summary(rows, stage.config.bins) | anchor_summary(stage, beside, rankers)
    metrics |= reward_gap(stage, drawn, reward_model, compute)
    stage.metrics(metrics)
    stage.say(", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))


run(__name__, main, __doc__)
