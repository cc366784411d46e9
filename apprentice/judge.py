"""The pairwise judge of Pairwise-RL (2504.04950): a causal language model that says whether the first of two answers is better.

Judged is a chat, so that any chat template takes it: the prompt, the first answer, the prompt again, the second answer, the
question. The preference is the logit of the label for yes minus that for no, in the place of the reply. Every pair is judged
in both orders, averaged in logit space: an additive position bias cancels. How the paper words the question, cuts long
answers and weighs the two orders is not known; these are our choices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apprentice.calibration import flip_rate, pair_accuracy
from apprentice.compute import CPU, Compute
from apprentice.demonstrations import Message, Prompt
from apprentice.epochs import Figures, Trained, train_epochs
from apprentice.recorder import Recorder
from apprentice.rewards import ranker_reward
from apprentice.sections import EpochsConfig
from apprentice.sharding import gathered
from apprentice.tokens import JUDGEMENTS, encode_responses, template_pieces

QUESTION = "Is the first answer better than the second? Reply yes or no."
Triple = tuple[Prompt, str, str]  # prompt, first answer, second answer
RewardForm = Literal["probability", "logit"]


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt. `source`: where the pair came from, e.g. demonstrations, verified, preferences."""

    prompt: Prompt
    chosen: str
    rejected: str
    source: str


@dataclass(frozen=True)
class Judge:
    """A model that judges, its tokenizer, and the most tokens of one question (at most what the model has positions for)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    compute: Compute = CPU

    @cached_property
    def labels(self) -> tuple[int, int]:
        """Token ids of yes and no."""
        return label_ids(self.tokenizer)


def label_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Token ids of yes and no: the reserved tokens, else the tokens of "Yes" and "No", with or without a space before them.

    Raises ValueError when the tokenizer has no such single tokens.
    """
    vocabulary = tokenizer.get_vocab()
    yes, no = (f"<{name}>" for name in JUDGEMENTS)
    if yes in vocabulary and no in vocabulary:
        return vocabulary[yes], vocabulary[no]
    for space in ("", " "):
        found = tokenizer([f"{space}Yes", f"{space}No"], add_special_tokens=False)["input_ids"]
        if [len(ids) for ids in found] == [1, 1] and found[0] != found[1] and [tokenizer.unk_token_id] not in found:
            return found[0][0], found[1][0]
    raise ValueError(
        f"the judge's labels: expected {yes} and {no}, or Yes and No, as single tokens of the tokenizer; it has neither: add "
        "the reserved tokens or choose another checkpoint"
    )


def judge_chat(prompt: Prompt, first: str, second: str) -> list[Message]:
    """The chat that asks which answer is better. A prompt that is a chat comes whole before the first answer, and from its
    first user message on before the second. Raises ValueError for a chat without a user message.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    start = next((i for i, message in enumerate(turns) if message["role"] == "user"), None)
    if start is None:
        raise ValueError(f"the judge: expected a prompt with a user message, got {turns}")
    answers = [{"role": "assistant", "content": answer} for answer in (first, second)]
    return [*turns, answers[0], *turns[start:], answers[1], {"role": "user", "content": QUESTION}]


def judge_prompts(tokenizer: PreTrainedTokenizerBase, triples: Sequence[Triple], max_tokens: int) -> list[list[int]]:
    """Token ids of the judge's questions, up to where the label stands.

    Texts are encoded as text, apart from the template. Where a question is longer than `max_tokens`, the ends of the
    answers are cut, the longer one's first, so that both keep equally many tokens or are whole, in either order. Raises
    ValueError when what is around the answers leaves no room for them.
    """
    chats = [judge_chat(*triple) for triple in triples]
    contents = iter(encode_responses(tokenizer, [message["content"] for chat in chats for message in chat]))
    frames: dict[tuple[str, ...], list[list[int]]] = {}
    prompts = []
    for (prompt, _, _), chat in zip(triples, chats, strict=True):
        roles = tuple(message["role"] for message in chat)
        if roles not in frames:
            frames[roles] = _frame(tokenizer, roles)
        parts = [next(contents)[:-1] for _ in chat]  # without the end token of a response
        first, second = 1 if isinstance(prompt, str) else len(prompt), len(chat) - 2
        around = sum(map(len, [*frames[roles], *parts])) - len(parts[first]) - len(parts[second])
        parts[first], parts[second] = _cut(parts[first], parts[second], max_tokens - around)
        prompts.append([token for pair in zip([[], *parts], frames[roles], strict=True) for ids in pair for token in ids])
    return prompts


def _frame(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> list[list[int]]:
    """Token ids before, between and after contents of these roles. Neighbours of one role share a turn, a line break apart."""
    (line,) = tokenizer(["\n"], add_special_tokens=False)["input_ids"]
    if tokenizer.chat_template is None:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [start, *[line] * len(roles)]
    pieces = iter(template_pieces(tokenizer, [role for role, _ in groupby(roles)]))
    return [line if role == before else next(pieces) for before, role in zip([None, *roles], [*roles, None], strict=True)]


def _cut(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Both answers, cut at their ends to `room` tokens in all: first the longer one, in the end both to half of the room."""
    if len(first) + len(second) > room and room < 2:
        raise ValueError(
            f"the judge: the prompt, twice, and the question leave room for {room} tokens of the answers; expected 2 at least: "
            "raise the judge's limit of tokens or leave out such prompts"
        )
    half = room // 2
    return first[: max(half, room - len(second))], second[: max(half, room - len(first))]


def in_micro_batches(forward: Callable[[list[int]], Tensor], lengths: Sequence[int], compute: Compute) -> Tensor:
    """[N] results, with gradient, of a forward pass that takes row numbers and returns one number a row.

    Raises ValueError for no rows.
    """
    groups = list(compute.padded_batches(lengths))
    if not groups:
        raise ValueError("in_micro_batches: expected at least one row to score, got none")
    order = torch.tensor([row for rows in groups for row in rows])
    joined = torch.cat([compute.keep(partial(forward, rows)).to(compute.device) for rows in groups])
    return joined[order.argsort().to(joined.device)]


def pair_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], labels: tuple[int, int], compute: Compute = CPU
) -> Tensor:
    """[N] logits of P(first answer is better): logit of yes minus logit of no after each prompt, fp32, with gradient.

    Raises ValueError for a model in training mode.
    """
    if model.training:
        raise ValueError("pair_logits: the model is in training mode; call .eval(), gradients flow all the same")

    def forward(rows: list[int]) -> Tensor:
        ids = pad_sequence([torch.tensor(prompts[row]) for row in rows], batch_first=True).to(compute.device)
        last = torch.tensor([len(prompts[row]) - 1 for row in rows], device=compute.device)
        positions, place = last.unique(return_inverse=True)
        with compute.autocast():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
        at_last: Tensor = logits[torch.arange(len(rows), device=compute.device), place].float()
        return at_last[:, labels[0]] - at_last[:, labels[1]]

    with gathered(model):
        return in_micro_batches(forward, [len(ids) for ids in prompts], compute)


@torch.no_grad()
def order_logits(judge: Judge, triples: Sequence[Triple]) -> tuple[Tensor, Tensor]:
    """[N] logits that the answer shown first is better, in the order given and in the other order."""
    both = [*triples, *((prompt, second, first) for prompt, first, second in triples)]
    prompts = judge_prompts(judge.tokenizer, both, judge.max_tokens)
    logits = pair_logits(judge.model, prompts, judge.labels, judge.compute)
    return logits[: len(triples)], logits[len(triples) :]


def win_logits(judge: Judge, triples: Sequence[Triple]) -> Tensor:
    """[N] logits s of P(first answer beats second | prompt) = sigmoid(s), both orders averaged: s(a, b) = -s(b, a)."""
    return ranker_reward(*order_logits(judge, triples))


def pairwise_reward(logits: Tensor, form: RewardForm) -> Tensor:
    """[N] rewards of responses from their logits of beating the prompt's anchor: the probability (the paper) or the logit."""
    return torch.sigmoid(logits) if form == "probability" else logits


def ranking_loss(margins: Tensor, count: float) -> Tensor:
    """-log sigmoid(margin), summed over margins [N] and divided by the `count` of the whole batch."""
    return -logsigmoid(margins).sum() / count


def train_judge(
    judge: Judge, pairs: Sequence[PreferencePair], config: EpochsConfig, *, seed: str, recorder: Recorder
) -> Trained:
    """Train the judge's model in place on pairs, each in both orders in the same step.

    Figures of a step: loss (of single orders), accuracy (of the average of both orders), flip_rate.
    """
    limit = judge.max_tokens
    chosen_first = judge_prompts(judge.tokenizer, [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs], limit)
    rejected_first = judge_prompts(judge.tokenizer, [(pair.prompt, pair.rejected, pair.chosen) for pair in pairs], limit)

    def step(rows: list[int]) -> Figures:
        return judge_step(judge, [chosen_first[row] for row in rows], [rejected_first[row] for row in rows])

    return train_epochs(judge.model, len(pairs), step, config, seed=seed, recorder=recorder)


def judge_step(judge: Judge, chosen_first: Sequence[list[int]], rejected_first: Sequence[list[int]]) -> Figures:
    """Gather the gradient of the mean loss over both orders of some pairs, micro-batch by micro-batch; returns its figures."""
    prompts, size = [*chosen_first, *rejected_first], len(chosen_first)
    logits = torch.zeros(2 * size, device=judge.compute.device)
    signs = torch.ones_like(logits)
    signs[size:] = -1.0
    total = 0.0
    for rows in judge.compute.padded_batches([len(ids) for ids in prompts]):
        part = pair_logits(judge.model, [prompts[row] for row in rows], judge.labels, judge.compute)
        loss = ranking_loss(signs[rows] * part, 2 * size)
        loss.backward()
        logits[rows] = part.detach()
        total += float(loss.detach())
    first, second = logits[:size], logits[size:]
    return {"loss": total, "accuracy": pair_accuracy(ranker_reward(first, second)), "flip_rate": flip_rate(first, second)}
