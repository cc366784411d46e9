"""Self-Rewarding PPO from the SFT model on the unlabelled pool: reward log pi_sft - log pi_base."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/srppo, its history and metrics."""
    from tasks.ppo_training import self_rewarding_stage

    self_rewarding_stage(stage)


run(__name__, main, __doc__)
