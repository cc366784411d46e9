"""What the machine can do, matrix products and memory traffic, and how much of it training, scoring and decoding reach.

Products are counted by torch's own counter. Decoding one row at a time is bound by memory: each token reads every weight once,
and the share is of the bandwidth; the others' is of the products a second.
"""

import math
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from apprentice.linear import half_unused, use_onednn
from apprentice.policy import freeze
from apprentice.policy import score as score_batch
from apprentice.sampling import Request, sample
from apprentice.sft import train_step
from benchmarks.measure import Side, Worker
from benchmarks.results import Results
from benchmarks.shapes import computing, make, material
from benchmarks.worker import Figures, Prepare

ROWS, TOKENS = 64, 32
SIDE = 1024  # of the square matrices
FLOATS = 2**26  # of the array copied: 256 MiB, above any cache


def family(results: Results, runs: int) -> None:
    """The machine's two limits, then each kind of work against its own, on both shapes."""
    limits = _best("machine", "", runs)
    results.figure("limit/machine", limits)
    for shape in ("tiny", "wide"):
        make(shape)
        for work in ("train", "score", "decode_64", "decode_1"):
            found = _best(work, shape, runs)
            bound = "bytes_per_second" if work == "decode_1" else "flop_per_second"
            results.figure(f"limit/{shape}/{work}", {bound: found[bound], "share": found[bound] / limits[bound]})


def _best(work: str, shape: str, runs: int) -> Figures:
    """The highest figures over the runs: other work on the machine can only lower them."""
    with Worker(Side(f"benchmarks.limit:{work.split('_')[0]}", _options(work, shape))) as worker:
        given = [worker.run(repeat)["figures"] for repeat in range(runs + 1)]
    return {name: max(one[name] for one in given) for name in given[0]}


def _options(work: str, shape: str) -> dict[str, object]:
    if work == "machine":
        return {}
    return {"shape": shape, "rows": int(work.split("_")[1])} if "_" in work else {"shape": shape}


def machine() -> Prepare:
    """Products and copies, CPU time of each."""
    computing()
    product = torch.nn.Linear(SIDE, SIDE, bias=False).requires_grad_(False)
    if half_unused():
        use_onednn(product)
    right = torch.randn(SIDE, SIDE)
    source, target = torch.zeros(FLOATS), torch.zeros(FLOATS)

    def work() -> Figures:
        multiply, copy = seconds(lambda: product(right)), seconds(lambda: target.copy_(source))
        return {"flop_per_second": 2 * SIDE**3 / multiply, "bytes_per_second": 2 * 4 * FLOATS / copy}

    return lambda repeat: work


def train(shape: str) -> Prepare:
    """A training step: forward and backward."""
    given, compute = material(shape), computing()
    model, batch = given.model("sft"), given.demonstrated(ROWS)
    return _products(lambda: train_step(model, batch, compute))


def score(shape: str) -> Prepare:
    """Scoring with a frozen model."""
    given, compute = material(shape), computing()
    model, batch = freeze(given.model("sft")), given.demonstrated(ROWS)
    return _products(lambda: score_batch(model, batch, compute))


def decode(shape: str, rows: int) -> Prepare:
    """Decoding `TOKENS` tokens of each row; bytes: the weights, once a step."""
    given, compute = material(shape), computing()
    model = given.model("sft")
    requests = [Request(prompt, str(i)) for i, prompt in enumerate(given.prompts[:rows])]
    weights = sum(4 * parameter.numel() for parameter in model.parameters())

    def draw() -> object:
        return sample(model, requests, seed="0", end=-1, max_new_tokens=TOKENS, compute=compute)

    flop = _flop(draw)

    def work() -> Figures:
        taken = seconds(draw)
        return {"flop_per_second": flop / taken, "bytes_per_second": weights * TOKENS / taken}

    return lambda repeat: work


def _products(work: Callable[[], object]) -> Prepare:
    flop = _flop(work)
    return lambda repeat: lambda: {"flop_per_second": flop / seconds(work)}


def _flop(work: Callable[[], object]) -> int:
    onednn = {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]}
    with FlopCounterMode(display=False, custom_mapping=onednn) as counter:
        work()
    return int(counter.get_total_flops())


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one go, averaged over as many as fill a fifth of a second."""
    began, count = time.process_time(), 0
    while not count or time.process_time() - began < 0.2:
        work()
        count += 1
    return (time.process_time() - began) / count
