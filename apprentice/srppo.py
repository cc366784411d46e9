"""Self-Rewarding PPO (2510.21090): PPO whose reward is log pi_sft - log pi_base, from demonstrations alone.

Reward target, reward baseline and KL anchor are three separate roles, each any checkpoint.
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from apprentice.compute import Compute
from apprentice.ppo import PPO, Prompts, Rewarded
from apprentice.rewards import place, self_reward, split_by_class, token_rewards
from apprentice.sampling import Rollout
from apprentice.sections import SRPPOConfig


class SelfReward:
    """r(x, y) = log pi_target(y|x) - w log pi_baseline(y|x), placed on tokens as the config says, split by token class."""

    def __init__(self, config: SRPPOConfig, prompts: Prompts) -> None:
        self.config, self.classes, self.names = config, prompts.classes, prompts.class_names

    def __call__(self, rollout: Rollout, logps: Mapping[str, Tensor]) -> Rewarded:
        """Reward of each response from the log-probabilities of its tokens."""
        config, mask = self.config, rollout.batch.mask
        parts = token_rewards(logps[config.reward_target], logps[config.reward_baseline], mask, config.baseline_weight)
        shares = split_by_class(parts, mask, self.classes.to(mask.device)[rollout.batch.responses], len(self.names))
        return Rewarded(
            place(parts, mask, rollout.ended, config.placement, config.span, config.missing_eos_reward),
            self_reward(parts, mask, config.span),
            {f"reward_{name}": share for name, share in zip(self.names, shares, strict=True)},
        )


class SelfRewardingPPO(PPO):
    """PPO with the self-reward; `scorers` must hold the reward target and baseline too."""

    def __init__(
        self,
        policy: PreTrainedModel,
        scorers: Mapping[str, PreTrainedModel],
        prompts: Prompts,
        config: SRPPOConfig,
        *,
        seed: str,
        compute: Compute,
    ) -> None:
        super().__init__(policy, scorers, prompts, SelfReward(config, prompts), config, seed=seed, compute=compute)
