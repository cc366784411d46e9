"""The comparison of pairwise PPO: the same PPO on the Bradley-Terry model's probability of beating the anchor."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/bt_ppo, its history and metrics."""
    from apprentice.judge import PreferencePair
    from apprentice.reward_model import bt_win_logits, encode_pairs
    from tasks.anchors import anchored_pool, anchored_reward
    from tasks.ppo_training import ppo_stage
    from tasks.ranking import reward_model_of

    def reward(setting):  # type: ignore[no-untyped-def]
        model = reward_model_of(stage, setting.compute)

        def logits(triples):  # type: ignore[no-untyped-def]
            pairs = [PreferencePair(prompt, response, anchor, "rollout") for prompt, response, anchor in triples]
            responses, anchors = encode_pairs(setting.tokenizer, pairs)
            return bt_win_logits(
                model, responses.to(setting.compute.device), anchors.to(setting.compute.device), setting.compute
            )

        return anchored_reward(stage, setting, logits)

    ppo_stage(stage, reward, pool=anchored_pool(stage), loaded=["bt_reward"])


run(__name__, main, __doc__)
