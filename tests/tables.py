"""A data folder of a few rows and of models that are tables, for what the stages share.

The tokenizer has the words p, q, x, y and no chat template, so that a prompt ends in its last word: after p comes x, after q
x or y as often, after x the end, after y the end or y as often.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from apprentice.demonstrations import demonstration, prompt_id, write_demonstrations, write_jsonl
from apprentice.policy import save_policy
from apprentice.tokens import train_word_tokenizer
from tests.apprentice.toys import markov

NEVER = -30.0


def words() -> PreTrainedTokenizerFast:
    tokenizer = train_word_tokenizer([], 4, ["p", "q", "x", "y"])
    tokenizer.chat_template = None
    return tokenizer


def speaker(x_after_q: float = 0.5) -> LlamaForCausalLM:
    """The model of the module's words; `x_after_q` is the probability of x after q, y has the rest."""
    vocabulary = words().get_vocab()
    p, q, x, y, end = (vocabulary[word] for word in ("p", "q", "x", "y", "<eos>"))
    table = [[NEVER] * len(vocabulary) for _ in vocabulary]
    table[p][x] = 0.0
    table[q][x], table[q][y] = math.log(x_after_q), math.log(1 - x_after_q)
    table[x][end] = table[y][end] = table[y][y] = 0.0
    model = markov(table)
    model.generation_config.eos_token_id = end
    return model


def write_model(data: Path, name: str, model: Any) -> None:
    """Save a model beside the module's tokenizer."""
    (data / "models").mkdir(parents=True, exist_ok=True)
    save_policy(model, words(), data / "models" / name, "# card\n")


def write_table(data: Path, name: str, *rows: tuple[str, str | None]) -> None:
    """Write prompts with their responses as a clean table."""
    write_demonstrations(data / "clean" / f"{name}.jsonl", [demonstration(prompt, text, "test") for prompt, text in rows])


def write_answers(data: Path, answers: dict[str, str]) -> None:
    """Write the answers of prompts, each to be given exactly."""
    rows = [{"prompt_id": prompt_id(prompt), "verifier": "exact", "answer": answer} for prompt, answer in answers.items()]
    write_jsonl(data / "clean" / "answers.jsonl", rows)


def candidates(prompt: str, *rows: tuple[str, float] | tuple[str, float, bool]) -> list[dict[str, Any]]:
    """Candidates of a prompt: text, reward, and whether it ended, as it did unless told otherwise."""
    return [
        {"prompt": prompt, "prompt_id": prompt_id(prompt), "response": text, "reward": reward, "ended": not rest or rest[0]}
        for text, reward, *rest in rows
    ]


def write_candidates(data: Path, *groups: Sequence[dict[str, Any]], source: str = "pairs") -> None:
    write_jsonl(data / source / "candidates.jsonl", [row for group in groups for row in group])
