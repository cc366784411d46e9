"""Text to token ids: the tiny word tokenizer, the chat template, and the padded batch every later step takes.

Prompt and response are tokenised apart, so no token spans their border. User text is always encoded as text: a special
token written in it ends no turn and forges no role. A trained response ends in exactly one end token, which counts as part
of the response.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from apprentice.demonstrations import QUALITIES, Message, Prompt
from apprentice.masking import length_mask

ROLES = ("system", "user", "assistant")
JUDGEMENTS = ("yes", "no")
SPECIAL = ("<pad>", "<bos>", "<eos>", *(f"<{name}>" for name in (*ROLES, *QUALITIES, *JUDGEMENTS)))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message.role + '>' }}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHOWN = 100  # characters of a text in an error
_MARK = "\ue000"  # a private-use character that stands for a content while its template is rendered


def train_word_tokenizer(texts: Iterable[str], max_words: int, known: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are whole words split at whitespace.

    The vocabulary is `known`, then the most frequent words of `texts`, `max_words` in all; anything else is `<unk>`, the names
    of reserved tokens (roles, quality classes, judge labels) written in a text included. These come after the words.
    """
    counts = Counter(word for text in texts for word in text.split())
    for word in (*known, "<unk>", *SPECIAL):
        counts.pop(word, None)
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    words = ["<unk>", *dict.fromkeys([*known, *frequent])][: max_words + 1]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts, up to where the response begins: by the chat template, else as plain text.

    Raises ValueError for a prompt that cannot be encoded without forging a turn, or that the chat template refuses.
    """
    chats = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    if not chats:
        return []
    if tokenizer.chat_template is None:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return [start + ids for ids in _encode_text(tokenizer, ["\n".join(m["content"] for m in chat) for chat in chats])]
    rendered = _rendered(tokenizer, chats)
    encoded: list[list[int]] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    reserved = reserved_tokens(tokenizer)
    frames: dict[tuple[str, ...], list[int] | None] = {}
    for row, chat in enumerate(chats):
        roles = tuple(message["role"] for message in chat)
        if roles not in frames:
            frames[roles] = _around(tokenizer, roles)
        written = any(text in message["content"] for message in chat for text in reserved.values())
        if written or _forged(encoded[row], frames[roles], reserved):
            encoded[row] = _encode_around(tokenizer, chat)
    return encoded


def _rendered(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]]) -> list[str]:
    try:
        texts: list[str] = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the tokenizer's chat template refuses it: {error}") from error
    return texts


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of one prompt."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_responses(tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of responses, each with exactly one end token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token; choose a checkpoint that has one")
    return [[*ids, tokenizer.eos_token_id] for ids in _encode_text(tokenizer, responses)]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Token ids of one response, the end token included."""
    return encode_responses(tokenizer, [response])[0]


def reserved_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids, with their texts, that no user text may yield: special tokens, and others by which the chat template marks turns.

    A checkpoint may add its role markers as tokens that are not special; what it does not mark turns by, such as whitespace
    or `<think>`, stays text like any other. The unknown token is what unknown text yields.
    """
    added = tokenizer.added_tokens_decoder
    ids = {token for token, about in added.items() if about.special}
    if tokenizer.chat_template is not None:
        ids |= added.keys() & set(_around(tokenizer, ["user"]) or [])
    return {token: added[token].content for token in sorted(ids) if token != tokenizer.unk_token_id}


def _forged(encoded: list[int], frame: list[int] | None, reserved: dict[int, str]) -> bool:
    """Whether a chat has other reserved ids than its template, say by a normaliser that makes one out of other characters."""
    return frame is not None and [t for t in encoded if t in reserved] != [t for t in frame if t in reserved]


def _around(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[int] | None:
    """Ids around contents of these roles; None for a template that cannot be taken apart."""
    try:
        return [token for piece in template_pieces(tokenizer, roles) for token in piece]
    except ValueError:
        return None


def _encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, none of them reserved. Raises ValueError where that cannot be."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    reserved = reserved_tokens(tokenizer)
    for row, text in enumerate(texts):
        if not reserved.keys().isdisjoint(encoded[row]):
            encoded[row] = _encode_in_parts(tokenizer, text, reserved)
    return encoded


def _encode_in_parts(tokenizer: PreTrainedTokenizerBase, text: str, reserved: dict[int, str]) -> list[int]:
    """Token ids of a text cut after the first character of each reserved token's text, which then is whole nowhere."""
    cuts = "|".join(f"(?<={re.escape(mark[0])})(?={re.escape(mark[1:])})" for mark in reserved.values() if len(mark) > 1)
    parts = [part for part in re.split(cuts, text) if part]
    encoded = tokenizer(parts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = [token for part in encoded for token in part]
    if found := reserved.keys() & set(ids):
        shown = repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
        raise ValueError(f"no encoding without the reserved token {reserved[min(found)]!r}; leave the row out: {shown}")
    return ids


def template_pieces(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> list[list[int]]:
    """Token ids of the chat template before, between and after the contents of messages of these roles, the contents left out.

    Raises ValueError for a template that does not place every message exactly once.
    """
    hollow = [{"role": role, "content": _MARK} for role in roles]
    texts = tokenizer.apply_chat_template(hollow, tokenize=False, add_generation_prompt=True).split(_MARK)
    if len(texts) != len(roles) + 1:
        raise ValueError(
            "this tokenizer's chat template does not place every message exactly once, so contents that may hold the text of a "
            f"special token cannot be encoded safely between its pieces; roles: {', '.join(roles)}"
        )
    pieces: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return pieces


def _encode_around(tokenizer: PreTrainedTokenizerBase, chat: list[Message]) -> list[int]:
    """Token ids of a chat, template and contents encoded apart."""
    start, *pieces = template_pieces(tokenizer, [message["role"] for message in chat])
    contents = _encode_text(tokenizer, [message["content"] for message in chat])
    return start + [token for pair in zip(contents, pieces, strict=True) for ids in pair for token in ids]


def token_classes(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[Tensor, tuple[str, ...]]:
    """Class of each of `size` token ids ([V], long) and the class names: number, word, symbol, eos."""
    names = ("number", "word", "symbol", "eos")
    classes = torch.full((size,), names.index("symbol"))
    for token in range(min(size, len(tokenizer))):
        text = tokenizer.decode([token])
        if token == tokenizer.eos_token_id:
            classes[token] = names.index("eos")
        elif any(c.isdigit() for c in text):
            classes[token] = names.index("number")
        elif any(c.isalpha() for c in text):
            classes[token] = names.index("word")
    return classes, names


@dataclass(frozen=True)
class Batch:
    """Prompts with their responses, right-padded; no model is told which positions are padding, as attention is causal.

    ids: [B, L] prompt then response. prompt_lengths, response_lengths: [B]. Every array over response tokens is [B, T] with
    T the longest response, row b's token t at ids[b, prompt_lengths[b] + t].
    """

    ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """[B, T] float: 1 on response tokens, the end token included."""
        return length_mask(self.response_lengths, int(self.response_lengths.max()))

    @property
    def responses(self) -> Tensor:
        """[B, T] token ids of the responses; whatever stands in the padding."""
        return self.ids.gather(1, self.response_positions())

    def response_positions(self) -> Tensor:
        """[B, T] columns of `ids` at which the response tokens stand, kept inside the row."""
        steps = torch.arange(int(self.response_lengths.max()), device=self.ids.device)
        return (self.prompt_lengths[:, None] + steps).clamp(max=self.ids.size(1) - 1)

    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        total: list[int] = (self.prompt_lengths + self.response_lengths).tolist()
        return total

    def rows(self, rows: Sequence[int] | Tensor) -> "Batch":
        """Some of the rows, trimmed to the longest of them; ValueError when none is asked for."""
        if not len(rows):
            raise ValueError(f"Batch.rows: expected at least one of the {len(self.ids)} rows, got none")
        index = torch.as_tensor(rows, device=self.ids.device)
        prompts, responses = self.prompt_lengths[index], self.response_lengths[index]
        return Batch(self.ids[index, : int((prompts + responses).max())], prompts, responses)

    def distinct(self) -> tuple[list[int], list[int]]:
        """The first row of each distinct prompt and response, and for every row its place among them."""
        places: dict[tuple[int, ...], int] = {}
        first: list[int] = []
        found = []
        prompts, lengths = self.prompt_lengths.tolist(), self.lengths()
        for row, ids in enumerate(self.ids.tolist()):
            key = (prompts[row], *ids[: lengths[row]])
            if key not in places:
                places[key] = len(first)
                first.append(row)
            found.append(places[key])
        return first, found

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.ids.to(device), self.prompt_lengths.to(device), self.response_lengths.to(device))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int) -> Batch:
    """Put prompts and responses (lists of ids, responses with their end token) into one batch.

    Raises ValueError for no rows at all, and for a prompt or response without a token: its first token would have no position
    before it.
    """
    if not prompts:
        raise ValueError("collate: expected at least one prompt with its response, got none")
    for name, rows in (("prompt", prompts), ("response", responses)):
        if not all(rows):
            raise ValueError(f"collate: {name} {next(i for i, ids in enumerate(rows) if not ids)} has no token")
    joined = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, joined))
    return Batch(
        torch.tensor([ids + [pad] * (width - len(ids)) for ids in joined]),
        torch.tensor([len(prompt) for prompt in prompts]),
        torch.tensor([len(response) for response in responses]),
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padding; masks come from lengths, so any id would do."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)
