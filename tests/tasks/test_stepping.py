"""From sampled responses to lessons, by each variant; the stage `perstep` from end to end.

After q the model of tests/tables.py says x, or y again and again, and a step ends with each y. Where the answer is `x`, one y
makes a response wrong; where it is `y y`, the prefixes (), y, y y and y y y are right with chance 1/8, 1/4, 1/2 and 0.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from apprentice.compute import CPU
from apprentice.demonstrations import demonstration, prompt_id, write_demonstrations, write_jsonl
from apprentice.policy import load_policy, save_policy
from apprentice.sampling import Request, sample
from apprentice.spurious import CUE
from apprentice.steps import Attempt, StepPairs, StepWeights, step_ends
from apprentice.tokens import encode_prompt, train_word_tokenizer
from apprentice.world import WORDS
from tasks import perstep, stepping
from tasks.stage import Stage, StageError
from tasks.stepping import as_weights, lessons, spurious_advantages
from tests.apprentice.toys import hash_of, markov
from tests.tables import NEVER, speaker, words, write_answers, write_model, write_table

StageOf = Callable[..., Stage]
BEGIN, P, Q, X, Y, END = (words().get_vocab()[word] for word in ("<bos>", "p", "q", "x", "y", "<eos>"))
SETTINGS = {"separator": "y", "prompts": 9, "negatives": 40, "completions": 200, "max_new_tokens": 12, "best_of": 1}


@pytest.fixture
def new_stage(stage_of: StageOf, tmp_path: Path) -> StageOf:
    """The stage on prompts `q`, `p q` (answer y y) and `p` (without an answer), with changes of its section."""

    def make(answers: dict[str, str] | None = None, **changes: Any) -> Stage:
        section = {f"perstep.{name}": value for name, value in (SETTINGS | changes).items()}
        stage = stage_of("perstep", **section, **{"compute.device": "cpu"})
        stage.__dict__["key"] = "0123"  # without a DVC project there is none to compute
        if not (tmp_path / "data" / "models" / "sft").exists():
            write_model(tmp_path / "data", "sft", speaker())
        write_table(tmp_path / "data", "prompts", *((prompt, None) for prompt in ("q", "p", "p q")))
        write_table(tmp_path / "data", "validation", ("q", "y y"))
        write_answers(tmp_path / "data", {"q": "y y", "p q": "y y"} if answers is None else answers)
        return stage

    return make


def drawn(prompt: str, count: int = 40, seed: int = 0) -> list[tuple[list[int], bool]]:
    """What the model says to a prompt, and whether it ended, by the sampler alone."""
    requests = [Request(encode_prompt(words(), prompt), prompt_id(prompt), n) for n in range(count)]
    rollout = sample(speaker(), requests, seed=f"{seed}/perstep", end=END, max_new_tokens=12)
    return list(zip(rollout.response_ids(), rollout.ended.tolist(), strict=True))


def pairs_of(stage: Stage) -> tuple[list[tuple[list[int], list[int], list[int]]], dict[str, float]]:
    found, figures = lessons(stage, words(), CPU)
    assert isinstance(found, StepPairs)
    return list(zip(found.prompts, found.chosen, found.rejected, strict=True)), figures


def test_practical_pairs_stop_at_the_first_pit(new_stage: StageOf) -> None:
    pairs, figures = pairs_of(new_stage())
    # x, y and y y y ... are wrong; the lowest value is the last step's own 0 but for y y y, which is lost from there
    wrong = [ids for prompt in ("q", "p q") for ids, _ in drawn(prompt) if ids != [Y, Y]]
    lost = sorted([Y] * min(len(ids), 3) if ids[0] == Y else [X] for ids in wrong)
    assert {len(ids) for ids in lost} == {1, 3}
    assert sorted(rejected for _, _, rejected in pairs) == lost
    assert all(chosen == [Y, Y, END] for _, chosen, _ in pairs)
    assert {tuple(prompt) for prompt, _, _ in pairs} == {(BEGIN, Q), (BEGIN, P, Q)}
    assert (figures["responses"], figures["wrong"]) == (80.0, float(len(wrong)))


def test_figures(new_stage: StageOf) -> None:
    _, figures = pairs_of(new_stage())
    told = [ids for prompt in ("q", "p q") for ids, _ in drawn(prompt)]
    wrong = [ids for ids in told if ids != [Y, Y]]
    assert figures["unsplit_share"] == pytest.approx(sum(len(ids) == 1 for ids in told) / 80, abs=1e-6)
    assert figures["pit_position"] == pytest.approx(sum(min(1, 3 / len(ids)) for ids in wrong) / len(wrong), abs=1e-6)
    # two prompts, their own 200 completions each: 4 sigma of one of them is a bound for the mean
    assert abs(figures["prompt_value"] - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 200)
    assert all(isinstance(value, float) for value in figures.values())


def test_best_of_raises_the_values(new_stage: StageOf) -> None:
    one, five = (pairs_of(new_stage(best_of=count))[1]["prompt_value"] for count in (1, 5))
    assert five > one
    assert abs(five - (1 - (7 / 8) ** 5)) < 0.2


def test_a_prompt_without_a_right_response_is_counted(new_stage: StageOf) -> None:
    pairs, figures = pairs_of(new_stage({"q": "y y", "p q": "x x"}))
    assert all(prompt == [BEGIN, Q] for prompt, _, _ in pairs)
    assert figures["dropped_no_right_response"] == figures["wrong"] - len(pairs) == 40


def test_shared_prefix_pairs_differ_in_one_step(new_stage: StageOf) -> None:
    pairs, figures = pairs_of(new_stage({"q": "y y"}, variant="shared_prefix"))
    # x: over it the first y of what is right; y: the same step, so no pair; y y y: over it the end
    told = [ids for ids, _ in drawn("q")]
    wanted = [([BEGIN, Q], [Y], [X])] * told.count([X]) + [([BEGIN, Q, Y, Y], [END], [Y])] * sum(len(ids) > 2 for ids in told)
    assert sorted(pairs) == sorted(wanted)
    assert figures["dropped_same_step"] == told.count([Y]) > 0
    assert len({len(prompt) for prompt, _, _ in pairs}) == 2


def test_weights_follow_the_values(new_stage: StageOf) -> None:
    found, figures = lessons(
        new_stage({"q": "y y"}, variant="advantage_weighted", completions=800, max_weight=100.0), words(), CPU
    )
    assert isinstance(found, StepWeights)
    assert figures["responses"] == len(found.prompts) == 40
    assert found.responses == [[*ids, END] if ended else ids for ids, ended in drawn("q")]
    rates = [1 / 8, 1 / 4, 1 / 2]
    slack = 4 * math.sqrt(0.25 / 800)  # 4 sigma of a value
    for ids, weights in zip(found.responses, found.weights, strict=True):
        steps = len(ids) - (ids[-1] == END)
        values = [rates[n] if n < 3 else 0.0 for n in range(steps)] + [float(ids == [Y, Y, END])]
        wanted = [(after - before) / 0.5 for before, after in itertools.pairwise(values)]
        wanted += wanted[-1:] if ids[-1] == END else []  # the end token goes with the last step
        assert [math.log(weight) for weight in weights] == pytest.approx(wanted, abs=2 * slack / 0.5)


def test_all_right_gives_nothing_and_the_stage_says_so(new_stage: StageOf) -> None:
    stage = new_stage({"p": "x"})
    found, figures = lessons(stage, words(), CPU)
    assert found == StepPairs([], [], [])
    counts = {"responses": 40.0, "wrong": 0.0, "completions": 0.0}
    assert figures == {**counts, "unsplit_share": 1.0, "prompt_value": 0.0, "pit_position": 0.0}
    with pytest.raises(StageError, match=r"nothing to learn from.*Raise perstep\.prompts"):
        perstep.main(stage)


def test_right_responses_have_weights_too(new_stage: StageOf) -> None:
    found, _ = lessons(new_stage({"p": "x"}, variant="advantage_weighted"), words(), CPU)
    assert found.responses == [[X, END]] * 40
    assert found.weights == [[1.0, 1.0]] * 40  # the prompt was as good already


def test_a_model_that_says_nothing_gives_nothing(new_stage: StageOf, tmp_path: Path) -> None:
    stage = new_stage({"x": "x"})
    write_table(tmp_path / "data", "prompts", ("x", None))  # after x comes the end
    found, figures = lessons(stage, words(), CPU)
    assert found == StepPairs([], [], [])
    assert set(figures.values()) == {0.0}


def test_a_pool_without_answers_is_refused(new_stage: StageOf) -> None:
    with pytest.raises(StageError, match="no answer to any prompt of the pool"):
        lessons(new_stage({"x": "x"}), words(), CPU)


def test_a_separator_that_no_token_contains_is_refused(new_stage: StageOf) -> None:
    with pytest.raises(StageError, match=r"perstep\.separator: no token of this tokenizer contains '\\n'"):
        lessons(new_stage(separator="\n"), words(), CPU)


def test_G6_the_seed_decides_the_lessons(new_stage: StageOf, stage_of: StageOf) -> None:
    new_stage({"q": "y y"})
    section = {f"perstep.{name}": value for name, value in (SETTINGS | {"variant": "advantage_weighted"}).items()}
    first, again, other = (lessons(stage_of("perstep", seed=seed, **section), words(), CPU)[0] for seed in (0, 0, 1))
    assert first == again != other
    for seed, found in ((0, first), (1, other)):
        assert found.responses == [[*ids, END] if ended else ids for ids, ended in drawn("q", seed=seed)]


# --- the spurious step


def test_the_advantage_of_spurious_steps_is_of_right_responses_and_beside_their_inner_steps() -> None:
    tokenizer = train_word_tokenizer([], 200, WORDS)
    (separator,) = tokenizer.encode(";", add_special_tokens=False)

    def attempt(text: str, right: bool = True) -> Attempt:
        ids = tokenizer.encode(text, add_special_tokens=False)
        return Attempt([0], "q", ids, step_ends(ids, frozenset([separator])), right, True)

    attempts = [
        attempt("first 4 + 1 = 5 ; 4 is even ; 5 + 2 = 7 ; answer : 7"),  # advantages 0.25, -0.25, 0.5, 0.25
        attempt("first 4 + 1 = 5 ; 5 + 2 = 7 ; answer : 7"),  # 0.25, 0.25, 0.25
        attempt("first 4 + 1 = 5 ; 4 is even ; 5 + 2 = 8 ; answer : 8", right=False),
        attempt("answer : 7"),
    ]
    values = [[0.25, 0.5, 0.25, 0.75, 1.0], [0.25, 0.5, 0.75, 1.0], [0.25, 0.5, 1.0, 0.0, 0.0], [0.25, 1.0]]
    assert spurious_advantages(attempts, values, tokenizer) == {"spurious_advantage": -0.25, "other_advantage": 0.375}
    assert spurious_advantages(attempts[2:], values[2:], tokenizer) == {}


def test_where_the_world_plants_a_step_right_responses_are_valued_and_the_lessons_stay(
    new_stage: StageOf, tmp_path: Path
) -> None:
    stage = new_stage({"q": "y y y"}, negatives=8, completions=2000)
    assert sorted(drawn("q", 8))[-3:] == [([Y, Y], True), ([Y, Y], True), ([Y, Y, Y], True)]  # so no wrong one begins y y
    usual, figures = pairs_of(stage)
    assert "other_advantage" not in figures
    rows = [demonstration("q", None, "test", meta={CUE: True})]
    write_demonstrations(tmp_path / "data" / "clean" / "prompts.jsonl", rows)
    planted, more = pairs_of(stage)
    assert planted == usual != []
    # y y is completed to y y y with chance 1/4, y with 1/8; 4 sigma of their difference is 0.05
    assert more.pop("other_advantage") == pytest.approx(1 / 8, abs=0.05)
    assert (figures.pop("completions"), more.pop("completions")) == (2 * 2000, 3 * 2000)  # of (), y; and of y y
    assert more == figures


# --- a step verifier in place of completions


@pytest.fixture
def annotated(stage_of: StageOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Stage, Any]]:
    """The stage on a model that after q does two sums in two steps, each right with chance 1/2, then answers 4 or 5 as often.

    Right are the responses that answer 4, whatever their sums.
    """

    def no_completions(*arguments: Any, **options: Any) -> None:
        raise AssertionError("nothing is to be completed")

    told = ["<unk>", "<eos>", "q", "<<1+1=2>>", "<<1+1=3>>", ";", "<<2+2=4>>", "<<2+2=5>>", "####", "4", "5"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(told)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>")
    table = [[NEVER] * len(told) for _ in told]
    for token, after in {2: (3, 4), 3: (5,), 4: (5,), 5: (6, 7), 6: (8,), 7: (8,), 8: (9, 10), 9: (1,), 10: (1,)}.items():
        for other in after:
            table[token][other] = 0.0
    (tmp_path / "data" / "models").mkdir(parents=True)
    save_policy(markov(table), tokenizer, tmp_path / "data" / "models" / "sft", "# card\n")
    write_table(tmp_path / "data", "prompts", ("q", None))
    answers = [{"prompt_id": prompt_id("q"), "verifier": "gsm8k", "answer": "4"}]
    write_jsonl(tmp_path / "data" / "clean" / "answers.jsonl", answers)
    monkeypatch.setattr(stepping, "complete", no_completions)

    def make(variant: str) -> tuple[Stage, Any]:
        section = SETTINGS | {"separator": ";", "values": "calculator", "variant": variant}
        return stage_of("perstep", **{f"perstep.{name}": value for name, value in section.items()}), tokenizer

    return make


def test_by_calculator_the_first_wrong_sum_is_the_pit(annotated: Any) -> None:
    stage, tokenizer = annotated("practical")
    found, figures = lessons(stage, tokenizer, CPU)
    rejected = {tuple(ids) for ids in found.rejected}
    # the first sum wrong; the second wrong; both right, so that the last step is to blame for the answer 5
    assert rejected == {(4, 5), (3, 5, 7, 8, 10), (3, 5, 6, 8, 10)}
    assert all(ids[-2:] == [9, 1] for ids in found.chosen)
    assert figures["prompt_value"] == 1.0


def test_by_calculator_a_wrong_step_weighs_less_in_a_right_response_too(annotated: Any) -> None:
    stage, tokenizer = annotated("advantage_weighted")
    found, _ = lessons(stage, tokenizer, CPU)
    weights = {tuple(ids): row for ids, row in zip(found.responses, found.weights, strict=True)}
    low, high = math.exp(-2), 5.0  # advantages of 1 over beta 0.5; exp(2) is above the limit
    assert weights[4, 5, 6, 8, 9, 1] == pytest.approx([low] * 2 + [high] * 4)
    assert weights[3, 5, 6, 8, 9, 1] == pytest.approx([1.0] * 6)
    assert weights[3, 5, 7, 8, 10, 1] == pytest.approx([1.0] * 2 + [low] * 4)


# --- the whole stage


@pytest.mark.parametrize("variant", ["practical", "advantage_weighted"])
def test_the_stage_teaches_the_right_answer(new_stage: StageOf, variant: str) -> None:
    stage = new_stage({"q": "x"}, variant=variant, completions=20, learning_rate=0.05, epochs=4, batch_size=8)
    perstep.main(stage)
    folder = stage.data / "models" / "perstep"
    model = load_policy(folder)
    assert hash_of(model) != hash_of(speaker())
    with torch.no_grad():
        assert float(model(torch.tensor([[Q]])).logits[0, -1].softmax(-1)[X]) > 0.7  # it was 0.5
    metrics = json.loads((stage.reports / "metrics.json").read_text())
    told = [ids for ids, _ in drawn("q")]
    wrong = len(told) - told.count([X])
    assert (metrics["responses"], metrics["wrong"]) == (40, wrong)
    assert metrics["pairs" if variant == "practical" else "rows"] == (wrong if variant == "practical" else 40)
    assert (stage.reports / "history.csv").read_text().count("\n") > 4


def test_as_weights_takes_the_settings_of_the_section(new_stage: StageOf) -> None:
    settings = {
        "epochs": 7,
        "batch_size": 3,
        "learning_rate": 0.25,
        "warmup_share": 0.5,
        "weight_decay": 0.125,
        "max_grad_norm": 2.5,
    }
    assert asdict(as_weights(new_stage(**settings).config)) == settings | {"select": "last"}
