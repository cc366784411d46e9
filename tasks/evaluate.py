"""Measure one model on the held-out sets: accuracies, self-reward, KLs, lengths, a row of figures per prompt."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write prompts.csv, samples.jsonl and metrics.json under data/reports/evaluate/<model>/."""
    from tasks.evaluating import evaluate_stage

    evaluate_stage(stage)


run(__name__, main, __doc__, lambda params: params.evaluate.models)
