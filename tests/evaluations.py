"""What evaluations and training stages write, in a few rows: input of the report's tests."""

import csv
import json
from pathlib import Path
from typing import Any

MODELS = ["base", "sft", "sft_tuned", "srppo"]
NASTY = '<script>alert("x")</script> | **bold** & more'
GREEDY = {  # of four prompts: in-domain a and b, out-of-domain c (pool) and d (unseen)
    "base": [0, 0, 0, 0],
    "sft": [1, 0, 1, 0],
    "sft_tuned": [1, 1, 1, 1],
    "srppo": [0, 0, 1, 1],
    "rft": [1, 1, 0, 1],
    "crlft": [0, 1, 0, 0],
    "bt_ppo": [1, 0, 1, 1],
}
HISTORIES = {
    "pretrain": [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}],
    "sft": [{"step": 1, "loss": 2.0, "held_out_loss": ""}, {"step": 2, "loss": 1.0, "held_out_loss": 1.5}],
    "srppo": [
        {"step": 1, "reward": 0.5, "reward_std": 0.1, "kl_to_sft": 0.0, "length": 9.0, "reward_length_slope": 0.01},
        {"step": 2, "reward": 0.7, "reward_std": 0.2, "kl_to_sft": 0.1, "length": 9.5, "reward_length_slope": 0.02},
    ],
    "rso": [{"step": 1, "loss": 0.7, "margin": 0.0, "accuracy": 0.5}],
}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_evaluation(folder: Path, model: str, verified: bool = True) -> None:
    domains = ["in_domain", "in_domain", "out_of_domain_pool", "out_of_domain_unseen"]
    empty = dict.fromkeys(["greedy_accuracy", "pass_at_8", "self_reward", "kl_to_sft", "length", "held_out_loss"], "")
    rows, samples = [], []
    for i, (domain, right) in enumerate(zip(domains, GREEDY[model], strict=True)):
        known = {"greedy_accuracy": right, "pass_at_8": 1} if verified else {}
        moved = 0.0 if model == "sft" else 0.25
        found = {**known, "self_reward": i + right, "kl_to_sft": moved, "length": 10 + i}
        rows.append({"id": "abcd"[i], "domain": domain, **empty, **found})
        text = {"prompt": f"prompt {i} {NASTY}", "answer": "7", "greedy": f"greedy of {model}", "sample": NASTY}
        samples.append({"id": "abcd"[i], "domain": domain, **text, "greedy_correct": bool(right) if verified else None})
    rows += [{**rows[0], **empty, "id": f"v{i}", "domain": "validation", "held_out_loss": 0.5 + i} for i in range(2)]
    write_csv(folder / "prompts.csv", rows)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
