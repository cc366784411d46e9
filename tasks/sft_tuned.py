"""Fine-tune the base as a practitioner would ship it, epochs chosen by held-out loss: the row to beat."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/sft_tuned, its history and metrics, the label-free gate among them."""
    from tasks.checkpoints import table
    from tasks.fine_tuning import fine_tune_stage

    fine_tune_stage(stage, table(stage, "demonstrations"), init="base")


run(__name__, main, __doc__)
