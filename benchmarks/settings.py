"""Settings of PPO that its benchmarks share; imports nothing but the core."""

from typing import Any

from apprentice.sections import SRPPOConfig


def ppo_settings(batch: int, response: int, **own: Any) -> SRPPOConfig:
    """Self-Rewarding PPO on rollouts of `batch` responses of at most `response` tokens: one update, one step an epoch."""
    shared: dict[str, Any] = {
        "init": "sft",
        "kl_anchor": "sft",
        "missing_eos_reward": 0.0,
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "kl_stop": None,
        "iterations": 1,
        "batch_size": batch,
        "epochs": 2,
        "minibatch_size": batch,
        "temperature": 1.0,
        "max_new_tokens": response,
        "critic": "separate",
        "critic_init": "sft",
        "value_coef": 0.1,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "whiten": True,
        "reward_std_floor": 1e-6,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "old_logps": "auto",
        "learning_rate": 1e-4,
        "critic_learning_rate": 1e-4,
        "max_grad_norm": 1.0,
        "prompts": "pool",
        "reward_target": "sft",
        "reward_baseline": "base",
        "baseline_weight": 1.0,
        "placement": "eos",
        "span": "sum",
    }
    return SRPPOConfig(**{**shared, **own})
