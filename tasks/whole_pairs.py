"""Per-step's rung below: preference optimisation on whole responses, one right and one wrong of each prompt."""

import random

from tasks.stage import Stage, StageError, run


def main(stage: Stage) -> None:
    """Write data/models/whole_pairs, its history and metrics. Uses the verifier: not demonstrations-only."""
    from tasks.answers import check_of
    from tasks.candidates import prompt_groups
    from tasks.preferring import prefer_stage

    check, rows = check_of(stage), []
    for group in prompt_groups(stage, "pairs"):
        ended = [row for row in group if row["ended"]]
        right = [row["response"] for row in ended if check(row["prompt_id"], row["response"])]
        wrong = [row["response"] for row in ended if check(row["prompt_id"], row["response"]) is False]
        rng = random.Random(f"{stage.params.seed}/whole_pairs/{group[0]['prompt_id']}")
        rng.shuffle(right)
        rng.shuffle(wrong)
        chosen = list(zip(right, wrong, strict=False))[: stage.params.pairs.accepted // 2]
        rows += [{"prompt": group[0]["prompt"], "chosen": a, "rejected": b} for a, b in chosen]
    if not rows:
        raise StageError(
            "whole_pairs: no prompt has a right and a wrong finished candidate, so no pair is left; raise pairs.candidates, "
            "pairs.prompts or pairs.max_new_tokens"
        )
    prefer_stage(stage, rows)


run(__name__, main, __doc__)
