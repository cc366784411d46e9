"""The models and texts both sides work on, made once under benchmarks/.made and then loaded from there.

tiny: the embedded world at the pipeline's own size, a base and a fine-tuned model that end their responses by themselves.
wide: random weights and texts; hidden 128, 4 layers, 32,000 words, prompts of 64 tokens.
"""

import dataclasses
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from apprentice.compute import CPU, Compute, set_up
from apprentice.demonstrations import split_of
from apprentice.policy import load_policy, load_tokenizer, save_policy
from apprentice.pretrain import build_base, pretrain
from apprentice.recorder import Recorder
from apprentice.sft import HeldOut, fine_tune
from apprentice.tokens import Batch, collate, encode_prompts, encode_responses, train_word_tokenizer
from apprentice.world import WORDS, corpus_document, make_tables
from benchmarks.measure import ROOT, THREADS
from tasks.stage import read_params

MADE = ROOT / "benchmarks" / ".made"
PRETRAIN_STEPS = 1500  # enough that responses end by themselves, at many lengths
WIDE_WORDS, WIDE_PROMPT, WIDE_RESPONSE = 32_000, 64, 32
SPECIALS = ["<pad>", "<bos>", "<eos>"]


@dataclass(frozen=True)
class Material:
    """What a shape gives: tokenizer, unlabelled prompts, demonstrations and preference pairs as ids, end tokens included."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    demonstrations: tuple[list[list[int]], list[list[int]]]
    pairs: tuple[list[list[int]], list[list[int]], list[list[int]]]

    @property
    def end(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    def model(self, name: str) -> PreTrainedModel:
        """`base` or `sft`, freshly loaded."""
        return load_policy(self.folder / name)

    def plain_model(self, name: str) -> PreTrainedModel:
        """The same as transformers alone loads it, for a peer."""
        return LlamaForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32).eval()

    def demonstrated(self, rows: int) -> Batch:
        """The first `rows` demonstrations."""
        prompts, responses = self.demonstrations
        return collate(prompts[:rows], responses[:rows], self.end)


def computing() -> Compute:
    """The defaults of params.yaml on a CPU, at the threads every side gets."""
    return set_up(dataclasses.replace(read_params().compute, device="cpu", threads=THREADS))


def computing_plainly() -> None:
    """What a peer shares of that."""
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)


def material(shape: str) -> Material:
    """Load a shape, made before by `make`."""
    return {"tiny": _tiny, "wide": _wide}[shape]()


def make(shape: str) -> None:
    """Make the models of a shape where they are missing."""
    folder = MADE / shape
    if (folder / "sft").exists():
        return
    print(f"making {folder.relative_to(ROOT)}", flush=True)
    computing()
    {"tiny": _make_tiny, "wide": _make_wide}[shape](folder)


def _make_tiny(folder: Path) -> None:
    params = read_params()
    tables = _world()
    texts = [f"{row.prompt} {row.response or ''}" for rows in tables.values() for row in rows]
    tokenizer = train_word_tokenizer(texts, params.tokenizer.max_words, WORDS)
    config = dataclasses.replace(params.pretrain, steps=PRETRAIN_STEPS)
    model = build_base(config, tokenizer, 0)
    pretrain(model, tokenizer, corpus_document, config, seed=0, compute=CPU, recorder=Recorder())
    save_policy(model, tokenizer, folder / "base", "")
    rows = tables["demonstrations"]
    train = collate(
        encode_prompts(tokenizer, [row.prompt for row in rows]),
        encode_responses(tokenizer, [row.response or "" for row in rows]),
        tokenizer.eos_token_id,
    )
    fine_tune(model, train, HeldOut(train.rows([0])), params.sft, seed="0", compute=CPU, recorder=Recorder())
    save_policy(model, tokenizer, folder / "sft", "")


def _world() -> dict:
    config = read_params().ingest
    split = partial(split_of, validation_share=config.validation_share, evaluation_share=config.evaluation_share)
    return make_tables(0, dataclasses.replace(config.world, demonstrations=512), split)


def _tiny() -> Material:
    folder = MADE / "tiny"
    tokenizer, tables = load_tokenizer(folder / "base"), _world()
    pool = encode_prompts(tokenizer, [row.prompt for row in tables["prompts"]])
    rows = tables["demonstrations"]
    prompts = encode_prompts(tokenizer, [row.prompt for row in rows])
    responses = encode_responses(tokenizer, [row.response or "" for row in rows])
    return Material(folder, tokenizer, pool, (prompts, responses), (prompts, responses, responses[1:] + responses[:1]))


def _make_wide(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WIDE_WORDS - len(SPECIALS))}, unk_token="w0"))
    words.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="w0"
    )
    model = wide_model()
    save_policy(model, tokenizer, folder / "base", "")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0.0)
    save_policy(model, tokenizer, folder / "sft", "")


def wide_model(vocabulary: int = WIDE_WORDS, hidden: int = 128, layers: int = 4, positions: int = 2048) -> LlamaForCausalLM:
    """A Llama of random weights, heads of 32, the wide shape unless told otherwise."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            pad_token_id=vocabulary - 3,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
    ).eval()


def _wide() -> Material:
    folder, rng = MADE / "wide", random.Random(0)
    tokenizer = load_tokenizer(folder / "base")

    def text(length: int) -> list[int]:
        return [rng.randrange(WIDE_WORDS - len(SPECIALS)) for _ in range(length)]

    def response() -> list[int]:
        return [*text(rng.randrange(WIDE_RESPONSE // 4, WIDE_RESPONSE)), WIDE_WORDS - 1]

    prompts = [text(WIDE_PROMPT) for _ in range(1024)]
    demonstrated = prompts[:512]
    answers = [[response() for _ in demonstrated] for _ in range(3)]
    return Material(folder, tokenizer, prompts, (demonstrated, answers[0]), (demonstrated, answers[1], answers[2]))
