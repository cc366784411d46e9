"""The stream of documents that a tiny base is trained on."""

from tasks.stage import Stage, StageError


def documents(stage: Stage):  # type: ignore[no-untyped-def]
    """The world's document generator, held-out prompts left out; where a spurious step is planted, with its remarks."""
    from apprentice.spurious import at_base_rate, have_cues
    from apprentice.world import corpus_document
    from tasks.checkpoints import table

    if stage.params.ingest.source.kind != "world":
        raise StageError(
            "pretrain.checkpoint is null, and the tiny base knows the embedded world only. Name a real checkpoint: "
            "`checkpoint: Qwen/Qwen2.5-0.5B` with its `revision`, or a folder"
        )
    rows = [row for name in ("validation", "evaluation") for row in table(stage, name)]
    held_out, planted = {row.prompt for row in rows}, have_cues(rows)

    def document(rng):  # type: ignore[no-untyped-def]
        prompt, response = corpus_document(rng, held_out)
        return prompt, at_base_rate(rng, prompt, response) if planted else response

    return document
