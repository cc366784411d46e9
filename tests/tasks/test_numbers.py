"""Numbers that go wrong in a stage: rewards, figures and weights that are not finite, rewards that tell nothing, cut-off
responses, no pair, nothing to learn from; and training through the files of a stage."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.compute import CPU
from apprentice.demonstrations import read_jsonl
from apprentice.finite import BadSignError, NumbersError
from tasks import continued_sft, pairs, perstep, rescore, rso_rescored, whole_pairs
from tasks.candidates import check_rewards, tell_where_cut_off
from tasks.checkpoints import save_model
from tasks.ranking import ranked_pairs
from tasks.resume import StageRecorder
from tasks.stage import Stage, StageError
from tasks.study_tokens import stage_tokens
from tests.tables import candidates, speaker, words, write_answers, write_candidates, write_model, write_table

StageOf = Callable[..., Stage]


def said_by(stage: Stage, tmp_path: Path) -> list[str]:
    """The warnings in a stage's telemetry."""
    path = tmp_path / ".telemetry" / f"{stage.label}.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event["message"] for event in events if event["event"] == "warning"]


def prepared(stage: Stage, base: float = 0.5) -> Stage:
    """A stage on two prompts, after models of which the base says x after q with this chance; NaN: its weights are broken."""
    stage.__dict__["key"] = "0123"  # without a DVC project there is none to compute
    if (stage.data / "models").exists():
        return stage
    write_model(stage.data, "sft", speaker())
    model = speaker(0.5 if math.isnan(base) else base)
    if math.isnan(base):
        model.lm_head.weight.data[0, 0] = math.nan
    write_model(stage.data, "base", model)
    write_table(stage.data, "prompts", ("q", None), ("p q", None))
    return stage


def test_a_base_with_broken_weights_stops_the_pairs(stage_of: StageOf) -> None:
    stage = prepared(stage_of("pairs", **{"compute.device": "cpu"}), base=math.nan)
    with pytest.raises(StageError, match=r"pairs: the rewards of 32 of 32 candidates are NaN or infinite, the first for '[xy]"):
        pairs.main(stage)
    assert not (stage.data / "pairs" / "candidates.jsonl").exists()


@pytest.mark.parametrize(("base", "told"), [(0.5, 1), (0.4, 0)])
def test_pairs_of_a_reward_that_tells_nothing_apart_come_with_a_warning(
    stage_of: StageOf, tmp_path: Path, base: float, told: int
) -> None:
    stage = prepared(stage_of("pairs", **{"compute.device": "cpu"}), base=base)
    pairs.main(stage)
    said = said_by(stage, tmp_path)
    assert len(said) == told and all("coin flips" in text for text in said)
    assert read_jsonl(stage.data / "pairs" / "pairs.jsonl")


def test_a_broken_reward_stops_the_rescoring(stage_of: StageOf, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = prepared(stage_of("rescore", **{"compute.device": "cpu"}))
    write_candidates(stage.data, candidates("q", ("x", 1.0), ("y", 2.0)))
    monkeypatch.setitem(rescore._REWARDS, "judge", lambda *_: [0.5, math.inf])
    with pytest.raises(StageError, match=r"rescore: the rewards of 1 of 2 candidates are NaN or infinite, the first for 'y'"):
        rescore.main(stage)


def test_one_prompt_told_apart_is_enough(stage_of: StageOf, tmp_path: Path) -> None:
    stage, flat = stage_of("pairs"), candidates("p", ("x", 1.0), ("y", 1.0005))
    check_rewards(stage, [flat, candidates("q", ("x", 1.0), ("y", 1.1))])
    assert said_by(stage, tmp_path) == []
    check_rewards(stage, [flat, flat])
    assert len(said_by(stage, tmp_path)) == 1


def test_with_stop_a_flat_reward_ends_the_pairs_before_they_are_made(stage_of: StageOf) -> None:
    stage = prepared(stage_of("pairs", **{"compute.device": "cpu", "runtime.on_bad_sign": "stop"}), base=0.5)
    with pytest.raises(BadSignError, match="the reward tells no two candidates of any prompt apart"):
        pairs.main(stage)
    assert not (stage.data / "pairs" / "pairs.jsonl").exists()


@pytest.mark.parametrize("rule", ["warn", "stop"])
def test_rejection_down_to_the_best_follows_the_rule(
    stage_of: StageOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    stage, trained = stage_of("rso_rescored", **{"runtime.on_bad_sign": rule, "pairs.beta": 0.01}), list[Any]()
    write_candidates(stage.data, candidates("q", *[(f"x {i}", float(i)) for i in range(16)]), source="rescored")
    monkeypatch.setattr("tasks.preferring.prefer_stage", lambda stage, rows, figures: trained.extend(rows))
    with pytest.raises(BadSignError, match="best ones only") if rule == "stop" else nullcontext():
        rso_rescored.main(stage)
    assert (len(said_by(stage, tmp_path)), bool(trained)) == ((1, True) if rule == "warn" else (0, False))


def test_with_stop_cut_off_responses_end_what_would_learn_from_them(stage_of: StageOf) -> None:
    stage = stage_of("judge", **{"compute.device": "cpu", "judge.max_new_tokens": 1, "runtime.on_bad_sign": "stop"})
    prepared(stage)
    write_table(stage.data, "demonstrations", ("q", "x x"))
    with pytest.raises(BadSignError, match=r"8 of 8 responses were cut off before their end; raise judge.max_new_tokens"):
        ranked_pairs(stage, words(), CPU)


def test_where_most_responses_are_cut_off_a_warning_names_the_entry(stage_of: StageOf, tmp_path: Path) -> None:
    stage = stage_of("pairs")
    tell_where_cut_off(stage.warn, [True, False], "pairs.max_new_tokens")
    assert said_by(stage, tmp_path) == []
    tell_where_cut_off(stage.warn, [True, False, False], "pairs.max_new_tokens")
    assert said_by(stage, tmp_path) == ["2 of 3 responses were cut off before their end; raise pairs.max_new_tokens"]


def test_candidates_samples_and_attempts_that_are_cut_off_are_told_of(stage_of: StageOf, tmp_path: Path) -> None:
    one = {"compute.device": "cpu"}  # after one token no response has ended
    stage = prepared(stage_of("pairs", **one, **{"pairs.max_new_tokens": 1}))
    with pytest.raises(StageError, match=r"no pair survived: 0 candidates accepted, .* 32 of 32 candidates unfinished"):
        pairs.main(stage)
    assert said_by(stage, tmp_path)[0] == "32 of 32 responses were cut off before their end; raise pairs.max_new_tokens"
    stage = stage_of("judge", **one, **{"judge.max_new_tokens": 1})
    write_table(stage.data, "demonstrations", ("q", "x x"))
    ranked_pairs(stage, words(), CPU)
    assert said_by(stage, tmp_path) == ["8 of 8 responses were cut off before their end; raise judge.max_new_tokens"]
    stage = prepared(stage_of("perstep", **one, **{"perstep.max_new_tokens": 1, "perstep.separator": "y"}))
    write_answers(stage.data, {"q": "x", "p q": "x"})
    with pytest.raises(StageError, match=r"perstep: nothing to learn from; .* Raise perstep.prompts"):
        perstep.main(stage)
    assert said_by(stage, tmp_path) == ["16 of 16 responses were cut off before their end; raise perstep.max_new_tokens"]


def test_whole_pairs_without_a_right_and_a_wrong_one_stop_with_advice(stage_of: StageOf) -> None:
    stage = stage_of("whole_pairs")
    write_answers(stage.data, {"p": "x", "q": "x"})
    write_candidates(stage.data, candidates("p", ("x", 1.0), ("y", 1.0, False)), candidates("q", ("y", 1.0), ("y", 1.0)))
    with pytest.raises(StageError, match=r"no prompt has a right and a wrong finished candidate.*raise pairs.candidates"):
        whole_pairs.main(stage)


# --- figures, weights, and training through the files of a stage


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_not_written(stage_of: StageOf, bad: float) -> None:
    stage = stage_of("sft")
    stage.metrics({"loss": 0.5, "gate": {"mean": 0.5}, "stopped_by": "nan", "rows": 3, "skipped": ["nan"]})
    before = (stage.reports / "metrics.json").read_text()
    for figures in ({"loss": 0.5, "held_out_loss": bad}, {"held_out_loss": {"mean": bad, "low": 0.0}}):
        with pytest.raises(StageError, match=r"sft: the figure held_out_loss is .*(nan|inf).*not a finite number"):
            stage.metrics(figures)
    assert (stage.reports / "metrics.json").read_text() == before


def test_weights_that_are_not_finite_are_not_saved(stage_of: StageOf) -> None:
    stage, model = stage_of("sft"), speaker()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(StageError, match=r"sft: 1 tensors of sft hold NaN or infinite numbers .* first lm_head.weight"):
        save_model(stage, "sft", model, words(), [], {})
    assert not (stage.data / "models" / "sft").exists()


@pytest.fixture
def stage(stage_of: StageOf) -> Stage:
    made = stage_of("sft", **{"runtime.skip_steps": 2, "runtime.checkpoint_steps": 1})
    made.__dict__["key"] = "0123"
    return made


LOSSES = [1.0, math.nan, math.nan, 0.5, math.nan, 0.25]


def work(stage: Stage, until: int = 6) -> dict[str, Any]:
    """Steps of these losses as a training loop takes them, broken off after step `until`; the figures of its end."""
    recorder = StageRecorder(stage, "loss")
    done = (recorder.resume() or {"step": 0})["step"]
    for step in range(done + 1, until + 1):
        taken = recorder.takes(f"step {step} of 6", {"loss": LOSSES[step - 1]})
        recorder.step(step, 6, {"loss": LOSSES[step - 1] if taken else None}, lambda step=step: {"step": step})  # type: ignore[misc]
    if until == 6:
        stage.metrics({"rows": 6})
        return json.loads((stage.reports / "metrics.json").read_text())  # type: ignore[no-any-return]
    return {}


@pytest.mark.parametrize("stop", [None, 1, 2, 3, 4, 5])
def test_skipped_steps_are_counted_over_an_interruption(stage: Stage, tmp_path: Path, stop: int | None) -> None:
    if stop:
        work(stage, stop)
        stage.skipped_steps = 0  # another process
    assert work(stage) == {"rows": 6, "skipped_steps": 3}
    assert stage.history.path.read_text() == "step,loss\n1,1\n2,\n3,\n4,0.5\n5,\n6,0.25\n"
    assert [text.split(":")[0] for text in said_by(stage, tmp_path)] == [f"step {n} of 6" for n in (2, 3, 5)]


@pytest.mark.parametrize("stop", [2, 3])
def test_those_in_a_row_are_counted_over_an_interruption(stage: Stage, stop: int) -> None:
    work(stage, stop)
    stage.skipped_steps = 0  # another process
    stage.params = replace(stage.params, runtime=replace(stage.params.runtime, skip_steps=1))
    if stop == 3:  # two in a row are over already
        assert work(stage)["skipped_steps"] == 3
    else:
        with pytest.raises(NumbersError, match=r"step 3 of 6: loss nan, after 1 skipped in a row"):
            work(stage)


def test_a_healthy_run_says_nothing_of_skipped_steps(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "LOSSES", [1.0] * 6)
    assert work(stage) == {"rows": 6}


def test_blank_rows_count_for_nothing_where_a_history_is_read(
    stage_of: StageOf, monkeypatch: pytest.MonkeyPatch, params: Any
) -> None:
    rows = [{"length": "10"}, {"length": ""}, {"length": "20"}]
    whole = stage_tokens("srppo", params().srppo, {}, [rows[0], rows[2]], 9.0)
    assert stage_tokens("srppo", params().srppo, {}, rows, 9.0) == whole
    stage = stage_of("continued_sft", **{"srppo.batch_size": 1, "srppo.epochs": 1})
    write_model(stage.data, "sft", speaker())
    write_table(stage.data, "demonstrations", ("q", "x"))  # two tokens
    history = stage.data / "reports" / "srppo" / "history.csv"
    history.parent.mkdir(parents=True)
    history.write_text("step,length\n1,10\n2,\n3,20\n")
    epochs = []
    monkeypatch.setattr("tasks.fine_tuning.fine_tune_stage", lambda *_, config, **__: epochs.append(config.epochs))
    continued_sft.main(stage)
    assert epochs == [15]
