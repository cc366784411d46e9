"""One sampler for every stage: batched, cached, log-probabilities recorded on the way, finished rows leave the batch.

A draw is keyed by (seed, prompt id, sample index, position) and inverts the CDF, so it depends on no batch mate, resume point
or number of processes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from apprentice.compute import CPU, Compute
from apprentice.logps import by_rows, token_logps
from apprentice.sharding import gathered
from apprentice.tokens import Batch, collate

_LEAVE_SHARE = 0.1  # finished rows leave once they are this share of the batch: each leaving copies the cache


@dataclass(frozen=True)
class Request:
    """What to sample from: prompt ids, the prompt's key, and which of its samples this is."""

    prompt: Sequence[int]
    key: str
    sample: int = 0


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. batch: prompts and responses. logps: [B, T] of the sampling distribution. ended: [B] bool, the end
    token came before the limit; it is then the last response token. keys: the prompt's key of each row."""

    batch: Batch
    logps: Tensor
    ended: Tensor
    keys: Sequence[str]

    def response_ids(self) -> list[list[int]]:
        """Token ids of each response, the end token left out where there is one."""
        lengths = (self.batch.response_lengths - self.ended.long()).tolist()
        return [row[:n] for row, n in zip(self.batch.responses.tolist(), lengths, strict=True)]


def uniforms(keys: Tensor, position: int) -> Tensor:
    """[B] int64 row keys to [B] float64 in [0, 1): splitmix64 of key and position, the same on every device."""
    x = keys + _signed((position + 1) * 0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return _shift(x ^ _shift(x, 31), 11).double() / 2**53


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def row_key(seed: str, request: Request) -> int:
    """The 64-bit key of one row's draws."""
    text = f"{seed}\0{request.key}\0{request.sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Invert the CDF: logits [B, V], uniform [B] to token ids [B].

    Probabilities are summed as whole multiples of 2^-31: exact in any order, where CUDA has no deterministic sum of floats.
    """
    return by_rows(_inverted, logits, uniform)


def _inverted(logits: Tensor, uniform: Tensor) -> Tensor:
    cdf = logits.float().softmax(-1).mul_(2**31).long().cumsum_(-1)
    total = cdf[:, -1]
    threshold = torch.minimum((uniform * total).long(), total - 1)
    return torch.searchsorted(cdf, threshold[:, None], right=True).squeeze(-1)


def sample(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    seed: str,
    end: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    compute: Compute = CPU,
) -> Rollout:
    """Sample one response for each request (temperature 0: greedy).

    Requests with the same prompt share one pass over it. Raises ValueError for an empty list.
    """
    if not requests:
        raise ValueError("sample: expected at least one request, got none")
    responses: list[list[int]] = [[]] * len(requests)
    logps: list[Tensor] = [torch.empty(0)] * len(requests)
    widths = [len(request.prompt) + max_new_tokens for request in requests]
    chunks = list(compute.padded_batches(widths, compute.cache_tokens))
    makes = [
        partial(_decode, model, [requests[row] for row in rows], seed, end, max_new_tokens, temperature, compute)
        for rows in chunks
    ]
    with gathered(model):
        for rows, (tokens, scores, lengths) in zip(chunks, compute.pieces(makes), strict=True):
            for row, ids, values, n in zip(rows, tokens.tolist(), scores, lengths.tolist(), strict=True):
                responses[row], logps[row] = ids[:n], values[:n].clone()
    batch = collate([request.prompt for request in requests], responses, end)
    ended = torch.tensor([ids[-1] == end for ids in responses])
    padded = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)
    device = compute.device
    return Rollout(batch.to(device), padded.to(device), ended.to(device), [request.key for request in requests])


@torch.inference_mode()  # here and not around `sample`, so that a rollout can be trained on
def _decode(
    model: PreTrainedModel,
    requests: list[Request],
    seed: str,
    end: int,
    limit: int,
    temperature: float,
    compute: Compute,
) -> list[Tensor]:
    """Token ids (end token included) [B, T], their log-probabilities [B, T] and lengths [B] for one chunk, on the CPU."""
    device, count = compute.device, len(requests)
    logits, cache, attended, position = _prefill(model, requests, compute)
    keys = torch.tensor([row_key(seed, request) for request in requests], device=device)
    tokens = torch.full((count, limit), end, device=device)
    logps = torch.zeros(count, limit, device=device)
    lengths = torch.full((count,), limit, device=device)
    live = torch.arange(count, device=device)
    for step in range(limit):
        scaled = logits.float() if temperature in (0.0, 1.0) else logits.float() / temperature
        token = draw(scaled, uniforms(keys[live], step)) if temperature else scaled.argmax(-1)
        going = lengths[live] == limit
        tokens[live[going], step] = token[going]
        logps[live[going], step] = token_logps(scaled, token)[going]
        lengths[live[going & (token == end)]] = step + 1
        going = lengths[live] == limit
        if step == limit - 1 or not bool(going.any()):
            break
        if int((~going).sum()) >= _LEAVE_SHARE * len(live):
            stay = going.nonzero().squeeze(-1)
            live, token, attended, position = live[stay], token[stay], attended[stay], position[stay]
            cache.batch_select_indices(stay)
        attended = torch.cat([attended, attended.new_ones(len(live), 1)], 1)
        with compute.autocast():
            logits = model(
                input_ids=token[:, None],
                attention_mask=attended,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        position = position + 1
    longest = int(lengths.max())
    return [tokens[:, :longest].cpu(), logps[:, :longest].cpu(), lengths.cpu()]


def _prefill(model: PreTrainedModel, requests: list[Request], compute: Compute) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
    """One pass over the distinct prompts, left-padded, then one row of the cache for each request."""
    places: dict[tuple[int, ...], int] = {}
    rows = [places.setdefault(tuple(request.prompt), len(places)) for request in requests]
    prompts = list(places)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=compute.device)
    attended = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=compute.device)
    cache = model.new_cache(_new_cache) if hasattr(model, "new_cache") else _new_cache(model)
    with compute.autocast():
        logits = model(
            input_ids=ids,
            attention_mask=attended,
            position_ids=(attended.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
    index = torch.tensor(rows, device=compute.device)
    cache.batch_select_indices(index)
    return logits[index], cache, attended[index], attended.sum(1)[index]


def _new_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)
