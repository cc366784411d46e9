"""Rejection-sampling fine-tuning for longer: what more epochs on the same positives are worth."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/rft_long, its history and metrics. Uses the verifier: not demonstrations-only."""
    from tasks.answers import check_of
    from tasks.filtered import filtered_stage

    filtered_stage(stage, check_of(stage))


run(__name__, main, __doc__)
