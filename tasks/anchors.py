"""The anchor of each prompt, which a response must beat: its demonstration, or a draw of the SFT model where there is none."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.ppo_training import Setting
from tasks.stage import Stage

if TYPE_CHECKING:
    from apprentice.demonstrations import Demonstration
    from apprentice.ppo import Reward

Logits = Callable[[Sequence[tuple[Any, str, str]]], Any]  # (prompt, response, anchor) -> [N] logits of the response winning


def anchored_pool(stage: Stage) -> "list[Demonstration]":
    """Prompts to run PPO on: those demonstrated, and with `anchors: samples` the unlabelled pool too; each prompt once."""
    from apprentice.demonstrations import prompt_id
    from tasks.checkpoints import table

    rows = table(stage, "demonstrations")
    if stage.config.anchors == "samples":
        rows += table(stage, "prompts")
    return list({prompt_id(row.prompt): row for row in reversed(rows)}.values())[::-1]


def anchored_reward(stage: Stage, setting: Setting, logits: Logits) -> "Reward":
    """Pays a response what beating the prompt's anchor is worth; figures: anchor_win_rate, and the share of rewards near 1."""
    from apprentice.calibration import saturated_share
    from apprentice.judge import pairwise_reward
    from apprentice.policy import decode_responses
    from apprentice.ppo import TerminalReward

    def rate(rollout: Any) -> Any:
        texts = decode_responses(setting.tokenizer, rollout.response_ids())
        anchors = anchors_of(stage, setting, rollout.keys)
        prompts = [setting.rows[key].prompt for key in rollout.keys]
        won = logits(list(zip(prompts, texts, anchors, strict=True))).float()
        chance = won.sigmoid()
        figures = {"anchor_win_rate": float(chance.mean()), "saturated": saturated_share(chance)}
        return pairwise_reward(won, stage.config.reward_form), figures

    return TerminalReward(rate, stage.config.missing_eos_reward)


def anchors_of(stage: Stage, setting: Setting, keys: Sequence[str]) -> list[str]:
    """The anchor of each prompt: a draw is keyed by the prompt, so it is the same whenever the prompt comes up."""
    from apprentice.policy import decode_responses
    from apprentice.sampling import Request, sample

    prompts = dict(zip(setting.prompts.keys, setting.prompts.ids, strict=True))
    found = {key: response for key in keys if (response := setting.rows[key].response) is not None}
    lacking = [key for key in dict.fromkeys(keys) if key not in found]
    if lacking:
        drawn = sample(
            setting.scorers["sft"],
            [Request(prompts[key], key) for key in lacking],
            seed=f"{stage.params.seed}/anchors",
            end=setting.prompts.end,
            max_new_tokens=stage.config.max_new_tokens,
            compute=setting.compute,
        )
        found |= dict(zip(lacking, decode_responses(setting.tokenizer, drawn.response_ids()), strict=True))
    return [found[key] for key in keys]
