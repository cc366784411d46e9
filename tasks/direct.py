"""RSO's baseline `direct` (2309.06657): preference optimisation on labelled pairs of another policy, as they come."""

from tasks.stage import Stage, StageError, run


def main(stage: Stage) -> None:
    """Write data/models/direct, its history and metrics. Uses preference labels: not demonstrations-only."""
    from apprentice.demonstrations import read_jsonl
    from tasks.preferring import prefer_stage

    rows = read_jsonl(stage.data / "clean" / "preferences.jsonl")
    if not rows:
        raise StageError(
            "direct: data/clean/preferences.jsonl is empty: this source has no preference pairs; leave `direct` out"
        )
    prefer_stage(stage, rows)


run(__name__, main, __doc__)
