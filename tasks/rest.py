"""ReST (2308.08998): fine-tune on the candidates whose normalised reward passes a threshold."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/rest, its history and metrics."""
    from tasks.filtered import filtered_stage

    filtered_stage(stage)


run(__name__, main, __doc__)
