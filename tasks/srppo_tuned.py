"""Self-Rewarding PPO from the tuned model, on the reward of the gentle one, which ranks better."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/srppo_tuned, its history and metrics."""
    from apprentice.srppo import SelfReward
    from tasks.ppo_training import ppo_stage

    config = stage.config
    ppo_stage(
        stage,
        lambda setting: SelfReward(config, setting.prompts),
        roles=(config.reward_target, config.reward_baseline),
    )


run(__name__, main, __doc__)
