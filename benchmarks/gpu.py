"""What one device reaches on models of random weights: `make bench-gpu`, or `python -m benchmarks.gpu`.

Beside this project it needs torch and transformers alone; for shapes trained as adapters peft too. Tokens per second, peak
memory, and the share of the device's own matrix products in bfloat16, of fine-tuning, scoring, rollouts, and a whole PPO
update of Self-Rewarding PPO. Work is counted as model FLOP: 2 a parameter and token that is read or sampled, 6 trained, 4
trained through adapters.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from apprentice.compute import Compute
from apprentice.config import parse
from apprentice.policy import freeze, score
from apprentice.ppo import Prompts
from apprentice.recorder import Recorder
from apprentice.sampling import Request, sample
from apprentice.sections import LoRAConfig
from apprentice.sft import train_step
from apprentice.srppo import SelfRewardingPPO
from apprentice.tokens import Batch, collate

FILE = Path(__file__).with_name("gpu.json")
PARAMS = Path(__file__).parents[1] / "params.yaml"
SIDE = 8192  # of the square matrices by which the device is measured


@dataclass(frozen=True)
class Shape:
    """Entries of a Qwen2 configuration, and how much one measurement takes: rows of `prompt` and `response` tokens."""

    entries: dict[str, Any]
    rows: int
    prompt: int
    response: int
    adapters: bool = False


def qwen2(hidden: int, inner: int, layers: int, heads: int, key_heads: int, words: int, tied: bool) -> dict[str, Any]:
    """The entries by the names that transformers has for them."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": words,
        "tie_word_embeddings": tied,
    }


TINY = qwen2(16, 32, 2, 2, 1, 64, True)
SHAPES = {
    "0.5b": Shape(qwen2(896, 4864, 24, 14, 2, 151_936, True), rows=64, prompt=128, response=256),
    "7b": Shape(qwen2(3584, 18_944, 28, 28, 4, 152_064, False), rows=64, prompt=128, response=256, adapters=True),
    "tiny": Shape(TINY, rows=4, prompt=6, response=5),
    "tiny_adapters": Shape(TINY, rows=4, prompt=6, response=5, adapters=True),
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.5b", "7b"])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the program itself")
    parser.add_argument("--runs", type=int, default=3, help="of each kind of work, after one that is not counted")
    parser.add_argument("--out", type=Path, default=FILE)
    asked = parser.parse_args(words)
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: no CUDA device here; --device cpu --shapes tiny tries the program itself")
    compute = Compute(torch.device(asked.device), torch.bfloat16, forward_tokens=16_384, cache_tokens=65_536)
    found: dict[str, Any] = {"machine": machine(compute.device), "flop_per_second": products(compute.device)}
    for name in asked.shapes:
        found[name] = measured(SHAPES[name], compute, found["flop_per_second"], asked.runs)
        print(f"{name}: {json.dumps(found[name], indent=1)}", flush=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, str]:
    """The card and the versions."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"card": card, "cuda": str(torch.version.cuda), "torch": torch.__version__, "transformers": transformers.__version__}


def products(device: torch.device) -> float:
    """FLOP a second of square matrix products in bfloat16, the best of five."""
    side = SIDE if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return max(2 * side**3 / seconds(lambda: left @ right, device) for _ in range(5))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of some work, whatever it queued on the device included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measured(shape: Shape, compute: Compute, limit: float, runs: int) -> dict[str, dict[str, float]]:
    """Of each kind of work: tokens a second, the share of `limit`, and the most memory, GiB (0 without CUDA)."""
    model = build(shape).to(compute.device)
    batch = collate(*texts(shape), 0).to(compute.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = {}
    for name, (work, tokens, flop) in workloads(shape, model, batch, compute).items():
        if compute.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(compute.device)
        work()
        taken = min(seconds(work, compute.device) for _ in range(runs))
        peak = torch.cuda.max_memory_allocated(compute.device) if compute.device.type == "cuda" else 0
        found[name] = {
            "tokens_per_second": tokens / taken,
            "share_of_products": flop * parameters / taken / limit,
            "peak_gib": peak / 2**30,
        }
    return found


def build(shape: Shape) -> Qwen2ForCausalLM:
    """The model, of random weights, float32."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**shape.entries, max_position_embeddings=4096)).eval()


def texts(shape: Shape) -> tuple[list[list[int]], list[list[int]]]:
    """Random prompts and responses, all of one length."""
    ids = torch.randint(
        shape.entries["vocab_size"], (shape.rows, shape.prompt + shape.response), generator=torch.Generator().manual_seed(0)
    )
    return ids[:, : shape.prompt].tolist(), ids[:, shape.prompt :].tolist()


Work = tuple[Callable[[], object], int, float]  # what is done, its tokens, FLOP a parameter


def workloads(shape: Shape, model: Any, batch: Batch, compute: Compute) -> dict[str, Work]:
    """Fine-tuning (forward and backward), scoring, rollouts that end at no token, and a PPO update from rollout to step."""
    policy, frozen = roles(shape, model)
    read, drawn = batch.ids.numel(), shape.rows * shape.response
    train = 4 if shape.adapters else 6
    prompts = batch.ids[:, : shape.prompt].tolist()
    requests = [Request(prompt, str(row)) for row, prompt in enumerate(prompts)]
    drawn_at_once: dict[str, Any] = {"batch_size": shape.rows, "minibatch_size": shape.rows, "max_new_tokens": shape.response}
    params = parse(yaml.safe_load(PARAMS.read_text(encoding="utf-8")))
    update, ppo = replace(params.srppo, **drawn_at_once, epochs=2, kl_stop=None, critic="shared"), None

    def sample_all() -> object:
        return sample(policy, requests, seed="0", end=-1, max_new_tokens=shape.response, compute=compute)

    def fine_tune() -> object:
        policy.zero_grad()
        return train_step(policy, batch, compute)

    def one_update() -> object:
        nonlocal ppo
        if ppo is None:  # not before: its critic and moments would be counted as the other works'
            pool = Prompts(
                prompts,
                [str(row) for row in range(len(prompts))],
                -1,
                torch.zeros(shape.entries["vocab_size"]).long(),
                ("all",),
            )
            ppo = SelfRewardingPPO(policy, frozen, pool, update, seed="0", compute=compute)
        ppo.config = replace(update, iterations=ppo.iteration + 1)
        return ppo.train(Recorder())

    scored = 2 * (len(frozen) + 2) * read  # the frozen models, the policy and the critic
    return {
        "sft": (fine_tune, read, train * read),
        "scoring": (lambda: score(frozen["base"], batch, compute), read, 2 * read),
        "rollouts": (sample_all, drawn, 2 * read),
        "ppo": (one_update, drawn, 2 * read + scored + train * read * update.epochs),
    }


def roles(shape: Shape, model: Any) -> tuple[Any, dict[str, Any]]:
    """The policy and the two frozen scorers: models of their own, or adapters on one trunk."""
    if not shape.adapters:
        frozen = {"sft": freeze(build(shape).to(model.device)), "base": freeze(build(shape).to(model.device))}
        return model, frozen
    from apprentice.lora import Trunk

    trunk = Trunk(model, LoRAConfig(rank=16, alpha=32, targets="all-linear"), seed="0", origin={})
    return trunk.train(), {"sft": freeze(trunk.train()), "base": trunk.role()}


if __name__ == "__main__":
    main()
