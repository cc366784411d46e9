"""What every PPO stage shares: they differ in their reward and their settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.answers import Check
from tasks.stage import Stage, StageError

if TYPE_CHECKING:
    from apprentice.demonstrations import Demonstration
    from apprentice.ppo import Prompts, Reward


@dataclass(frozen=True)
class Setting:
    """What a reward may need of the run: the pool, its rows by prompt id, tokenizer, compute, the frozen models by name."""

    prompts: "Prompts"
    rows: "dict[str, Demonstration]"
    tokenizer: Any
    compute: Any
    scorers: dict[str, Any]


def ppo_stage(
    stage: Stage,
    reward: "Callable[[Setting], Reward]",
    pool: "Sequence[Demonstration] | None" = None,
    roles: Sequence[str] = (),
    loaded: Sequence[str] = (),
) -> None:
    """Train the `init` model by PPO on a pool of prompts (the unlabelled one unless given); write model, history, metrics.

    `reward` makes the reward for this setting; `roles` are models it needs besides anchor and critic, `loaded` those it loads
    itself.
    """
    from apprentice.ppo import PPO, Prompts
    from apprentice.tokens import encode_prompts, token_classes
    from tasks.checkpoints import compute_of, prompt_keys, save_model, table, tokenizer_of
    from tasks.needs import by_ppo
    from tasks.resume import StageRecorder
    from tasks.roles import preflight, roles_of

    compute, config = compute_of(stage), stage.config
    needs = by_ppo(config, roles)
    preflight(stage, compute, *needs, whole=loaded)
    tokenizer, (policy, scorers) = tokenizer_of(stage, config.init), roles_of(stage, config.init, needs.frozen, compute)
    pool = table(stage, "prompts") if pool is None else pool
    classes, class_names = token_classes(tokenizer, policy.config.vocab_size)
    ids, keys = encode_prompts(tokenizer, [row.prompt for row in pool]), prompt_keys(pool)
    prompts = Prompts(ids, keys, tokenizer.eos_token_id, classes, class_names)
    stage.say(f"{len(pool)} prompts, {config.iterations} iterations of {config.batch_size} rollouts, from {config.init}")
    trainer = PPO(
        policy,
        scorers,
        prompts,
        reward(Setting(prompts, dict(zip(keys, pool, strict=True)), tokenizer, compute, scorers)),
        config,
        seed=f"{stage.params.seed}/{stage.name}",
        compute=compute,
    )
    result = trainer.train(StageRecorder(stage, "reward", "kl_to_anchor", "length", "eos_rate", "entropy"))
    if not result["iterations"]:
        raise StageError(
            f"{stage.name}.kl_stop: {config.init!r} is {result['kl_to_anchor']:.3g} nats per response from the KL anchor "
            f"{config.kl_anchor!r} before the first step, above {config.kl_stop}; raise it or change the anchor"
        )
    stage.say(f"stopped by {result['stopped_by']} after {result['iterations']} iterations")
    metrics = {name: round(v, 6) if isinstance(v, float) else v for name, v in result.items()}
    stage.metrics(metrics)
    parents = list(dict.fromkeys([*needs.trained, *roles, config.kl_anchor]))
    save_model(stage, stage.name, policy, tokenizer, parents, metrics)


def self_rewarding_stage(stage: Stage) -> None:
    """PPO on the self-reward of the section's target and baseline."""
    from apprentice.srppo import SelfReward

    config = stage.config
    ppo_stage(
        stage,
        lambda setting: SelfReward(config, setting.prompts),
        pool=prompts_of(stage),
        roles=(config.reward_target, config.reward_baseline),
    )


def prompts_of(stage: Stage) -> "list[Demonstration]":
    """The rows whose prompts the section names, each prompt once where they are demonstrations."""
    from tasks.checkpoints import prompt_keys, table

    pool = table(stage, "prompts")
    if stage.config.prompts == "pool":
        return pool
    demonstrations = table(stage, "demonstrations")
    demonstrated = dict(zip(prompt_keys(demonstrations), demonstrations, strict=True))
    if stage.config.prompts == "demonstrated":
        return list(demonstrated.values())
    new = [row for row, key in zip(pool, prompt_keys(pool), strict=True) if key not in demonstrated]
    if not new:
        raise StageError(
            f"{stage.name}.prompts: expected prompts that are not demonstrated, and all {len(pool)} of the pool are; set it to "
            "pool, or add rows without a response to the source"
        )
    return new


def with_answers(stage: Stage, check: Check) -> "list[Demonstration]":
    """The prompts of the pool that the verifier has an answer to."""
    from tasks.checkpoints import prompt_keys, table

    pool = table(stage, "prompts")
    answered = [row for row, key in zip(pool, prompt_keys(pool), strict=True) if check(key, "") is not None]
    if not answered:
        raise StageError(f"{stage.name}: the verifier has no answer to any prompt of the pool; give rows an answer")
    return answered


def verifier_reward(stage: Stage, setting: Setting, check: Check) -> "Reward":
    """1 for a right response, 0 for a wrong one."""
    from apprentice.policy import decode_responses
    from apprentice.ppo import TerminalReward

    def rate(rollout: Any) -> Any:
        texts = decode_responses(setting.tokenizer, rollout.response_ids())
        right = [float(bool(check(key, text))) for key, text in zip(rollout.keys, texts, strict=True)]
        return rollout.logps.new_tensor(right), {}

    return TerminalReward(rate, stage.config.missing_eos_reward)
