"""Inputs as sources have them, good and bad, and how hypothesis goes through them."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ROLES = ("system", "user", "assistant")
INVISIBLE = ["\u200b", "\u200d", "\u202e", "\u2066", "\ufeff", "\u00ad"]  # zero-width and right-to-left marks: kept as text
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u2028"]
FORBIDDEN = ["\x00", "\x07", "\x1c", "\x85", "\ufffd", "\ud800", "\udcff"]
WORDS = ["2 + 2", "tom", "How many?", "\u05e9\u05dc\u05d5\u05dd", "e\u0301", "\u00e9", "\U0001f600", "####", "#### 4", "?!"]


def steady(examples: int) -> settings:
    """The same examples on every machine and in every run, however slow it is."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
parts = st.sampled_from([*WORDS, *INVISIBLE, *SPACES]) | printable
clean_texts = st.lists(parts, max_size=5).map("".join)
any_texts = st.one_of(
    st.sampled_from(["", " ", "\t\r\n", *(f"question {n}" for n in range(12))]),
    clean_texts,
    st.lists(parts | st.sampled_from(FORBIDDEN), max_size=4).map("".join),
    st.just("long " * 20),
)
numbers = st.one_of(
    st.integers(), st.sampled_from([10**400, -(10**4000), float("nan"), float("inf"), 1e999, -0.0]), st.floats(), st.booleans()
)
messages = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from([*ROLES, "tool", 7, [], {}]), "content": any_texts | st.none()}
)
good_messages = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": clean_texts})
chats = st.lists(good_messages, max_size=3) | st.lists(messages | st.none() | any_texts, max_size=3)
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | numbers | any_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_texts, inner, max_size=3),
    max_leaves=6,
)
