"""MLflow mirrors the workspace: a run per stage, a model version per checkpoint, aliases by method, and a champion.

Safe to repeat. By hand after `dvc pull`, or when the store is gone: python -m tasks.register
"""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Bring MLflow up to date with the main line, then write what is registered and the stamp."""
    from tasks.mirror import MAIN, mirror

    mirror(stage, MAIN)


run(__name__, main, __doc__)
