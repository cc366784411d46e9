"""PPO on the verifier from the base: with `sft` the parallel donors of the reasoning vector."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/donor_ppo, its history and metrics. Uses the verifier: not demonstrations-only."""
    from tasks.answers import check_of
    from tasks.ppo_training import ppo_stage, verifier_reward, with_answers

    check = check_of(stage)
    ppo_stage(stage, lambda setting: verifier_reward(stage, setting, check), pool=with_answers(stage, check))


run(__name__, main, __doc__)
