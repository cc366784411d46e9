"""Class-conditioned fine-tuning on data of mixed quality (C-RLFT, 2309.11235); the model answers as one class."""

from collections import Counter

from tasks.stage import Stage, StageError, run


def main(stage: Stage) -> None:
    """Write data/models/crlft, its history and metrics; its chat template carries the tag of `answer_as`."""
    from apprentice.crlft import EXPERT, class_weights, conditioned
    from apprentice.tokens import collate, encode_prompt, encode_responses, pad_id
    from tasks.checkpoints import compute_of, table, tokenizer_of
    from tasks.fine_tuning import fine_tune_on

    config, compute, tokenizer = stage.config, compute_of(stage), tokenizer_of(stage, "base")
    rows = table(stage, "demonstrations") + table(stage, "suboptimal")
    rows = [row for row in rows if config.weights.get(row.quality or EXPERT, 1.0) > 0]
    if not rows:
        raise StageError("crlft.weights: every class that occurs has weight 0, so nothing is left to learn from")
    classes = [row.quality or EXPERT for row in rows]
    try:
        weights = class_weights(classes, config.weights)
    except ValueError as error:
        raise StageError(f"crlft.{error}") from error
    stage.say(", ".join(f"{count} {name}" for name, count in Counter(classes).items()))
    tagged = {
        name: conditioned(tokenizer, name) if config.condition and name else tokenizer for name in {*classes, config.answer_as}
    }
    prompts = [encode_prompt(tagged[name], row.prompt) for name, row in zip(classes, rows, strict=True)]
    responses = encode_responses(tokenizer, [row.response or "" for row in rows])
    train = collate(prompts, responses, pad_id(tokenizer)).to(compute.device)
    scaled = train.mask * train.mask.new_tensor(weights)[:, None]
    fine_tune_on(stage, train, tagged[config.answer_as], compute, init="base", weights=scaled)


run(__name__, main, __doc__)
