"""Self-Rewarding PPO from the SFT model on the unlabelled pool: reward log pi_sft - log pi_base."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/srppo, its history and metrics."""
    from apprentice.srppo import SelfReward
    from tasks.ppo_training import ppo_stage

    config = stage.config
    ppo_stage(
        stage,
        lambda setting: SelfReward(config, setting.prompts),
        roles=(config.reward_target, config.reward_baseline),
    )


run(__name__, main, __doc__)
