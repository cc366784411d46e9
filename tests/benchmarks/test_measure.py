"""The measuring itself: turns, ratios of the same round, sides in processes of their own."""

from typing import Any, Self

import pytest

from benchmarks import measure
from benchmarks.measure import BenchmarkError, Measured, Run, Side, Worker, alternate, ratio, spread, summary


def measured(cpu: list[float], wall: list[float], peak: float) -> Measured:
    return Measured([Run(c, w, {"tokens": c}) for c, w in zip(cpu, wall, strict=True)], peak, 1.0)


def test_sides_take_turns_and_warm_up_rounds_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []
    closed: list[str] = []

    class Noted:
        def __init__(self, side: Side) -> None:
            self.name = side.target

        def run(self, repeat: int) -> dict[str, Any]:
            turns.append((self.name, repeat))
            return {"cpu": float(repeat), "wall": 2.0 * repeat, "figures": {}, "peak_mib": 10.0 + repeat, "begun_mib": 1.0}

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            closed.append(self.name)

    monkeypatch.setattr(measure, "Worker", Noted)
    found = alternate({"ours": Side("a"), "theirs": Side("b")}, runs=2, warm_up=1)
    assert turns == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [run.cpu for run in found["ours"].runs] == [1.0, 2.0]
    assert (found["theirs"].peak_mib, sorted(closed)) == (12.0, ["a", "b"])


def test_a_ratio_is_taken_round_by_round() -> None:
    peer, ours = measured([4.0, 9.0, 10.0], [8.0, 8.0, 8.0], 200.0), measured([2.0, 3.0, 10.0], [2.0, 4.0, 8.0], 50.0)
    found = ratio(peer, ours)
    assert (found["median"], found["low"], found["high"], found["runs"]) == (2.0, 1.0, 3.0, 3)  # 2, 3, 1
    assert found["wall"] == {"median": 2.0, "low": 1.0, "high": 4.0}
    assert found["memory_share"] == 0.25


def test_ratios_of_different_numbers_of_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio(measured([1.0], [1.0], 1.0), measured([1.0, 1.0], [1.0, 1.0], 1.0))


def test_spread_and_summary() -> None:
    assert spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "low": 1.0, "high": 10.0}
    found = summary(measured([1.0, 5.0, 2.0], [1.0, 5.0, 2.0], 7.0))
    assert found == {"cpu": [1.0, 5.0, 2.0], "wall": [1.0, 5.0, 2.0], "peak_mib": 7.0, "begun_mib": 1.0, "tokens": 2.0}


def test_a_worker_times_each_repeat_in_a_process_of_its_own() -> None:
    with Worker(Side("tests.benchmarks.sides:sleeper", {"seconds": 0.2})) as worker:
        first, second, said = worker.run(0), worker.run(1), worker.said()
    assert (first["figures"], second["figures"]) == ({"repeat": 0.0}, {"repeat": 1.0})
    assert second["wall"] >= 0.2 > 10 * second["cpu"]
    assert second["peak_mib"] >= second["begun_mib"] > 1
    assert "noise" in said


@pytest.mark.parametrize("tidy", [True, False])
def test_what_a_repeat_left_behind_is_collected_where_memory_is_compared(tidy: bool) -> None:
    with Worker(Side("tests.benchmarks.sides:littering", tidy=tidy)) as worker:
        left = [worker.run(repeat)["figures"]["left"] for repeat in range(3)]
    assert left == ([0, 0, 0] if tidy else [0, 1, 2])


def test_a_side_that_fails_is_told_with_its_reason() -> None:
    with pytest.raises(BenchmarkError, match=r"sides:failing .* ended in repeat 1:(.|\n)*no second time"):
        alternate({"ours": Side("tests.benchmarks.sides:failing")}, runs=1)
