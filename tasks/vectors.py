"""Task arithmetic (2509.01363): the target plus a coefficient, chosen on the validation table, times (plus - minus)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from tasks.stage import Stage, StageError, run

FOREIGN, FOREIGN_BASE = "foreign", "foreign_base"  # donors of another initialisation
Grade = dict[str, float]  # accuracy and own_format_share
Row = dict[str, float | None]


def main(stage: Stage) -> None:
    """Write data/models/vectors, its three controls, the sweep and metrics. Uses the verifier: not demonstrations-only.

    vectors_minus takes the vector away, vectors_random adds noise of its norms, vectors_foreign the vector of other donors,
    at its norms.
    """
    from apprentice.vectors import random_vector
    from tasks.checkpoints import compute_of, policy_of, save_model, tokenizer_of

    compute, config = replace(compute_of(stage), sharding=False), stage.config  # it adds up whole models
    _check(stage)
    names = dict.fromkeys((config.plus, config.minus, config.target, FOREIGN, FOREIGN_BASE))
    _preflight(stage, compute, list(names))
    models = {name: policy_of(stage, name, compute) for name in names}
    vector, foreign, facts = _vectors(stage, models)
    tokenizer, target = tokenizer_of(stage, config.target), models[config.target]
    rows = _sweep(stage, target, vector, _grader(stage, tokenizer, compute))
    best = choose(rows)
    stage.say(f"coefficient {best['coefficient']:g}: accuracy {best['accuracy']:.3f} on validation")
    metrics = _metrics(rows, best, facts)
    stage.metrics(metrics)
    card = {**metrics, "groups": facts["groups"]}
    own = (config.target, config.plus, config.minus)
    for name, added, sign, parents in (
        ("vectors", vector, 1, own),
        ("vectors_minus", vector, -1, own),
        ("vectors_random", random_vector(vector, stage.params.seed), 1, own),
        ("vectors_foreign", foreign, 1, (config.target, FOREIGN, FOREIGN_BASE)),
    ):
        coefficient = sign * best["coefficient"]
        model = _sum(target, added, coefficient)
        save_model(stage, name, model, tokenizer, list(dict.fromkeys(parents)), {"added": coefficient, **card})


def donors(stage: Stage, plus: str, minus: str) -> str:
    """What the model cards tell: a `chain` when plus was made from minus, `parallel` when both were made from one model."""
    made = {name: _origins(stage, name) for name in (plus, minus)}
    if minus in made[plus]:
        return "chain"
    return "parallel" if made[plus] & made[minus] else "unknown"


def choose(rows: Sequence[Row]) -> dict[str, float]:
    """The row of highest accuracy among the coefficients above 0; of equal ones the smallest coefficient."""
    return min((row for row in rows if row["coefficient"] > 0), key=lambda row: (-row["accuracy"], row["coefficient"]))


def _origins(stage: Stage, name: str) -> set[str]:
    from tasks.checkpoints import model_folder

    card = model_folder(stage, name) / "README.md"
    section = card.read_text().partition("## Made from")[2].partition("\n## ")[0] if card.is_file() else ""
    return set(re.findall(r"^- `([^`]+)` [0-9a-f]+$", section, re.MULTILINE))


def _check(stage: Stage) -> None:
    """One tokenizer for all, and a coefficient to choose."""
    from apprentice.vectors import check_tokenizers
    from tasks.checkpoints import tokenizer_of

    config = stage.config
    if not any(coefficient > 0 for coefficient in config.coefficients):
        raise StageError(f"vectors.coefficients: expected one above 0 to choose, got {config.coefficients}")
    names = dict.fromkeys((config.target, config.plus, config.minus, FOREIGN, FOREIGN_BASE))
    try:
        notes = check_tokenizers({name: tokenizer_of(stage, name) for name in names})
    except ValueError as error:
        raise StageError(f"vectors: {error}") from error
    for note in notes:
        stage.say(note)


def _preflight(stage: Stage, compute: Any, names: list[str]) -> None:
    """The models, and as large as the target three vectors and a sum; four models are written."""
    from tasks.room import check_room, config_of

    configs = [config_of(stage, name) for name in [*names, *[stage.config.target] * 4]]
    check_room(stage, compute, [], configs, samples=True, written=4)


def _vectors(stage: Stage, models: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The vector, the foreign one at the norms of the vector, and facts of both as they came."""
    from apprentice.vectors import cosine, difference, facts, with_norms_of

    config = stage.config
    try:
        vector = difference(models[config.plus], models[config.minus], config.exclude)
        foreign = difference(models[FOREIGN], models[FOREIGN_BASE], config.exclude)
        found = asdict(facts(vector, models[config.minus], donors(stage, config.plus, config.minus)))
        found["cosine_to_foreign"] = cosine(vector, foreign)
    except ValueError as error:
        raise StageError(f"vectors: {error}") from error
    found["foreign_norm"] = facts(foreign, models[FOREIGN_BASE], donors(stage, FOREIGN, FOREIGN_BASE)).norm
    stage.say(f"{config.plus} - {config.minus}: norm {found['norm']:.4g}, lineage {found['lineage']}")
    return vector, with_norms_of(vector, foreign), found


def _sum(target: Any, vector: Any, coefficient: float) -> Any:
    """A new model, target + coefficient * vector."""
    import copy

    from apprentice.vectors import add

    try:
        return add(copy.deepcopy(target), vector, coefficient)
    except ValueError as error:
        raise StageError(f"vectors: {error}") from error


def _grader(stage: Stage, tokenizer: Any, compute: Any) -> Callable[[Any], Grade]:
    """Measures a model on the validation prompts with an answer: greedy accuracy, and the share in the target's format."""
    from apprentice.evaluation import Questions, respond, verdicts
    from apprentice.policy import decode_responses
    from apprentice.tokens import encode_prompts
    from apprentice.verifiers import ANSWERS, BARE, verify
    from tasks.answers import verifier_name
    from tasks.checkpoints import prompt_keys, table

    verifier = verifier_name(stage)
    rows = [row for row in table(stage, "validation") if row.answer is not None]
    if verifier is None or not rows:
        raise StageError(
            "vectors: the coefficient is chosen by accuracy, and no validation row can be verified. Set ingest.verifier and "
            "give rows an answer, or leave this method out"
        )
    questions = Questions(encode_prompts(tokenizer, [row.prompt for row in rows]), prompt_keys(rows), tokenizer.eos_token_id)

    def is_bare(text: str) -> bool:
        answer = ANSWERS[verifier](text)
        return answer is not None and text.strip() == BARE[verifier](answer)

    def grade(model: Any) -> Grade:
        rollout = respond(
            model,
            questions,
            samples=1,
            temperature=0.0,
            max_new_tokens=stage.config.max_new_tokens,
            seed=f"{stage.params.seed}/vectors",
            compute=compute,
        )
        texts, ended = decode_responses(tokenizer, rollout.response_ids()), rollout.ended.tolist()
        right = verdicts(rollout, 1, [True] * len(rows), lambda i, _ids: verify(verifier, texts[i], rows[i].answer or ""))
        bare = [done and is_bare(text) for done, text in zip(ended, texts, strict=True)]
        return {"accuracy": sum(ok for (ok,) in right) / len(rows), "own_format_share": sum(bare) / len(rows)}

    return grade


def _sweep(stage: Stage, target: Any, vector: Any, grade: Callable[[Any], Grade]) -> list[Row]:
    """A row for the target alone, then one for each coefficient."""
    from tasks.resume import StageRecorder

    recorder = StageRecorder(stage, "coefficient", "accuracy", "own_format_share")
    recorder.resume()
    coefficients = [0.0, *(value for value in stage.config.coefficients if value)]
    for done, coefficient in enumerate(coefficients, 1):
        if done > len(recorder.rows):
            model = _sum(target, vector, coefficient)
            recorder.step(done, len(coefficients), {"coefficient": coefficient, **grade(model)}, dict)
    recorder.over(dict)
    return recorder.rows


def _metrics(rows: Sequence[Row], best: Row, facts: dict[str, Any]) -> dict[str, Any]:
    before, *swept = rows
    kept = ("norm", "relative_norm", "changed", "cosine_to_foreign", "foreign_norm")
    figures = {
        "coefficient": best["coefficient"],
        "accuracy": best["accuracy"],
        "own_format_share": best["own_format_share"],
        "target_accuracy": before["accuracy"],
        "target_own_format_share": before["own_format_share"],
        **{f"accuracy_at_{row['coefficient']:g}": row["accuracy"] for row in swept},
        **{name: facts[name] for name in kept},
        **{f"vanishing_{half}": share for half, share in facts["vanishing"].items()},
    }
    rounded = {name: value if value is None else round(value, 6) for name, value in figures.items()}
    return {**rounded, "lineage": facts["lineage"]}


run(__name__, main, __doc__)
