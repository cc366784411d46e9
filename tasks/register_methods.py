"""MLflow mirrors the further methods as `register` does the main line; no alias but theirs moves, the champion's least of all.

Safe to repeat. By hand after `dvc pull`, or when the store is gone: python -m tasks.register_methods
"""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Bring MLflow up to date with methods/dvc.yaml, then write what is registered and the stamp."""
    from tasks.mirror import FURTHER, mirror

    mirror(stage, FURTHER)


run(__name__, main, __doc__)
