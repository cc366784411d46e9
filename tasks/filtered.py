"""What the stages share that fine-tune on a selection of the candidates."""

from tasks.answers import Check
from tasks.stage import Stage, StageError

_ADVICE = {
    "top_share": "raise {name}.level",
    "best": "raise pairs.max_new_tokens, so that candidates come to their end",
    "threshold": "lower {name}.level or raise pairs.candidates: equal rewards are never above it",
    "verified": "raise pairs.candidates or pairs.prompts, so that some are right",
}


def filtered_stage(stage: Stage, check: Check | None = None) -> None:
    """Select candidates as the section says, fine-tune `init` on them; write model, history and metrics.

    `check` tells right responses from wrong ones, for the rule `verified`.
    """
    from apprentice.demonstrations import demonstration
    from apprentice.selection import above, best, top_share
    from tasks.candidates import prompt_groups, scores
    from tasks.fine_tuning import fine_tune_stage

    config, rows = stage.config, []
    if (config.keep == "verified") != (check is not None):
        raise StageError(
            f"{stage.name}.keep: {config.keep!r} does not belong to this stage; `verified` is for rft and rft_long"
        )
    for group in prompt_groups(stage, config.candidates):
        rewards = scores(group)
        if check:
            kept = [i for i, row in enumerate(group) if row["ended"] and check(row["prompt_id"], row["response"])]
        elif config.keep == "best":
            kept = best(rewards)
        elif config.keep == "threshold":
            kept = above(rewards, config.level)
        else:
            kept = top_share(rewards, config.level)
        rows += [demonstration(group[i]["prompt"], group[i]["response"], stage.name) for i in kept]
    if not rows:
        advice = _ADVICE[config.keep].format(name=stage.name)
        raise StageError(f"{stage.name}: no candidate was kept ({config.keep}, level {config.level}); {advice}")
    fine_tune_stage(stage, rows, init=config.init)
