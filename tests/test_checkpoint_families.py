"""The whole main line on a tiny random checkpoint of each family of real ones, with a BPE tokenizer and chat template of its
own, on rows of GSM8K's shape: by params alone, from the jsonl to the registry."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from apprentice.demonstrations import read_jsonl
from tests.apprentice.families import tiny
from tests.chat_tokenizers import CHATML, GEMMA, LLAMA, byte_level
from tests.conftest import Project, copy_project
from tests.toy import empty_store

pytestmark = pytest.mark.slow
MODELS = ["base", "sft", "sft_tuned", "srppo", "rso"]
TEMPLATES = {"qwen2": CHATML, "llama": LLAMA, "gemma2": GEMMA, "gpt2": None}
SPECIAL: dict[str, dict[str, str]] = {
    "qwen2": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>"},
    "gemma2": {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"},
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
}
MARKS = {"qwen2": ["<|im_start|>"], "gemma2": ["<start_of_turn>", "<end_of_turn>"]}
SETTINGS: dict[str, Any] = {
    "ingest__source__kind": "jsonl",
    "ingest__source__path": "data/raw/rows.jsonl",
    "compute__device": "cpu",
    "compute__gradient_checkpointing": True,
    "compute__packing": True,
    "sft__epochs": 4,
    "sft__batch_size": 8,
    "sft__learning_rate": 0.03,  # so that its responses end
    "sft__gate_prompts": 4,
    "sft_tuned__epochs": 1,
    "sft_tuned__gate_prompts": 0,
    "srppo__iterations": 1,
    "srppo__batch_size": 8,
    "srppo__minibatch_size": 8,
    "srppo__max_new_tokens": 8,
    "srppo__kl_stop": None,
    "pairs__prompts": 6,
    "pairs__candidates": 8,
    "pairs__accepted": 4,
    "pairs__max_new_tokens": 24,
    "rso__epochs": 1,
    "evaluate__samples": 1,
    "evaluate__temperatures": [1.0],
    "evaluate__max_new_tokens": 8,
    "report__samples": 1,
}


def rows() -> list[dict[str, str]]:
    """Sums in GSM8K's shape."""
    sums = [(a, b) for a in range(2, 9) for b in range(2, 9)]
    return [
        {
            "question": f"Tom has {a} apples and buys {b}. How many?",
            "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}",
        }
        for a, b in sums
    ]


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the family's special tokens and template."""
    model = byte_level([text for row in rows() for text in row.values()])
    model.add_special_tokens(list(dict.fromkeys([*SPECIAL[family].values(), *MARKS.get(family, [])])))
    made = PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL[family])
    made.chat_template = TEMPLATES[family]
    return made


def write_checkpoint(folder: Path, family: str) -> None:
    """A folder as the hub has them: more rows than tokens, as real embeddings are padded."""
    tokenizer = tokenizer_of(family)
    names = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    tiny(family, vocab=len(tokenizer) + 5, positions=256, **names).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, Any], str]:
    """The project after the main line on every family, what each run ended with, and all that was said."""
    project = copy_project(tmp_path_factory.mktemp("families") / "project")
    for family in TEMPLATES:
        write_checkpoint(project.path(f"checkpoints/{family}"), family)
    project.path("data/raw/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    project.without_git()
    project.path("mlflow.db").write_bytes(empty_store().read_bytes())
    project.set(**SETTINGS)
    (project.root / "tests").symlink_to(Path(__file__).parent)
    folders = [f"checkpoints/{family}" for family in TEMPLATES]
    done: subprocess.CompletedProcess[str] = project.run(
        "-m", "tests.main_line", *folders, MLFLOW_TRACKING_URI=f"sqlite:///{project.root}/mlflow.db"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return project, {end["checkpoint"]: end for end in ends}, done.stdout


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_main_line_runs_on_a_checkpoint_of_the_family(built: Any, family: str) -> None:
    _, ends, said = built
    end = ends[family]
    assert list(end["models"]) == MODELS and end["registry"].keys() == {"pretrain", *MODELS[1:]}
    loss = {model: figures["validation/held_out_loss"]["mean"] for model, figures in end["models"].items()}
    assert loss["sft_tuned"] < loss["base"], "it learns from the demonstrations"
    assert end["models"]["srppo"]["in_domain/kl_to_sft"]["mean"] != 0, "and PPO moves it"
    assert f"pinned checkpoints/{family} (" in said


def test_a_gsm8k_row_is_encoded_with_the_marks_of_its_family_and_ends_once(built: Any) -> None:
    from apprentice.policy import load_tokenizer
    from apprentice.tokens import encode_prompts, encode_responses

    starts = {"qwen2": "<|im_start|>", "llama": "<s>", "gemma2": "<bos>", "gpt2": "<|endoftext|>"}
    for family, start in starts.items():
        tokenizer = load_tokenizer(built[0].path(f"checkpoints/{family}"))
        (prompt,), (response,) = encode_prompts(tokenizer, ["Tom"]), encode_responses(tokenizer, ["4\n#### 4"])
        assert prompt.count(tokenizer.convert_tokens_to_ids(start)) == (2 if family == "qwen2" else 1)
        assert tokenizer.convert_ids_to_tokens(prompt[0]) == start
        assert response.count(tokenizer.eos_token_id) == 1 and response[-1] == tokenizer.eos_token_id


def test_the_rows_are_read_as_gsm8k(built: Any) -> None:
    project = built[0]
    metrics = json.loads(project.path("data/reports/ingest/metrics.json").read_text())
    assert (metrics["shape"], metrics["verifier"], metrics["rows_rejected"]) == ("question/answer", "gsm8k", 0)
    assert read_jsonl(project.path("data/clean/demonstrations.jsonl"))
