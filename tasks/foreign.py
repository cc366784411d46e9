"""A donor of another initialisation: a base trained shortly from another seed, then tuned on the demonstrations."""

from dataclasses import replace

from tasks.stage import Stage, run

OTHER = 1_000_003  # added to the seed: another initialisation, another stream of documents


def main(stage: Stage) -> None:
    """Write data/models/foreign_base and data/models/foreign, the history of the base, and metrics."""
    from apprentice.pretrain import build_base, pretrain
    from apprentice.sft import HeldOut, fine_tune
    from tasks.checkpoints import batch_of, compute_of, save_model, table, tokenizer_of
    from tasks.corpus import documents
    from tasks.resume import StageRecorder
    from tasks.roles import adapted
    from tasks.room import check_room

    compute, tokenizer, seed = compute_of(stage), tokenizer_of(stage, "tokenizer"), stage.params.seed + OTHER
    config = replace(stage.params.pretrain, steps=stage.config.steps)
    model = build_base(config, tokenizer, seed)
    check_room(stage, compute, [model.config], [], samples=False)
    stage.say(f"training another base for {config.steps} steps")
    recorder = StageRecorder(stage, "loss", "tokens")
    pretrain(model, tokenizer, documents(stage), config, seed=seed, compute=compute, recorder=recorder)
    losses = [row["loss"] for row in recorder.rows if row["loss"] is not None]
    metrics = {"base_loss": round(losses[-1], 6)}
    save_model(stage, "foreign_base", model, tokenizer, [], metrics)
    model = adapted(stage, model, "foreign_base")
    train, held_out = (batch_of(tokenizer, table(stage, name), compute) for name in ("demonstrations", "validation"))
    tuning = StageRecorder(stage, "loss", "held_out_loss", part="tuning")
    result = fine_tune(model, train, HeldOut(held_out), stage.config, seed=f"{seed}/sft", compute=compute, recorder=tuning)
    metrics["held_out_loss"] = round(result["held_out_loss"], 6)
    stage.metrics(metrics)
    save_model(stage, "foreign", model, tokenizer, ["foreign_base"], metrics)


run(__name__, main, __doc__)
