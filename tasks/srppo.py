"""Self-Rewarding PPO from the SFT model on the unlabelled pool: reward log pi_sft - log pi_base."""

from tasks.stage import Stage, StageError, run


def main(stage: Stage) -> None:
    """Write data/models/srppo, its history and metrics."""
    from apprentice.ppo import Prompts, SelfRewardingPPO
    from apprentice.tokens import encode_prompts, token_classes
    from tasks.checkpoints import compute_of, policy_of, prompt_keys, save_model, scorers_of, table, tokenizer_of
    from tasks.resume import StageRecorder

    compute, config = compute_of(stage), stage.config
    tokenizer, policy = tokenizer_of(stage, "sft"), policy_of(stage, "sft", compute)
    roles = ("sft", "base", config.reward_target, config.reward_baseline, config.kl_anchor, config.critic_init)
    pool = table(stage, "prompts")
    classes, names = token_classes(tokenizer, policy.config.vocab_size)
    prompts = Prompts(
        encode_prompts(tokenizer, [row.prompt for row in pool]),
        prompt_keys(pool),
        tokenizer.eos_token_id,
        classes,
        names,
    )
    stage.say(f"{len(pool)} prompts, {config.iterations} iterations of {config.batch_size} rollouts")
    trainer = SelfRewardingPPO(
        policy, scorers_of(stage, roles, compute), prompts, config, seed=stage.params.seed, compute=compute
    )
    result = trainer.train(StageRecorder(stage, "reward", "kl_to_anchor", "length", "eos_rate", "entropy"))
    if not result["iterations"]:
        raise StageError(
            f"srppo.kl_stop: the SFT model is {result['kl_to_anchor']:.3g} nats per response from the KL anchor "
            f"{config.kl_anchor!r} before the first step, above {config.kl_stop}; raise it, or take `sft` as the anchor"
        )
    stage.say(f"stopped by {result['stopped_by']} after {result['iterations']} iterations")
    metrics = {name: round(v, 6) if isinstance(v, float) else v for name, v in result.items()}
    stage.metrics(metrics)
    save_model(stage, "srppo", policy, tokenizer, list(dict.fromkeys(roles)), metrics)


run(__name__, main, __doc__)
