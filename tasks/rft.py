"""Rejection-sampling fine-tuning (2308.01825): fine-tune on the candidates the verifier accepts."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/rft, its history and metrics. Uses the verifier: not demonstrations-only."""
    from tasks.answers import check_of
    from tasks.filtered import filtered_stage

    filtered_stage(stage, check_of(stage))


run(__name__, main, __doc__)
