"""RSO with the reward of `rescore` (judge, Bradley-Terry model or verifier) in place of the self-reward."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/rso_rescored, its history and metrics."""
    from tasks.candidates import prompt_groups
    from tasks.pairing import choose_pairs, summary
    from tasks.preferring import prefer_stage

    rows, figures = choose_pairs(prompt_groups(stage, "rescored"), stage.params.pairs, stage.params.seed, stage.bad_sign)
    stage.say(summary(figures))
    prefer_stage(stage, rows, figures)


run(__name__, main, __doc__)
