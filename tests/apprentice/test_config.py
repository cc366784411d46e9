"""params.yaml: the shipped one is read, and a wrong entry is named with what was expected and what came."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from apprentice.config import Params, ParamsError, parse
from apprentice.sections import Range


def test_shipped_params_are_typed(params: Callable[..., Params]) -> None:
    shipped = params()
    assert shipped.ingest.source.kind == "world"
    assert isinstance(shipped.pretrain.learning_rate, float)
    assert isinstance(shipped.evaluate.models, list)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, "seed: expected a number at least 0, got -1"),
        ("seed", True, "seed: expected a whole number, got bool True"),
        ("seed", None, "seed: expected a whole number, got NoneType None"),
        ("seed", 1.5, "seed: expected a whole number, got float 1.5"),
        ("srppo.kl_coeff", 1.0, "srppo.kl_coeff: no such entry in srppo; did you mean 'kl_coef'?"),
        ("ingest.source.kind", "json", "ingest.source.kind: expected one of world, jsonl, csv, parquet, hub; got 'json'"),
        ("ingest.fields", {"prompt": 3}, "ingest.fields.prompt: expected text, got int 3"),
        ("ingest.fields", {"respons": "x"}, "ingest.fields: expected one of prompt, response, answer, quality, source; "),
        ("ingest.max_rejected_share", 1.5, "ingest.max_rejected_share: expected a number between 0 and 1, got 1.5"),
        ("ingest.world", 7, "ingest.world: expected a mapping, got int 7"),
        ("sft.learning_rate", "1e-3", "YAML reads 1e-3 as text: write 1.0e-3"),
        ("sft.learning_rate", 0, "sft.learning_rate: expected a number above 0, got 0"),
        ("sft.learning_rate", float("nan"), "sft.learning_rate: expected a number, got float nan"),
        ("srppo.whiten", "yes", "srppo.whiten: expected true or false, got str 'yes'"),
        ("evaluate.models", "base", "evaluate.models: expected a list, got str 'base'"),
        ("evaluate.models", ["base", 3], "evaluate.models[1]: expected text, got int 3"),
    ],
)
def test_a_wrong_entry_is_named(params: Callable[..., Params], key: str, value: Any, message: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(message)):
        params(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ingest.source.kind": "hub"}, "needs `name` (the data set) and `revision`"),
        (
            {"ingest.source.kind": "hub", "ingest.source.name": "openai/gsm8k", "ingest.source.revision": "main"},
            "ingest.source.revision: expected a commit (40 hexadecimal digits), for a branch can move; got 'main'",
        ),
        ({"ingest.validation_share": 0.5, "ingest.evaluation_share": 0.5}, "expected less than 1"),
        ({"pretrain.hidden_size": 97}, "expected a multiple of pretrain.heads (4), got 97"),
        ({"pairs.accepted": 17}, "pairs.accepted: expected at most pairs.candidates (16), got 17"),
        (
            {"compute.sharding": True},
            "compute.sharding: expected compute.processes above 1, over which models are spread; got 1",
        ),
        (
            {"compute.sharding": True, "compute.processes": 2, "lora.rank": 8},
            "compute.sharding: expected lora.rank 0, for the trunk under adapters is not spread; got 8",
        ),
        (
            {"compute.sampler": "vllm", "compute.processes": 2, "compute.sharding": True},
            "compute.sampler: expected compute.sharding false with vllm, which takes whole models; got true",
        ),
        (
            {"bt_reward.prompt_offset": 0.5},
            "bt_reward.prompt_offset: expected 0 with bt_reward.objective: pairs, for it cancels between two responses to one "
            "prompt; got 0.5",
        ),
        ({"report.baselines": ["sft", "nothing"]}, "report.baselines: 'nothing' is not in evaluate.models"),
    ],
)
def test_entries_that_do_not_fit_together(params: Callable[..., Params], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=re.escape(message)):
        params(**changes)


def test_an_offset_of_prompts_is_for_scores_alone(params: Callable[..., Params]) -> None:
    shipped = params()
    assert (shipped.bt_reward.objective, shipped.bt_reward.prompt_offset) == ("pairs", 0.0)
    assert params(**{"bt_reward.objective": "scores", "bt_reward.prompt_offset": -2}).bt_reward.prompt_offset == -2.0
    assert not hasattr(shipped.judge, "objective")


def test_a_missing_entry_or_section_is_named() -> None:
    with pytest.raises(ParamsError, match=r"seed: missing from params\.yaml"):
        parse({})
    with pytest.raises(ParamsError, match=r"params\.yaml: expected a mapping, got NoneType None"):
        parse(None)


def test_whole_numbers_serve_as_numbers_and_null_where_it_may(params: Callable[..., Params]) -> None:
    assert params(**{"srppo.kl_coef": 1}).srppo.kl_coef == 1.0
    assert params(**{"srppo.kl_stop": None}).srppo.kl_stop is None


def test_ends_of_a_range() -> None:
    assert Range(0).holds(0) and not Range(0, open_low=True).holds(0)
    assert Range(0, 1).holds(1) and not Range(0, 1).holds(1.01)
    assert str(Range(0, 1, open_low=True)) == "a number between 0 (not included) and 1"
