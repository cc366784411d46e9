"""results.json, results.md and the table in README.md."""

import json
from pathlib import Path

from benchmarks.measure import ROOT, Measured, Run, exponent
from benchmarks.results import FILE, Results, judged, merged, with_table


def entry(median: float, memory: float) -> dict[str, object]:
    wall = {"median": 1.0, "low": 1.0, "high": 1.0}
    return {"median": median, "low": 1.0, "high": 9.0, "runs": 5, "wall": wall, "memory_share": memory}


def side(cpu: float, peak: float) -> Measured:
    return Measured([Run(cpu, cpu, {"tokens": 10.0})] * 3, peak, 1.0)


def test_one_family_replaces_its_own_figures_alone() -> None:
    old = {
        "ratios": {"ppo/a/x": 1, "ppo/gone/x": 2, "sft/a/x": 3},
        "correctness": {"ppo": {"rewards": 0.0}},
        "measured": {"sft": {"commit": "abc"}},
    }
    found = merged(old, "ppo", {"ratios": {"ppo/a/x": 9}, "sides": {}, "figures": {}, "correctness": {}})
    assert found["ratios"] == {"ppo/a/x": 9, "sft/a/x": 3}
    assert (found["correctness"], found["measured"]) == ({}, {"sft": {"commit": "abc"}})
    assert old["ratios"]["ppo/gone/x"] == 2


def test_a_bar_is_missed_by_time_or_by_memory() -> None:
    key = "ppo/wide_forced/trl_as_shipped"
    met = [judged(key, entry(*values))["bar"]["met"] for values in ((2.5, 0.4), (2.4, 0.4), (2.5, 0.41))]
    assert met == [True, False, False]
    assert "bar" not in judged("rejection/paper_listing", entry(0.1, 9.0))


def test_saved_results_hold_ratios_sides_and_a_table(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nafter\n")
    for family, cpu in (("sft", 2.0), ("dpo", 3.0), ("sft", 4.0)):
        results = Results(family, tmp_path / "results.json", readme)
        results.compare(f"{family}/tiny", {"ours": side(1.0, 50.0), "trl": side(cpu, 100.0)})
        results.save()
    whole = json.loads((tmp_path / "results.json").read_text())
    assert {key: value["median"] for key, value in whole["ratios"].items()} == {"sft/tiny/trl": 4.0, "dpo/tiny/trl": 3.0}
    assert whole["sides"]["sft/tiny/ours"]["cpu"] == [1.0, 1.0, 1.0]
    assert set(whole["measured"]) == {"sft", "dpo"}
    row = "| sft/tiny/trl | 4.00 [4.00, 4.00] | 4.00 [4.00, 4.00] | 0.50 | 3 | at least 1.2, memory at most 1: met |"
    assert row in (tmp_path / "results.md").read_text()
    text = readme.read_text()
    assert row in text and "old" not in text and text.startswith("before") and text.endswith("after\n")


def test_the_table_in_readme_is_that_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(text, json.loads(FILE.read_text())) == text


def test_the_exponent_of_a_power_is_its_own() -> None:
    assert abs(exponent({10: 3.0, 100: 300.0, 1000: 30000.0}) - 2.0) < 1e-9
    assert abs(exponent({1: 5.0, 64: 5.0})) < 1e-9
