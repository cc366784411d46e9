"""Preference optimisation of the SFT model on the pairs, with a named loss."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/rso, its history and metrics."""
    from apprentice.demonstrations import read_jsonl
    from tasks.preferring import prefer_stage

    prefer_stage(stage, read_jsonl(stage.data / "pairs" / "pairs.jsonl"))


run(__name__, main, __doc__)
