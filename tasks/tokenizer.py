"""Train the tiny word tokenizer on the clean tables, or take the one of a real checkpoint (pretrain.checkpoint)."""

from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Write data/models/tokenizer and its size."""
    from apprentice.demonstrations import prompt_text, read_demonstrations, read_jsonl
    from apprentice.tokens import SPECIAL, train_word_tokenizer
    from apprentice.world import WORDS

    checkpoint = stage.params.pretrain.checkpoint
    if checkpoint:
        from apprentice.policy import load_tokenizer
        from tasks.intake import take_in

        tokenizer = load_tokenizer(take_in(stage))
        stage.say(f"took the tokenizer of {checkpoint}: {len(tokenizer)} tokens")
    else:
        tables = [
            read_demonstrations(stage.data / "clean" / f"{name}.jsonl")
            for name in ("demonstrations", "validation", "prompts", "evaluation", "suboptimal")
        ]
        texts = [f"{prompt_text(row.prompt)} {row.response or ''}" for rows in tables for row in rows]
        pairs = read_jsonl(stage.data / "clean" / "preferences.jsonl")
        texts += [f"{prompt_text(row['prompt'])} {row['chosen']} {row['rejected']}" for row in pairs]
        world = all(row.source.startswith("world") for row in tables[0])
        tokenizer = train_word_tokenizer(texts, stage.config.max_words, WORDS if world else ())
        stage.say(f"{len(tokenizer)} tokens, {len(SPECIAL)} of them reserved")
    tokenizer.save_pretrained(stage.data / "models" / "tokenizer")
    stage.metrics({"tokens": len(tokenizer)})


run(__name__, main, __doc__)
