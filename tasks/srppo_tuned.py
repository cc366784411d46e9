"""Self-Rewarding PPO from the tuned model, on the reward of the gentle one, which ranks better."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/srppo_tuned, its history and metrics."""
    from tasks.ppo_training import self_rewarding_stage

    self_rewarding_stage(stage)


run(__name__, main, __doc__)
