"""Control: fine-tune the SFT model on, on the same demonstrations, for as many gradient tokens as `srppo` took."""

from dataclasses import asdict

from tasks.history import rows_of
from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/continued_sft, its history and metrics; the epochs follow from srppo's history."""
    from apprentice.sections import FineTuningConfig
    from apprentice.tokens import encode_responses
    from tasks.checkpoints import table, tokenizer_of
    from tasks.fine_tuning import fine_tune_stage

    rows = table(stage, "demonstrations")
    own = sum(map(len, encode_responses(tokenizer_of(stage, "sft"), [row.response or "" for row in rows])))
    srppo = stage.params.srppo
    spent = sum(float(row["length"] or 0) for row in rows_of(stage.data / "reports" / "srppo" / "history.csv"))
    epochs = max(1, round(spent * srppo.batch_size * srppo.epochs / own))
    stage.say(f"srppo took gradients of {spent * srppo.batch_size * srppo.epochs:.0f} tokens: {epochs} epochs of {own}")
    config = FineTuningConfig(epochs=epochs, select="last", **asdict(stage.config))
    fine_tune_stage(stage, rows, init="sft", config=config)


run(__name__, main, __doc__)
