"""What `sft` and `sft_tuned` share: they differ in their settings only."""

from tasks.stage import Stage


def fine_tune_stage(stage: Stage) -> None:
    """Fine-tune the base on the demonstrations, run the label-free gate, write model, history and metrics."""
    from apprentice.policy import freeze
    from apprentice.sft import fine_tune
    from tasks.checkpoints import batch_of, compute_of, policy_of, save_model, table, tokenizer_of
    from tasks.resume import StageRecorder

    compute = compute_of(stage)
    tokenizer, model = tokenizer_of(stage, "tokenizer"), policy_of(stage, "base", compute)
    train = batch_of(tokenizer, table(stage, "demonstrations"), compute)
    held_out = table(stage, "validation")
    stage.say(f"{len(train.ids)} demonstrations, {len(held_out)} held out, {stage.config.epochs} epochs")
    result = fine_tune(
        model,
        train,
        batch_of(tokenizer, held_out, compute),
        stage.config,
        seed=stage.params.seed,
        compute=compute,
        recorder=StageRecorder(stage, "loss", "held_out_loss"),
    )
    stage.say(f"kept epoch {result['epoch']}, held-out loss {result['held_out_loss']:.4f}")
    metrics = {"held_out_loss": round(result["held_out_loss"], 6), "epoch": result["epoch"]}
    if stage.config.gate_prompts:
        metrics["gate"] = run_gate(stage, freeze(model), held_out[: stage.config.gate_prompts], tokenizer, compute)
    stage.metrics(metrics)
    save_model(stage, stage.name, model, tokenizer, ["base"], metrics)


def run_gate(stage: Stage, model, held_out, tokenizer, compute) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Share of held-out demonstrations that beat the model's own samples in self-reward, with its interval."""
    from apprentice.sft import gate
    from tasks.checkpoints import batch_of, prompt_keys, scorers_of
    from tasks.intervals import mean_interval

    batch = batch_of(tokenizer, held_out, compute)
    shares = gate(
        model,
        scorers_of(stage, ["base"], compute)["base"],
        batch,
        prompt_keys(held_out),
        samples=stage.config.gate_samples,
        seed=stage.params.seed,
        end=tokenizer.eos_token_id,
        max_new_tokens=2 * int(batch.response_lengths.max()),
        compute=compute,
    )
    found = {name: None if value is None else round(value, 6) for name, value in mean_interval(shares).items()}
    stage.say("label-free gate " + " ".join(f"{name} {value}" for name, value in found.items()))
    if found["mean"] < 0.5:
        stage.warn(
            "the gate is below one half: this model's self-reward prefers its own samples to held-out demonstrations, so "
            "raising it cannot help. As a reward target take a gentler fine-tuning (fewer epochs, a lower learning rate)"
        )
    return found
