"""Measure one model on the held-out sets: accuracies, self-reward, KLs, lengths, a row of figures per prompt."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write prompts.csv, samples.jsonl and metrics.json under data/reports/evaluate/<model>/."""
    from apprentice.demonstrations import write_jsonl
    from tasks.checkpoints import compute_of, scorers_of, table, tokenizer_of
    from tasks.measuring import headline, held_out_rows, measure, write_rows

    compute = compute_of(stage)
    assert stage.item is not None
    models = scorers_of(stage, (stage.item, "sft", "base"), compute)
    models = {"model": models[stage.item], "sft": models["sft"], "base": models["base"]}
    tokenizer = tokenizer_of(stage, "sft")
    evaluation = table(stage, "evaluation")
    stage.say(f"{len(evaluation)} held-out prompts, greedy and {stage.config.samples} samples each")
    rows, samples = measure(models, tokenizer, evaluation, stage, compute)
    rows += held_out_rows(models["model"], tokenizer, table(stage, "validation"), compute)
    write_rows(stage.reports / "prompts.csv", rows)
    write_jsonl(stage.reports / "samples.jsonl", samples)
    means = headline(rows)
    stage.metrics(means)
    stage.say(", ".join(f"{name} {value:.3f}" for name, value in means.items()))


run(__name__, main, __doc__, lambda params: params.evaluate.models)
