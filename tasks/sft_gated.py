"""Fine-tune the base as far as the label-free gate holds: the strongest model whose self-reward can be trusted."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/sft_gated, its history and metrics, the label-free gate among them."""
    from tasks.checkpoints import table
    from tasks.fine_tuning import fine_tune_stage

    fine_tune_stage(stage, table(stage, "demonstrations"), init="base")


run(__name__, main, __doc__)
