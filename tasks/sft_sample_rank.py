"""RSO's `sft-sample-rank` (2309.06657): pairs of any candidates of the SFT model, labelled by their reward."""

from dataclasses import replace

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/sft_sample_rank, its history and metrics."""
    from tasks.candidates import prompt_groups
    from tasks.pairing import choose_pairs, summary
    from tasks.preferring import prefer_stage

    config = replace(stage.params.pairs, source="sft_sample_rank")
    rows, figures = choose_pairs(prompt_groups(stage, stage.config.candidates), config, stage.params.seed, stage.bad_sign)
    stage.say(summary(figures))
    prefer_stage(stage, rows, figures)


run(__name__, main, __doc__)
