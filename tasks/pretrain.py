"""Train the tiny base on the world's documents, or pin a real checkpoint (pretrain.checkpoint) by revision and hashes."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/base, its training history and metrics."""
    from apprentice.pretrain import build_base, pretrain
    from tasks.checkpoints import compute_of, save_model, tokenizer_of
    from tasks.corpus import documents
    from tasks.resume import StageRecorder
    from tasks.room import check_room

    compute = compute_of(stage)
    if stage.config.checkpoint:
        return pin(stage)
    corpus = documents(stage)
    tokenizer = tokenizer_of(stage, "tokenizer")
    model = build_base(stage.config, tokenizer, stage.params.seed)
    check_room(stage, compute, [model.config], [], samples=False)
    size = sum(parameter.numel() for parameter in model.parameters())
    stage.say(f"training a base of {size:,} parameters on {compute.device}")
    recorder = StageRecorder(stage, "loss", "tokens")
    pretrain(
        model,
        tokenizer,
        corpus,
        stage.config,
        seed=stage.params.seed,
        compute=compute,
        recorder=recorder,
    )
    tail = [row["loss"] for row in recorder.rows if row["loss"] is not None][-100:]
    metrics = {
        "loss": round(sum(tail) / len(tail), 6),
        "tokens": recorder.rows[-1]["tokens"],
        "parameters": size,
    }
    stage.metrics(metrics)
    save_model(stage, "base", model, tokenizer, [], metrics)


def pin(stage: Stage) -> None:
    """Note a real checkpoint by revision and file hashes in place of a copy; later stages load it from where it stands."""
    from apprentice.policy import PINNED, checkpoint_arguments, file_hashes, load_policy
    from tasks.checkpoints import model_folder
    from tasks.intake import take_in
    from tasks.stage import write_json

    place = take_in(stage)
    checkpoint, revision = stage.config.checkpoint, stage.config.revision
    folder = model_folder(stage, "base")
    write_json(folder / PINNED, {"checkpoint": str(checkpoint), "revision": revision, "files": file_hashes(place)})
    size = sum(parameter.numel() for parameter in load_policy(folder).parameters())
    stage.say(f"pinned {checkpoint} ({size:,} parameters): {checkpoint_arguments(folder)}")
    stage.history.path.write_text("step\n")
    stage.metrics({"parameters": size})


run(__name__, main, __doc__)
