"""Fine-tune on the share of each prompt's candidates with the highest reward."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/self_rft, its history and metrics."""
    from tasks.filtered import filtered_stage

    filtered_stage(stage)


run(__name__, main, __doc__)
