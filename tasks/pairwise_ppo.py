"""Pairwise PPO (2504.04950): PPO on the judge's probability that a response beats the prompt's anchor."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/pairwise_ppo, its history and metrics."""
    from apprentice.judge import win_logits
    from tasks.anchors import anchored_pool, anchored_reward
    from tasks.ppo_training import ppo_stage
    from tasks.ranking import judge_of

    def reward(setting):  # type: ignore[no-untyped-def]
        judge = judge_of(stage, setting.compute)
        return anchored_reward(stage, setting, lambda triples: win_logits(judge, triples))

    ppo_stage(stage, reward, pool=anchored_pool(stage), loaded=["judge"])


run(__name__, main, __doc__)
