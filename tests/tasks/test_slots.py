"""Places for torch stages."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apprentice.config import Params
from tasks import process, slots


def test_as_many_places_as_cores_over_threads_and_at_least_one(
    params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "cuda_devices", list)
    for cores, threads, expected in ((8, 2, 4), (9, 2, 4), (2, 4, 1)):
        monkeypatch.setattr(slots, "cores", lambda cores=cores: cores)
        assert len(slots.slots_of(params(**{"compute.threads": threads})).places) == expected


def test_one_place_for_each_gpu_with_its_device(params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert slots.slots_of(params()).places == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    three = slots.slots_of(params(**{"runtime.parallel_stages": 3})).places
    assert [place["CUDA_VISIBLE_DEVICES"] for place in three] == ["2", "5", "2"]
    assert slots.slots_of(params(**{"compute.device": "cpu", "runtime.parallel_stages": 2})).places == [{}, {}]


def test_a_place_has_a_gpu_or_cores_for_each_process_of_a_stage(
    params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,6,7,1")
    pairs = slots.slots_of(params(**{"compute.processes": 2})).places
    assert [place["CUDA_VISIBLE_DEVICES"] for place in pairs] == ["2,5", "6,7"]
    whole = slots.slots_of(params(**{"compute.processes": 5, "runtime.parallel_stages": 2})).places
    assert [place["CUDA_VISIBLE_DEVICES"] for place in whole] == ["2,5,6,7,1"] * 2
    with pytest.raises(ValueError, match=r"compute\.processes: 6 processes need a CUDA device each, and 5 can be seen"):
        slots.slots_of(params(**{"compute.processes": 6}))
    monkeypatch.setattr(slots, "cores", lambda: 8)
    on_cpu = {"compute.device": "cpu", "compute.threads": 2}
    for size, expected in ((1, 4), (2, 2), (4, 1), (8, 1)):
        assert slots.slots_of(params(**on_cpu, **{"compute.processes": size})).places == [{}] * expected


def test_hidden_gpus_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots.cuda_devices() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert slots.cuda_devices() == []


def test_a_torch_stage_waits_until_a_place_is_free_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "PATIENCE", 0.1)
    one, said, entered = slots.Slots([{"CUDA_VISIBLE_DEVICES": "0"}]), [], threading.Event()

    def second() -> None:
        with one.take(True, said.append):
            entered.set()

    with one.take(True, said.append) as place:
        assert place == {"CUDA_VISIBLE_DEVICES": "0"} and said == []
        with one.take(False, said.append) as none:
            assert none == {}
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.5)
    assert entered.wait(5)
    assert "waiting for a place" in said[0]
    thread.join()


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of the warm Python, a stand-in whose folder is /warm."""
    happened: list[str] = []

    @contextmanager
    def stand_in(patience: float) -> Iterator[Path]:
        happened.append(f"started, {patience:g} s to end")
        yield Path("/warm")
        happened.append("ended")

    monkeypatch.setattr(slots, "warm_python", stand_in)
    monkeypatch.setattr(slots.sys, "platform", "linux")
    monkeypatch.setenv("PATH", "/bin")
    return happened


def test_torch_stages_are_forked_from_a_warm_python_and_others_are_not(warm: list[str]) -> None:
    one = slots.Slots([{}])
    with one.warm():
        with one.take(True, print) as place, one.take(False, print) as none:
            assert place == {"PATH": "/warm:/bin"} and none == {}
        assert warm == ["started, 60 s to end"]
    with one.take(True, print) as place:
        assert place == {} and warm == ["started, 60 s to end", "ended"]


@pytest.mark.parametrize(("places", "platform"), [([{"CUDA_VISIBLE_DEVICES": "0"}], "linux"), ([{}], "darwin")])
def test_none_is_forked_where_a_gpu_is_or_may_be(
    warm: list[str], monkeypatch: pytest.MonkeyPatch, places: list[slots.Place], platform: str
) -> None:
    monkeypatch.setattr(slots.sys, "platform", platform)
    some = slots.Slots(places)
    with some.warm(), some.take(True, print) as place:
        assert place == places[0] and warm == []


def test_waiting_ends_when_everything_is_stopped() -> None:
    one = slots.Slots([{}])
    with one.take(True, print):
        process.stop_all()
        try:
            with pytest.raises(process.Stopped), one.take(True, print):
                pass
        finally:
            process.allow()
