"""Another reward for the candidates of `pairs`: the judge (against a first draw), the Bradley-Terry model or the verifier."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/rescored/candidates.jsonl with the reward replaced, and the figures of the new reward."""
    from statistics import fmean

    from apprentice.demonstrations import write_jsonl
    from tasks.candidates import by_prompt, check_rewards, prompt_groups
    from tasks.checkpoints import compute_of
    from tasks.kept import keeping

    groups = prompt_groups(stage, "pairs")
    rewards = _REWARDS[stage.config.reward](stage, groups, keeping(stage, compute_of(stage)))
    rows = [row for group in groups for row in group]
    rescored = [{**row, "reward": round(reward, 6)} for row, reward in zip(rows, rewards, strict=True)]
    check_rewards(stage, by_prompt(rescored))
    write_jsonl(stage.data / "rescored" / "candidates.jsonl", rescored)
    stage.metrics({"candidates": len(rows), "reward": round(fmean(rewards), 6)})
    stage.say(f"{len(rows)} candidates, mean reward by {stage.config.reward} {fmean(rewards):.3f}")


def _by_judge(stage: Stage, groups, compute) -> list[float]:  # type: ignore[no-untyped-def]
    """Logit of beating the prompt's first candidate, a draw of the SFT model, whose own reward is 0 (RSO, 3.2)."""
    from apprentice.judge import win_logits
    from tasks.ranking import judge_of
    from tasks.room import preflight

    preflight(stage, compute, [], ["judge"], samples=False)
    triples = [(row["prompt"], row["response"], group[0]["response"]) for group in groups for row in group]
    return win_logits(judge_of(stage, compute), triples).tolist()


def _by_reward_model(stage: Stage, groups, compute) -> list[float]:  # type: ignore[no-untyped-def]
    from apprentice.demonstrations import demonstration
    from tasks.ranking import reward_model_of, rewards_of
    from tasks.room import preflight

    preflight(stage, compute, [], ["bt_reward"], samples=False)
    rows = [demonstration(row["prompt"], row["response"], "candidates") for group in groups for row in group]
    return rewards_of(stage, reward_model_of(stage, compute), rows, compute).tolist()


def _by_verifier(stage: Stage, groups, compute) -> list[float]:  # type: ignore[no-untyped-def]
    from tasks.answers import check_of

    check = check_of(stage)
    return [float(bool(check(row["prompt_id"], row["response"]))) for group in groups for row in group]


_REWARDS = {"judge": _by_judge, "bt_reward": _by_reward_model, "verifier": _by_verifier}

run(__name__, main, __doc__)
