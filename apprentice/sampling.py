"""One sampler for every stage: batched, cached, log-probabilities recorded on the way, finished rows leave the batch."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apprentice.attention import attention_to_slots
from apprentice.compute import CPU, Compute
from apprentice.decoding import Draws, Rows, prefill, record, uniforms
from apprentice.layers import weights_as_cast
from apprentice.masking import masked_mean
from apprentice.policy import score
from apprentice.replay import stepping
from apprentice.sharding import gathered
from apprentice.tokens import Batch, collate

if TYPE_CHECKING:
    from apprentice.engine import Engine

LEAVE_SHARE = {"cpu": 0.1, "cuda": 0.5, "mps": 0.1}  # finished rows leave once they are this share: it copies the cache
STRAYED = 0.5  # nats a token between the log-probabilities of model and vLLM, above which they are not of one model
SLOTS = {"cpu": 16, "cuda": 256, "mps": 16}  # of the cache, added whenever all are full: it copies the cache


@dataclass(frozen=True)
class Request:
    """What to sample from: prompt ids, the prompt's key, and which of its samples this is."""

    prompt: Sequence[int]
    key: str
    sample: int = 0


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. batch: prompts and responses. logps: [B, T] of the sampling distribution. ended: [B] bool, the end
    token came before the limit; it is then the last response token. keys: the prompt's key of each row. sampler_logps: the
    same as `logps` as another program computed them that drew the tokens, or None."""

    batch: Batch
    logps: Tensor
    ended: Tensor
    keys: Sequence[str]
    sampler_logps: Tensor | None = None

    def response_ids(self) -> list[list[int]]:
        """Token ids of each response, the end token left out where there is one."""
        lengths = (self.batch.response_lengths - self.ended.long()).tolist()
        return [row[:n] for row, n in zip(self.batch.responses.tolist(), lengths, strict=True)]


def row_key(seed: str, request: Request) -> int:
    """The 64-bit key of one row's draws."""
    text = f"{seed}\0{request.key}\0{request.sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


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
    chunks, draws = compute.sampling_batches(widths), Draws(end, temperature)
    with _decoder(model, compute) as decode:
        makes = [partial(decode, [requests[row] for row in rows], seed, draws, max_new_tokens, compute) for rows in chunks]
        for rows, (tokens, scores, lengths) in zip(chunks, compute.pieces(makes), strict=True):
            for row, ids, values, n in zip(rows, tokens.tolist(), scores, lengths.tolist(), strict=True):
                responses[row], logps[row] = ids[:n], values[:n].clone()
    batch = collate([request.prompt for request in requests], responses, end)
    ended = torch.tensor([ids[-1] == end for ids in responses])
    padded = torch.nn.utils.rnn.pad_sequence(logps, batch_first=True)
    device, keys = compute.device, [request.key for request in requests]
    batch, padded, ended = batch.to(device), padded.to(device), ended.to(device)
    if compute.sampler == "own":
        return Rollout(batch, padded, ended, keys)
    own = score(model, batch, compute, temperature or 1.0)
    if (strayed := float(masked_mean((own - padded).abs(), batch.mask))) > STRAYED:
        raise RuntimeError(
            f"vLLM's log-probabilities are {strayed:.2g} nats a token from those of the model, where rounding makes less than "
            f"{STRAYED}: it samples from another model; set compute.sampler: own"
        )
    return Rollout(batch, own, ended, keys, sampler_logps=padded)


@contextmanager
def _decoder(model: PreTrainedModel, compute: Compute) -> Iterator[Callable[..., list[Tensor]]]:
    """What makes of requests token ids (end token included) [B, T], log-probabilities [B, T] and lengths [B], on the CPU."""
    if compute.sampler == "vllm":
        from apprentice.engine import engine_with

        yield partial(_by_engine, cache(partial(engine_with, model, compute)))
    else:
        with gathered(model), weights_as_cast(model, compute), attention_to_slots(model, compute):
            yield partial(_decode, model)


def _by_engine(
    engine: "Callable[[], Engine]", requests: list[Request], seed: str, draws: Draws, limit: int, compute: Compute
) -> list[Tensor]:
    prompts, seeds = [request.prompt for request in requests], [row_key(seed, request) % 2**63 for request in requests]
    drawn = engine().draw(prompts, seeds, end=draws.end, max_new_tokens=limit, temperature=draws.temperature)
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    lengths = torch.tensor([len(ids) for ids in drawn.ids])
    ids = pad([torch.tensor(ids) for ids in drawn.ids], padding_value=draws.end)
    return [ids, pad([torch.tensor(logps) for logps in drawn.logps]), lengths]


@torch.inference_mode()  # here and not around `sample`, so that a rollout can be trained on
def _decode(
    model: PreTrainedModel, requests: list[Request], seed: str, draws: Draws, limit: int, compute: Compute
) -> list[Tensor]:
    count = len(requests)
    tokens, logps = torch.full((count, limit), draws.end), torch.zeros(count, limit)
    lengths = torch.zeros(count, dtype=torch.long)

    def keep(rows: Rows) -> None:
        for all_rows, some in ((tokens, rows.tokens), (logps, rows.logps), (lengths, rows.lengths)):
            all_rows[rows.number.cpu()] = some.cpu()

    with compute.autocast():
        rows = _begin(model, requests, seed, draws, limit, compute)
        step = stepping(model, rows, draws, compute)
        width = int(rows.place)
        for number in range(1, limit):
            going = ~rows.ended
            left = int(going.sum())
            if not left:
                break
            if len(going) - left >= LEAVE_SHARE[compute.device.type] * len(going):
                keep(rows)
                rows.stay(going.nonzero().squeeze(-1))
            if width + number > rows.attended.size(1):
                rows.widen(width + _room(number, limit, compute))
            step()
        keep(rows)
    longest = int(lengths.max())
    return [tokens[:, :longest], logps[:, :longest], lengths]


def _room(number: int, limit: int, compute: Compute) -> int:
    """Slots for responses, before the step of that number: the last token drawn needs none."""
    return min(limit, number + SLOTS[compute.device.type]) - 1


def _begin(model: PreTrainedModel, requests: list[Request], seed: str, draws: Draws, limit: int, compute: Compute) -> Rows:
    """A row for each request, its first token drawn: each distinct prompt is read once."""
    places: dict[tuple[int, ...], int] = {}
    count, device = len(requests), compute.device
    index = torch.tensor([places.setdefault(tuple(request.prompt), len(places)) for request in requests], device=device)
    logits, attended, cache = prefill(model, list(places), _room(1, limit, compute), compute)
    keys = torch.tensor([row_key(seed, request) for request in requests], device=device)
    rows = Rows(
        number=torch.arange(count, device=device),
        uniforms=uniforms(keys, torch.arange(limit, device=device)),
        token=torch.zeros(count, dtype=torch.long, device=device),
        position=attended.sum(1)[index],
        ended=torch.zeros(count, dtype=torch.bool, device=device),
        lengths=torch.zeros(count, dtype=torch.long, device=device),
        tokens=torch.full((count, limit), draws.end, device=device),
        logps=torch.zeros(count, limit, device=device),
        attended=attended[index],
        place=torch.tensor([max(map(len, places))], device=device),
        step=torch.zeros(1, dtype=torch.long, device=device),
        cache=cache,
    )
    record(rows, logits[index], draws)
    if len(places) < count:
        for number, part in enumerate(cache):
            cache[number] = part[index]
    return rows
