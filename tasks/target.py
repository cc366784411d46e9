"""Fine-tune the base to bare answers, the reasoning left out of the demonstrations: what a reasoning vector is added to."""

from dataclasses import replace

from tasks.stage import Stage, StageError, run


def main(stage: Stage) -> None:
    """Write data/models/target, its history and metrics."""
    from apprentice.verifiers import BARE
    from tasks.answers import verifier_name
    from tasks.checkpoints import table
    from tasks.fine_tuning import fine_tune_stage

    verifier = verifier_name(stage)
    if verifier is None:
        raise StageError("target: bare answers need a verifier that finds them; set ingest.verifier, or leave this method out")
    rows = [replace(row, response=BARE[verifier](row.answer)) for row in table(stage, "demonstrations") if row.answer]
    fine_tune_stage(stage, rows, init="base")


run(__name__, main, __doc__)
