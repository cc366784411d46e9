"""RAFT (2304.06767): fine-tune on the best candidate of each prompt by reward."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/raft, its history and metrics."""
    from tasks.filtered import filtered_stage

    filtered_stage(stage)


run(__name__, main, __doc__)
