"""Candidates from the SFT policy, scored by the self-reward, statistical rejection sampling, labelled pairs (RSO)."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/pairs/{candidates,pairs}.jsonl and the figures of the sampler."""
    from apprentice.demonstrations import prompt_id, write_jsonl
    from apprentice.policy import decode_responses
    from apprentice.rewards import sequence_rewards
    from apprentice.sampling import sample
    from tasks.candidates import by_prompt, check_rewards, tell_where_cut_off
    from tasks.checkpoints import compute_of, table, tokenizer_of
    from tasks.kept import keeping
    from tasks.needs import paired
    from tasks.pairing import choose_pairs, pick_prompts, requests_of, summary
    from tasks.roles import frozen_roles, preflight

    compute, config = keeping(stage, compute_of(stage)), stage.config
    tokenizer, needs = tokenizer_of(stage, "sft"), paired(config)
    preflight(stage, compute, *needs)
    models = frozen_roles(stage, needs.frozen, compute)
    rows = pick_prompts(table(stage, "prompts"), config.prompts, stage.params.seed)
    stage.say(f"sampling {config.candidates} candidates for each of {len(rows)} prompts")
    rollout = sample(
        models["sft"],
        requests_of(rows, tokenizer, config.candidates),
        seed=f"{stage.params.seed}/pairs",
        end=tokenizer.eos_token_id,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        compute=compute,
    )
    rewards = sequence_rewards(
        models[config.reward_target], models[config.reward_baseline], rollout.batch, compute, config.baseline_weight
    ).tolist()
    texts, ended = decode_responses(tokenizer, rollout.response_ids()), rollout.ended.tolist()
    asked = [row for row in rows for _ in range(config.candidates)]
    candidates = [
        {"prompt": row.prompt, "prompt_id": prompt_id(row.prompt), "response": text, "reward": round(reward, 6), "ended": done}
        for row, text, reward, done in zip(asked, texts, rewards, ended, strict=True)
    ]
    groups = by_prompt(candidates)
    tell_where_cut_off(stage.bad_sign, ended, "pairs.max_new_tokens")
    check_rewards(stage, groups)
    pairs, figures = choose_pairs(groups, config, stage.params.seed, stage.bad_sign)
    write_jsonl(stage.data / "pairs" / "candidates.jsonl", candidates)
    write_jsonl(stage.data / "pairs" / "pairs.jsonl", pairs)
    stage.metrics(figures)
    stage.say(summary(figures))


run(__name__, main, __doc__)
