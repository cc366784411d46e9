"""The stream of documents that a tiny base is trained on."""

from tasks.stage import Stage, StageError


def documents(stage: Stage):  # type: ignore[no-untyped-def]
    """The world's document generator, held-out prompts left out."""
    from apprentice.world import corpus_document
    from tasks.checkpoints import table

    if stage.params.ingest.source.kind != "world":
        raise StageError(
            "pretrain.checkpoint is null, and the tiny base knows the embedded world only. Name a real checkpoint: "
            "`checkpoint: Qwen/Qwen2.5-0.5B` with its `revision`, or a folder"
        )
    held_out = {row.prompt for name in ("validation", "evaluation") for row in table(stage, name)}

    def document(rng):  # type: ignore[no-untyped-def]
        return corpus_document(rng, held_out)

    return document
