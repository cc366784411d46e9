"""Toys of the core's tests: tiny Llamas, a Llama that is a table, a world small enough to enumerate, a recorder that stops.

The enumerable world has three content tokens (0, 1, 2) and the end token 3, and responses of at most three tokens: 13 that
ended (the end token counted) and 27 that were cut off, 40 in all.
"""

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from apprentice.compute import CPU, Compute
from apprentice.finite import BadSignError
from apprentice.ppo import Prompts
from apprentice.recorder import Recorder, Row, State
from apprentice.sampling import Rollout
from apprentice.sections import PretrainConfig, RSOConfig, SFTConfig, SRPPOConfig
from apprentice.tokens import Batch, collate

END, LIMIT, VOCAB = 3, 3, 4
SMALL = Compute(CPU.device, CPU.dtype, forward_tokens=1, cache_tokens=1)  # one row a forward pass
PACKED = Compute(CPU.device, CPU.dtype, forward_tokens=24, packing=True)
ONE_ROW = Compute(CPU.device, CPU.dtype, forward_tokens=40, packing=True, attention="flash_attention_2")  # its layout
LAYOUTS = {"rows": SMALL, "packed": PACKED, "one_row": ONE_ROW}


def tiny_llama(seed: int, vocab: int = VOCAB, **changes: Any) -> LlamaForCausalLM:
    """A random two-layer Llama whose distributions are far from uniform."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": END,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def markov(table: Sequence[Sequence[float]]) -> LlamaForCausalLM:
    """A Llama whose next-token logits are `table[last token]`, whatever came before.

    Attention and MLP add nothing (their output projections are 0) and token i is embedded as the unit vector e_i, which RMS
    norm scales to sqrt(hidden) e_i, so that row i of the table, divided by that, is column i of the head.
    """
    logits = torch.tensor(table, dtype=torch.float32)
    vocab, hidden = len(logits), 16
    model = tiny_llama(0, vocab, hidden_size=hidden, num_hidden_layers=1, tie_word_embeddings=False, rms_norm_eps=0.0)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab, hidden))
        model.lm_head.weight.copy_(nn.functional.pad(logits.T / hidden**0.5, (0, hidden - vocab)))
    return model


def enumerate_responses() -> list[tuple[list[int], bool]]:
    """Every response of the enumerable world, and whether it ended."""
    contents = [list(c) for n in range(LIMIT) for c in itertools.product(range(END), repeat=n)]
    cut = [list(c) for c in itertools.product(range(END), repeat=LIMIT)]
    return [([*c, END], True) for c in contents] + [(c, False) for c in cut]


def enumerated(prompt: Sequence[int] = (0, 2)) -> Batch:
    """Every response to one prompt."""
    responses = [ids for ids, _ in enumerate_responses()]
    return collate([prompt] * len(responses), responses, END)


def ended() -> Tensor:
    """[40] bool: which of the enumerated responses ended."""
    return torch.tensor([done for _, done in enumerate_responses()])


def as_rollout(batch: Batch, logps: Tensor, done: Tensor | None = None) -> Rollout:
    """Enumerated responses as if they had been sampled; ended unless told otherwise."""
    return Rollout(batch, logps, torch.ones(len(batch.ids), dtype=torch.bool) if done is None else done, [""] * len(batch.ids))


class Tabular:
    """A policy on the enumerable world in float64: one row of logits for each prefix of content tokens."""

    def __init__(self, seed: int, spread: float = 1.0) -> None:
        prefixes = [c for n in range(LIMIT) for c in itertools.product(range(END), repeat=n)]
        number = {prefix: i for i, prefix in enumerate(prefixes)}
        responses = [ids for ids, _ in enumerate_responses()]
        rows = [[number[tuple(ids[:t])] for t in range(len(ids))] for ids in responses]
        self.rows = torch.tensor([row + [0] * (LIMIT - len(row)) for row in rows])
        self.tokens = torch.tensor([ids + [0] * (LIMIT - len(ids)) for ids in responses])
        self.mask = torch.tensor([[1.0] * len(ids) + [0.0] * (LIMIT - len(ids)) for ids in responses]).double()
        generator = torch.Generator().manual_seed(seed)
        self.logits = spread * torch.randn(len(prefixes), VOCAB, generator=generator, dtype=torch.float64)
        self.logits.requires_grad_(True)

    def logps(self) -> Tensor:
        """[40, 3] log-probabilities of the response tokens, 0 in the padding."""
        return self.logits.log_softmax(-1)[self.rows, self.tokens] * self.mask

    def frozen(self) -> Tensor:
        """The same, without gradient."""
        return self.logps().detach()


def tilt(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """[N] probabilities proportional to reference exp(reward / beta): reference and rewards [N], the former in logs."""
    return (reference + rewards / beta).softmax(0)


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())


def naive_logps(model: nn.Module, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Log-probability of each response token: one forward pass a token, no batch, no padding, the softmax written out."""
    found = []
    for t, token in enumerate(response):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response[:t]]])).logits[0, -1].double() / temperature
        found.append(float((logits[token].exp() / logits.exp().sum()).log()))
    return found


def hash_of(model: nn.Module) -> str:
    """A hash of every weight."""
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for _, tensor in state)).hexdigest()


def gradient(model: nn.Module) -> Tensor:
    """All gradients of a model in one vector."""
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


class Interrupted(Exception):
    """Stands for a crash."""


class Keeping(Recorder):
    """Keeps the state after step `keep_at`, then raises `Interrupted`; starts from `saved` when given one."""

    def __init__(
        self, keep_at: int | None = None, saved: tuple[State, list[Row], list[int]] | None = None, skip_steps: int = 0
    ) -> None:
        super().__init__(skip_steps)
        self.keep_at, self.saved, self.warnings = keep_at, saved, list[str]()

    def resume(self) -> State | None:
        if self.saved is None:
            return None
        state, self.rows, (self.taken, self.skipped, self.skipped_in_a_row) = copy.deepcopy(self.saved)
        return state

    def step(self, done: int, total: int, row: Mapping[str, float | None], state: Callable[[], State]) -> None:
        super().step(done, total, row, state)
        if done == self.keep_at:
            self.saved = copy.deepcopy((state(), self.rows, [self.taken, self.skipped, self.skipped_in_a_row]))
            raise Interrupted

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class Stopping(Recorder):
    """Stops at a bad sign, as stages may."""

    def bad_sign(self, message: str) -> None:
        raise BadSignError(message)


def pretrain_config(**changes: Any) -> PretrainConfig:
    config = PretrainConfig(
        checkpoint=None,
        revision=None,
        hidden_size=16,
        intermediate_size=32,
        layers=2,
        heads=2,
        max_positions=64,
        steps=20,
        batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.01,
        warmup_steps=2,
    )
    return dataclasses.replace(config, **changes)


def sft_config(**changes: Any) -> SFTConfig:
    config = SFTConfig(
        epochs=3,
        select="last",
        batch_size=4,
        learning_rate=5e-3,
        warmup_share=0.1,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gate_prompts=0,
        gate_samples=1,
    )
    return dataclasses.replace(config, **changes)


def srppo_config(**changes: Any) -> SRPPOConfig:
    config = SRPPOConfig(
        init="sft",
        reward_target="sft",
        reward_baseline="base",
        kl_anchor="sft",
        baseline_weight=1.0,
        placement="eos",
        prompts="pool",
        span="sum",
        missing_eos_reward=-1.0,
        kl_coef=0.5,
        kl_estimator="k1",
        kl_stop=None,
        iterations=4,
        batch_size=8,
        epochs=1,
        minibatch_size=4,
        temperature=1.0,
        max_new_tokens=LIMIT,
        critic="separate",
        critic_init="sft",
        value_coef=0.1,
        gamma=1.0,
        gae_lambda=0.95,
        whiten=True,
        reward_std_floor=1e-3,
        clip_range=0.2,
        value_clip_range=None,
        old_logps="auto",
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
        max_grad_norm=1.0,
    )
    return dataclasses.replace(config, **changes)


def rso_config(**changes: Any) -> RSOConfig:
    config = RSOConfig(
        loss="sigmoid_norm",
        gamma=0.5,
        epochs=3,
        batch_size=4,
        learning_rate=5e-3,
        warmup_share=0.1,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    return dataclasses.replace(config, **changes)


def pool() -> Prompts:
    """Prompts of the enumerable world; token classes: content and end."""
    prompts = [[0], [1], [2], [0, 1], [1, 2], [2, 0], [0, 0, 1], [2, 2], [1, 1, 1]]
    keys = ["-".join(map(str, ids)) for ids in prompts]
    return Prompts(prompts, keys, END, torch.tensor([0, 0, 0, 1]), ("content", "eos"))


def demonstrations(count: int, seed: int, vocab: int = VOCAB) -> Batch:
    """Random prompts with random responses of many lengths, each with its end token."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        drawn: list[int] = torch.randint(0, vocab - 1, (size,), generator=generator).tolist()
        return [token + (token >= END) for token in drawn]

    return collate([ids(1, 6) for _ in range(count)], [[*ids(0, 7), END] for _ in range(count)], END)
