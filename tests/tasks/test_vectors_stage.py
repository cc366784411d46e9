"""The stage of task arithmetic, on models that are tables: the sweep, the choice and the four models worked by hand.

The vocabulary has 16 tokens. The target says `answer : 1` to everything; the vector adds 3 to the logit of 2 after `:` (which
stood 2 below that of 1), so that `answer : 2` comes with a coefficient above 2/3, and 1.7 to that of 1 at the start (2 below
`answer`) with `answer` after it, so that above 1.18 the response is `1 answer : 2`: right, but not the bare form.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.demonstrations import demonstration, write_demonstrations
from apprentice.policy import load_policy, save_policy
from apprentice.tokens import train_word_tokenizer
from tasks import vectors
from tasks.history import rows_of
from tasks.stage import Stage, StageError
from tasks.vectors import choose, donors, main
from tests.apprentice.toys import markov

TOKENIZER = train_word_tokenizer([], 4, ["answer", ":", "1", "2"])
ANSWER, COLON, ONE, TWO, END, START = (
    TOKENIZER.convert_tokens_to_ids(t) for t in ("answer", ":", "1", "2", "<eos>", "<assistant>")
)
BASE = {(START, ANSWER): 2.0, (ANSWER, COLON): 2.0, (COLON, ONE): 2.0, (ONE, END): 2.0, (TWO, END): 2.0}
VECTOR = {(COLON, TWO): 3.0, (START, ONE): 1.7, (ONE, ANSWER): 1.7}
FOREIGN = {(COLON, END): 4.0}


def table(*parts: dict[tuple[int, int], float]) -> Any:
    logits = torch.zeros(16, 16)
    for part in parts:
        for place, value in part.items():
            logits[place] += value
    return markov(logits.tolist())


def logits(folder: Path) -> torch.Tensor:
    """What follows each token: [16, 16]."""
    with torch.no_grad():
        return load_policy(folder)(torch.arange(16)[:, None]).logits[:, 0]


@pytest.fixture
def stage(stage_of: Callable[..., Stage], tmp_path: Path) -> Stage:
    made = stage_of("vectors", **{"vectors.coefficients": [1.0, 0.75, 0.5, 1.25], "compute.device": "cpu"})
    made.__dict__["key"] = "0123"  # without a DVC project there is none to compute
    rows = [demonstration(f"{i} 1", "answer : 2", "test", answer=answer) for i, answer in enumerate(["2", "2", "1", None])]
    write_demonstrations(made.data / "clean" / "validation.jsonl", rows)
    ingest = made.data / "reports" / "ingest"
    ingest.mkdir(parents=True)
    (ingest / "metrics.json").write_text('{"verifier": "world"}')
    half = {place: value / 2 for place, value in VECTOR.items()}
    models = {"donor_ppo": table(half, VECTOR), "sft": table(half), "target": table(BASE)}
    for name, model in {**models, "foreign": table(FOREIGN), "foreign_base": table()}.items():
        (made.data / "models").mkdir(exist_ok=True)
        save_policy(model, TOKENIZER, made.data / "models" / name, "## Made from\n\n- `base` 0123abcd\n\n## Settings\n")
    return made


def test_the_sweep_the_choice_and_the_models(stage: Stage) -> None:
    main(stage)
    history = [{name: float(value) for name, value in row.items()} for row in rows_of(stage.history.path)]
    # of three rows with an answer two want 2, one wants 1
    assert [tuple(row.values()) for row in history] == [
        (1, 0.0, pytest.approx(1 / 3, abs=1e-5), 1.0),
        (2, 1.0, pytest.approx(2 / 3, abs=1e-5), 1.0),
        (3, 0.75, pytest.approx(2 / 3, abs=1e-5), 1.0),
        (4, 0.5, pytest.approx(1 / 3, abs=1e-5), 1.0),
        (5, 1.25, pytest.approx(2 / 3, abs=1e-5), 0.0),
    ]
    assert list(history[0]) == ["step", "coefficient", "accuracy", "own_format_share"]
    metrics = json.loads((stage.reports / "metrics.json").read_text())
    assert metrics["coefficient"] == 0.75 and metrics["accuracy"] == 0.666667 and metrics["target_accuracy"] == 0.333333
    assert [metrics[f"accuracy_at_{c}"] for c in ("0.5", "0.75", "1", "1.25")] == [0.333333, 0.666667, 0.666667, 0.666667]
    assert metrics["own_format_share"] == metrics["target_own_format_share"] == 1.0 and metrics["lineage"] == "parallel"
    # the head holds logits / sqrt(hidden), and all else is equal in these models
    assert metrics["norm"] == pytest.approx((3.0**2 + 2 * 1.7**2) ** 0.5 / 4, abs=1e-5)
    assert metrics["foreign_norm"] == 1 and metrics["cosine_to_foreign"] == 0

    base, step, foreign = (logits_of(part) for part in (BASE, VECTOR, FOREIGN))
    models = stage.data / "models"
    assert torch.allclose(logits(models / "vectors"), base + 0.75 * step, atol=1e-4)
    assert torch.allclose(logits(models / "vectors_minus"), base - 0.75 * step, atol=1e-4)
    assert torch.allclose(
        logits(models / "vectors_foreign"), base + 0.75 * metrics["norm"] * foreign, atol=1e-4
    )  # its own norm is 1
    target, noisy = (load_policy(models / name).lm_head.weight.detach() for name in ("target", "vectors_random"))
    assert float((noisy - target).norm()) == pytest.approx(0.75 * metrics["norm"], rel=1e-4)
    card = (models / "vectors_foreign" / "README.md").read_text()
    assert all(f"- `{name}` " in card for name in ("target", "foreign", "foreign_base")) and "- `sft` " not in card
    assert '"lm_head.weight"' in (models / "vectors" / "README.md").read_text()
    assert '"added": -0.75' in (models / "vectors_minus" / "README.md").read_text()


def logits_of(part: dict[tuple[int, int], float]) -> torch.Tensor:
    found = torch.zeros(16, 16)
    for place, value in part.items():
        found[place] = value
    return found


def test_an_interrupted_sweep_goes_on(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = dataclasses.replace(stage.params.runtime, checkpoint_seconds=0.0)
    stage.params = dataclasses.replace(stage.params, runtime=runtime)
    made, add = [], vectors._sum

    def stopping(target: Any, vector: Any, coefficient: float) -> Any:
        made.append(coefficient)
        if len(made) == 3:
            raise KeyboardInterrupt
        return add(target, vector, coefficient)

    monkeypatch.setattr(vectors, "_sum", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(stage)
    main(stage)
    assert made[:6] == [0.0, 1.0, 0.75, 0.75, 0.5, 1.25]
    assert [row["coefficient"] for row in rows_of(stage.history.path)] == ["0", "1", "0.75", "0.5", "1.25"]


def test_a_response_cut_off_counts_neither_as_right_nor_as_bare(stage: Stage, stage_of: Callable[..., Stage]) -> None:
    short = stage_of("vectors", **{"vectors.max_new_tokens": 3, "compute.device": "cpu"})  # `answer : 1` without its end
    short.__dict__["key"] = "0123"
    main(short)
    assert {(row["accuracy"], row["own_format_share"]) for row in rows_of(short.history.path)} == {("0", "0")}


def test_ties_go_to_the_smallest_coefficient_above_0() -> None:
    rows: Any = [{"coefficient": c, "accuracy": a} for c, a in ((-1.0, 0.9), (0.0, 0.9), (1.0, 0.5), (0.5, 0.5), (0.2, 0.4))]
    assert choose(rows)["coefficient"] == 0.5


def test_the_cards_tell_a_chain_from_parallel_donors(stage: Stage) -> None:
    assert donors(stage, "donor_ppo", "sft") == "parallel"
    card = stage.data / "models" / "donor_ppo" / "README.md"
    card.write_text("## Made from\n\n- `sft` 0123abcd\n- `base` 0123abcd\n\n## Settings\n")
    assert donors(stage, "donor_ppo", "sft") == "chain"
    card.write_text("## Made from\n\n- nothing: trained from scratch\n\n## Settings\n\n- `base` 0123abcd\n")
    assert donors(stage, "donor_ppo", "sft") == "unknown"
    card.unlink()
    assert donors(stage, "donor_ppo", "sft") == "unknown"


def test_what_cannot_be_chosen_or_added_stops_with_advice(stage: Stage, stage_of: Callable[..., Stage]) -> None:
    with pytest.raises(StageError, match=r"vectors\.coefficients: expected one above 0"):
        main(stage_of("vectors", **{"vectors.coefficients": [-1.0, 0.0]}))
    with pytest.raises(StageError, match=r"no tensor name matches '\*none\*'"):
        main(stage_of("vectors", **{"vectors.exclude": ["*none*"]}))
    ingest = stage.data / "reports" / "ingest" / "metrics.json"
    ingest.write_text('{"verifier": "none"}')
    with pytest.raises(StageError, match="no validation row can be verified"):
        main(stage)
    ingest.write_text('{"verifier": "world"}')
    train_word_tokenizer(["other words"], 4).save_pretrained(stage.data / "models" / "foreign")
    with pytest.raises(StageError, match=r"the tokenizers of target and foreign differ"):
        main(stage)
