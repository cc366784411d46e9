"""Effects and verdicts by hand, and what is published from them."""

from dataclasses import replace
from typing import Any

import pytest

from tasks.dvcstage import read_stages
from tasks.stage import read_params
from tasks.study_claims import document, effect_cell, effect_of, is_share, judge, verdict
from tasks.study_figures import PATH, Figures, read_figures
from tasks.study_plan import Claim, Plot, Run, Study, StudyError, main_models, read_study
from tasks.study_plots import draw
from tasks.study_report import count_seeds, headline
from tasks.study_table import BEGIN, END, README, learned_from, over_seeds, put, renew_readme, results

GREEDY, OUT = "in_domain/greedy_accuracy", "out_of_domain/greedy_accuracy"
RUNS = {
    "main": Run("main", {}, None, None),
    "a": Run("a", {}, ("rso",), None),
    "b": Run("b", {}, ("rso",), 2),
}


def claim(test: str = "above", margin: float = 0.0, **more: Any) -> Claim:
    own = {"effect": {"rso": 1, "sft": -1}, "metric": {GREEDY: 0.5, OUT: 0.5}, **more}
    return Claim("2309.06657", "a claim", "direction only", own["effect"], own["metric"], test, margin)


def names(rso: float, sft: float) -> dict[str, dict[str, float]]:
    return {"rso": {GREEDY: rso, OUT: rso, "in_domain/self_reward": rso}, "sft": {GREEDY: sft, OUT: 0.0}}


FIGURES: Figures = {
    "main": {"1": names(0.5, 0.25), "2": names(0.75, 0.25), "3": names(1.0, 0.5)},
    "a": {str(seed): names(0.25, 0.0) for seed in (1, 2, 3)},
    "b": {"1": names(0.0, 0.0), "2": names(0.125, 0.0)},
}
STUDY = Study(RUNS, (), ())


@pytest.mark.parametrize(
    ("test", "margin", "low", "high", "expected"),
    [
        ("above", 0.0, 0.001, 0.2, "holds"),
        ("above", 0.0, 0.0, 0.2, "not settled"),
        ("above", 0.0, -0.1, 0.2, "not settled"),
        ("above", 0.0, -0.1, 0.0, "does not hold"),
        ("above", 0.0, 0.0, 0.0, "does not hold"),
        ("above", 0.1, 0.11, 0.2, "holds"),
        ("above", 0.1, 0.05, 0.1, "does not hold"),
        ("within", 0.03, -0.029, 0.029, "holds"),
        ("within", 0.03, -0.03, 0.01, "not settled"),
        ("within", 0.03, -0.01, 0.04, "not settled"),
        ("within", 0.03, -0.1, 0.1, "not settled"),
        ("within", 0.03, 0.03, 0.1, "does not hold"),
        ("within", 0.03, -0.1, -0.03, "does not hold"),
        ("above", 0.0, None, None, "not settled"),
    ],
)
def test_the_verdict_goes_by_the_interval(test: str, margin: float, low: float, high: float, expected: str) -> None:
    assert verdict(claim(test, margin), low, high) == expected


def test_an_effect_is_the_sum_over_names_and_metrics_with_both_factors() -> None:
    assert effect_of(claim(), FIGURES, 1) == 0.5 * (0.5 - 0.25) + 0.5 * (0.5 - 0.0)
    both = claim(effect={"rso": 1, "a:rso": -2}, metric={GREEDY: 1, OUT: -3})
    assert effect_of(both, FIGURES, 2) == (0.75 - 2 * 0.25) - 3 * (0.75 - 2 * 0.25)


def test_equal_models_have_no_effect_to_the_last_bit() -> None:
    figures: Figures = {"main": {"1": {"rso": {GREEDY: 0.1, OUT: 0.7}, "sft": {GREEDY: 0.7, OUT: 0.1}}}}
    assert effect_of(claim(), figures, 1) == 0.0


def test_a_claim_is_judged_over_seeds() -> None:
    found = judge(claim(), STUDY, FIGURES, 3)
    # effects 0.375, 0.625, 0.75: mean 0.583333, s = 0.190941, t(2) = 4.302653, half width t s / sqrt(3) = 0.474324
    assert found["by_seed"] == [0.375, 0.625, 0.75] and found["seeds"] == [1, 2, 3] and found["effect"] == 0.583333
    assert found["low"] == pytest.approx(0.109009, abs=2e-6) and found["high"] == pytest.approx(1.057657, abs=2e-6)
    assert found["verdict"] == "holds" and found["command"] == "python -m flows.study --seeds 3" and "note" not in found
    assert found["metric"] == f"0.5 {GREEDY} + 0.5 {OUT} of rso - sft" and found["test"] == "above 0"
    required = ["paper", "claim", "published", "metric", "effect", "low", "high", "verdict", "seeds", "command"]
    assert list(found)[: len(required)] == required and set(found) - set(required) == {"test", "by_seed", "post_hoc"}


def test_a_run_with_fewer_seeds_limits_its_claims() -> None:
    found = judge(claim(effect={"rso": 1, "b:rso": -1}, metric={OUT: 1}), STUDY, FIGURES, 3)
    assert found["seeds"] == [1, 2] and found["by_seed"] == [0.5, 0.625]


def test_one_seed_settles_nothing() -> None:
    found = judge(claim(), STUDY, FIGURES, 1)
    assert (found["effect"], found["low"], found["high"], found["verdict"]) == (0.375, None, None, "not settled")
    assert "two seeds" in found["note"]


@pytest.mark.parametrize(
    ("effect", "metric", "said"),
    [
        ({"raft": 1}, {OUT: 1}, f"{OUT} of raft, seed 1"),
        ({"rso": 1}, {"in_domain/self_reward_auc": 1}, "in_domain/self_reward_auc of rso, seed 1"),
        ({"a:rso": 1}, {OUT: 1}, "a of seed 4"),
    ],
)
def test_a_missing_figure_leaves_a_claim_open_and_is_named(
    effect: dict[str, float], metric: dict[str, float], said: str
) -> None:
    found = judge(claim(effect=effect, metric=metric), STUDY, FIGURES, 4)
    assert (found["effect"], found["low"], found["high"], found["by_seed"]) == (None, None, None, [])
    assert found["verdict"] == "not settled" and said in found["note"]


def test_the_page_has_a_table_a_paper_and_counts_the_verdicts() -> None:
    claims = [claim(), claim("within", 0.03), claim(effect={"raft": 1})]
    other = Claim("2406.19185", "rewards", "more", {"rso": 1}, {"in_domain/self_reward": 1}, "above", 0.0)
    text = document([(one, judge(one, STUDY, FIGURES, 3)) for one in (*claims, other)], 3, "commit abc")
    assert "4 claims: holds 2, does not hold 1, not settled 1." in text and "commit abc" in text
    assert headline(text).startswith("4 claims: holds 2")
    assert (
        text.count("| claim | published | effect | verdict |") == 2
        and "## Contrastive policy gradient (CoPG) (2406.19185)" in text
    )
    assert "| direction only | +58.3 [+10.9, +105.8], 3 seeds | **holds** |" in text
    assert "| more | +0.750 [+0.129, +1.371] nats, 3 seeds | **holds** |" in text
    assert "not settled: no figures: " in text


def test_a_claim_made_after_its_figures_and_a_note_are_shown() -> None:
    later = replace(claim(), post_hoc=True, note="few steps")
    found = judge(later, STUDY, FIGURES, 3)
    assert found["post_hoc"] is True and judge(claim(), STUDY, FIGURES, 3)["post_hoc"] is False
    assert "| **holds** (*post hoc*): few steps |" in document([(later, found)], 3, "commit abc")
    alone = judge(later, STUDY, FIGURES, 1)
    assert alone["note"] == "an interval takes two seeds; few steps"


def test_effects_of_shares_are_in_points() -> None:
    assert (
        effect_cell(claim(metric={"in_domain/kl_to_sft": 1}), {"effect": 0.25, "low": None, "seeds": [1]})
        == "+0.250 nats, 1 seed"
    )
    gap = claim(metric={"bt_reward_prompt_gap": 1})
    assert effect_cell(gap, {"effect": 0.25, "low": None, "seeds": [1]}) == "+0.250, 1 seed"  # of scores as of rewards
    assert effect_cell(claim(), {"effect": -0.0001, "low": -0.25, "high": 0.0, "seeds": [1, 2]}) == "0.0 [−25.0, 0.0], 2 seeds"
    shares = ("judge_flip_rate", "gate", "other_advantage", "accuracy_at_0.5", "tokens", GREEDY, "in_domain/self_reward")
    assert [is_share(name) for name in shares] == [True, True, True, True, False, True, False]


def test_the_table_of_results_has_each_model_with_its_interval() -> None:
    figures: Figures = {
        "main": {
            "1": {"sft": {GREEDY: 0.5, "validation/held_out_loss": 0.25}, "rso": {GREEDY: 0.9}},
            "2": {"sft": {GREEDY: 0.52, "validation/held_out_loss": 0.25}, "rso": {GREEDY: 1.0}},
        }
    }
    text = results(figures, {"sft": "none", "rso": "verifier"}, 2)
    assert text.startswith("Means over 2 seeds with 95% intervals")
    # sft: mean 51, s = 0.0141421, half width 12.7062 s / sqrt(2) = 12.7; rso: its ends are cut at 0 and 1
    assert "| `sft` | none | 51 [38, 64] |  |  |  |  |  | 0.250 [0.250, 0.250] |  |" in text
    assert "| `rso` | verifier | 95 [31, 100] |" in text
    assert "| `sft` | none | 50 |" in results(figures, {"sft": "none"}, 1)
    assert over_seeds(figures, "main", "raft", GREEDY, 2) is None
    with pytest.raises(StudyError, match="main run"):
        results({}, {"sft": "none"}, 2)


def test_the_table_goes_between_its_markers(tmp_path: Any) -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert put(text, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n" == put(put(text, "other"), "new")
    for wrong in ("no markers", f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}", BEGIN):
        path = tmp_path / "README.md"
        path.write_text(wrong)
        with pytest.raises(StudyError, match="once each"):
            renew_readme("table", path)
        assert path.read_text() == wrong


def test_readme_has_the_table_that_the_figures_give() -> None:
    text = README.read_text(encoding="utf-8")
    if PATH.is_file():
        figures = read_figures()
        labels = learned_from(main_models(read_params()), read_stages())
        table = results(figures, labels, count_seeds(read_study(), figures))
        assert put(text, table) == text, "python -m flows.study --report-only renews it"
    else:
        assert BEGIN not in text, "README.md has a place for results, and study/figures.json is missing"


LABELS = {"sft": "none", "rso": "verifier"}
OVER_RUNS = Plot("accuracy_against_rso_beta", ("a", "b", "main"), (0.1, 0.5, 2.0), (OUT,), ("rso",))
OVER_MODELS = Plot("accuracy_against_reward", ("main",), GREEDY, (OUT,), None)


def test_a_plot_over_models_has_a_named_dot_for_each() -> None:
    picture = draw(OVER_MODELS, FIGURES, {**LABELS, "raft": "none"}, 3)
    assert picture is not None and picture == draw(OVER_MODELS, FIGURES, {**LABELS, "raft": "none"}, 3)
    assert picture.count('class="mean"') == 2 + 2  # two models, two groups in the legend
    assert ">sft</text>" in picture and ">rso</text>" in picture and "no figure: raft" in picture
    assert ">demonstrations alone</text>" in picture and ">with the verifier</text>" in picture


def test_a_plot_over_runs_joins_the_means_and_shows_the_seeds() -> None:
    picture = draw(OVER_RUNS, FIGURES, LABELS, 3)
    assert picture is not None
    assert picture.count('class="seed"') == 3 + 2 + 3 and picture.count('class="mean"') == 3 + 1
    (line,) = [part.split('"')[0] for part in picture.split('<polyline class="line" points="')[1:]]
    xs = [float(point.split(",")[0]) for point in line.split()]
    assert xs[1] - xs[0] > xs[2] - xs[1] > 0  # 0.1, 0.5, 2 on a logarithmic axis: ratios of 5 and 4
    ys = [float(point.split(",")[1]) for point in line.split()]
    assert ys[2] < ys[0] < ys[1]  # means 0.25, 0.0625, 0.75; up is less
    fewer = draw(OVER_RUNS, FIGURES, LABELS, 1)
    assert fewer is not None and fewer.count('class="seed"') == 3


def test_a_whisker_is_the_interval() -> None:
    picture = draw(OVER_RUNS, {"a": {"1": names(0.5, 0), "2": names(0.7, 0)}, "b": {"1": names(0.1, 0)}}, LABELS, 2)
    assert picture is not None
    whiskers = [part.split("/>")[0] for part in picture.split('<line class="whisker" ')[1:]]
    heights = [abs(float(one.split('y1="')[1].split('"')[0]) - float(one.split('y2="')[1].split('"')[0])) for one in whiskers]
    # a: half width 12.7062 x 0.1 x 100 = 127 points each way; b: one seed, none. The axis spans it with 6% room
    assert heights[0] == pytest.approx(418 / 1.12, abs=0.2) and heights[1] == 0


def test_figures_of_the_seed_that_settings_were_developed_on_enter_nothing() -> None:
    more: Figures = {run: {"0": names(0.0, 1.0), **seeds} for run, seeds in FIGURES.items()}
    assert judge(claim(), STUDY, more, 3) == judge(claim(), STUDY, FIGURES, 3)
    assert results(more, LABELS, 3) == results(FIGURES, LABELS, 3)
    for plot in (OVER_RUNS, OVER_MODELS):
        assert draw(plot, more, LABELS, 3) == draw(plot, FIGURES, LABELS, 3) is not None
    assert count_seeds(STUDY, more) == count_seeds(STUDY, FIGURES) == 3
    assert count_seeds(STUDY, {"main": {"0": {}}}) == count_seeds(STUDY, {}) == 0


def test_fresh_seeds_are_compared_among_themselves() -> None:
    """Two runs that begin at seed 6, with the figures of two that begin at 1."""
    runs = RUNS | {f"late_{name}": replace(RUNS[name], name=f"late_{name}", first_seed=6) for name in ("a", "b")}
    late: Figures = {f"late_{name}": {f"{int(seed) + 5}": own for seed, own in FIGURES[name].items()} for name in ("a", "b")}
    study, figures = Study(runs, (), ()), FIGURES | late
    found = judge(claim(effect={"late_a:rso": 1, "late_b:rso": -1}), study, figures, 3)
    assert (found["seeds"], found["by_seed"]) == ([6, 7], [0.25, 0.125])
    assert count_seeds(study, late) == 3


def test_a_plot_without_figures_is_not_drawn() -> None:
    assert draw(OVER_RUNS, {}, LABELS, 3) is None and draw(OVER_MODELS, {}, LABELS, 3) is None


def test_every_plot_of_this_project_is_drawn_from_full_figures() -> None:
    study, params = read_study(), read_params()
    metrics = {name: 0.5 for plot in study.plots for name in (*plot.y, *([plot.x] if isinstance(plot.x, str) else []))}
    figures = {run: {"1": dict.fromkeys(main_models(params), metrics)} for run in study.runs}
    for plot in study.plots:
        picture = draw(plot, figures, dict.fromkeys(main_models(params), "none"), 1)
        assert picture is not None and picture.count('class="mean"') > 1 and "no figure" not in picture
