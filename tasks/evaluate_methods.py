"""Measure one model of the further methods as `evaluate` measures those of the main line: same prompts, same draws."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write prompts.csv, samples.jsonl and metrics.json under data/reports/evaluate_methods/<model>/."""
    from tasks.evaluating import evaluate_stage

    evaluate_stage(stage)


run(__name__, main, __doc__, lambda params: params.evaluate_methods.models)
