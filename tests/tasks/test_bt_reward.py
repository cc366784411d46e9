"""The stage of the scalar reward model, by what it is trained on, and the stage that measures what came of it."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from apprentice.demonstrations import demonstration, write_demonstrations, write_jsonl
from tasks import bt_reward, calibration
from tasks.stage import Stage
from tests.apprentice.toys import tiny_llama
from tests.tables import speaker, words, write_model

PROMPTS = ["2 p q", "3 q q", "4 p q", "5 q q"]  # what the numbers are, the model sees by the word after them


def prepared(stage_of: Callable[..., Stage], name: str, **changes: object) -> Stage:
    settings = {"labels": "preferences", "epochs": 30, "batch_size": 4, "learning_rate": 0.01, **changes}
    own = {f"{name}.{entry}": value for entry, value in settings.items()} if name == "bt_reward" else {}
    stage = stage_of(name, **own, **{"compute.device": "cpu"})
    stage.__dict__["key"] = "0123"  # without a DVC project there is none to compute
    return stage


def train(stage_of: Callable[..., Stage], **changes: object) -> Stage:
    """Run `bt_reward` on x over y after every prompt, on a random model."""
    stage = prepared(stage_of, "bt_reward", **changes)
    model = tiny_llama(0, len(words()), hidden_size=32, intermediate_size=64, initializer_range=0.1)
    for name in ("base", "sft"):
        write_model(stage.data, name, model)
    rows = [{"prompt": prompt, "chosen": "x", "rejected": "y"} for prompt in PROMPTS]
    write_jsonl(stage.data / "clean" / "preferences.jsonl", rows)
    bt_reward.main(stage)
    return stage


# rewards begin at 0: -log sigmoid(0); the mean of 1 and 0; that of 4, 1 after even numbers and 1, 0 after odd ones
@pytest.mark.parametrize(
    ("changes", "first_loss"),
    [
        ({}, math.log(2)),
        ({"objective": "scores"}, 0.5),
        ({"objective": "scores", "prompt_offset": 1.0}, 1.5),
    ],
)
def test_the_first_loss_is_that_of_the_objective(
    stage_of: Callable[..., Stage], changes: dict[str, object], first_loss: float
) -> None:
    stage = train(stage_of, epochs=1, **changes)
    rows = list(csv.DictReader((stage.reports / "history.csv").open()))
    assert float(rows[0]["loss"]) == pytest.approx(first_loss, abs=1e-4)
    assert (float(rows[0]["accuracy"]), float(rows[0]["margin"])) == (0.5, 0.0)
    assert json.loads((stage.reports / "metrics.json").read_text())["pairs"] == 4


def test_what_was_added_to_scores_is_found_by_the_calibration(stage_of: Callable[..., Stage]) -> None:
    data = train(stage_of, objective="scores", prompt_offset=2.0).data
    (data / "models" / "sft").rename(data / "models" / "trunk")
    write_model(data, "sft", speaker())  # whose samples end, right or wrong
    write_model(data, "judge", tiny_llama(1, len(words()), hidden_size=32, intermediate_size=64))
    rows = [demonstration(prompt, "x", "test", answer="x") for prompt in PROMPTS]
    rows = [replace(row, meta={"verifier": "exact", "domain": "in_domain"}) for row in rows]
    write_demonstrations(data / "clean" / "evaluation.jsonl", rows)
    stage = prepared(stage_of, "calibration")
    calibration.main(stage)
    metrics = json.loads((stage.reports / "metrics.json").read_text())
    assert metrics["bt_reward_prompt_gap"] == pytest.approx(2.0, abs=0.5)
    assert abs(metrics["judge_prompt_gap"]) < 0.5
    assert metrics["bt_reward_accuracy"] == 1.0
