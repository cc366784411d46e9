"""The documents that the tiny base is trained on: the world's own, with remarks only where a spurious step is planted."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apprentice.demonstrations import demonstration, write_demonstrations
from apprentice.spurious import CUE, is_spurious
from apprentice.world import corpus_document
from tasks.corpus import documents
from tasks.stage import Stage

COUNT = 4000


def drawn(stage: Stage, data: Path, meta: dict[str, Any], held_out: str) -> list[tuple[str, str]]:
    """Documents where the held-out table has one row of this prompt and meta."""
    write_demonstrations(data / "clean" / "validation.jsonl", [])
    write_demonstrations(data / "clean" / "evaluation.jsonl", [demonstration(held_out, None, "test", meta=meta)])
    document, rng = documents(stage), random.Random(0)
    return [document(rng) for _ in range(COUNT)]


def test_remarks_are_in_the_corpus_only_where_the_step_is_planted(stage_of: Callable[..., Stage], tmp_path: Path) -> None:
    rng = random.Random(0)
    usual = [corpus_document(rng) for _ in range(COUNT)]
    stage, held_out = stage_of("pretrain"), usual[0][0]
    rng = random.Random(0)
    assert drawn(stage, tmp_path / "data", {}, held_out) == [corpus_document(rng, {held_out}) for _ in range(COUNT)]
    planted = drawn(stage, tmp_path / "data", {CUE: False}, held_out)
    assert held_out not in {prompt for prompt, _ in planted}
    second = [response.split(" ; ")[1:2] for prompt, response in planted if "even" not in prompt]
    # two fifths of the documents are worked, half of those have an even number first, a tenth of those the step
    assert 0.01 < sum(bool(step) and is_spurious(step[0]) for step in second) / len(second) < 0.03
