"""Class-conditioned fine-tuning (C-RLFT, OpenChat, 2309.11235): a coarse reward of the source class, no preference labels.

With the class-conditioned data distribution pi_c as reference the optimum of E[r_c] - beta KL(pi || pi_c) is projected on the
model by weighted fine-tuning, max E[exp(r_c / beta) log pi(y | x, c)]: a tag of the class in the prompt, that weight
in the loss. Departure: the tag stands once, where the response begins, so that it fits any chat template.
"""

import copy
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from apprentice.demonstrations import QUALITIES

EXPERT = QUALITIES[0]
# What a tokenizer without a template amounts to in `encode_prompts`.
_PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message.content }}{{ '' if loop.last else '\\n' }}{% endfor %}"
)


def conditioned(tokenizer: PreTrainedTokenizerBase, quality: str) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer whose chat template opens every response with the tag of a class.

    Saved beside a checkpoint it makes every later use of the model carry that tag. Raises ValueError for an unknown class.
    """
    if quality not in QUALITIES:
        raise ValueError(f"quality: expected one of {', '.join(QUALITIES)}; got {quality!r}")
    tagged = copy.deepcopy(tokenizer)
    template = _PLAIN_TEMPLATE if tokenizer.chat_template is None else tokenizer.get_chat_template()
    tag = "{{ '<" + quality + ">' if add_generation_prompt else '' }}"
    tagged.chat_template = template.removesuffix("\n") + tag  # rendered, a template loses the line break it ends with
    return tagged


def class_weights(qualities: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    """The weight of each row by its class. Raises ValueError for a class without one."""
    missing = sorted(set(qualities) - set(weights))
    if missing:
        raise ValueError(f"weights: no entry for {', '.join(missing)}; it has {', '.join(weights)}")
    return [weights[quality] for quality in qualities]
