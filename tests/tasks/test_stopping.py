"""A stage that is asked to stop, or meets a number that is none: what it saves, says and ends with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Project
from tests.toy import wait_for

STAGE = '''"""A stage of 200 short steps; step $LONG takes a minute, step $BROKEN has no loss, $SIGN shows a bad sign."""
import os, time
from tasks.stage import Stage, run


def main(stage):
    from tasks.resume import StageRecorder

    stage.__dict__["key"] = "0123"
    recorder = StageRecorder(stage)
    saved = recorder.resume()
    for step in range(saved["step"] + 1 if saved else 1, 201):
        time.sleep(60 if os.environ.get("LONG") == str(step) else 0.0 if "QUICK" in os.environ else 0.05)
        loss = float("nan") if os.environ.get("BROKEN") == str(step) else 1.0 / step
        if os.environ.get("SIGN") == str(step):
            recorder.bad_sign(f"step {step} of 200: responses run away in length")
        taken = recorder.takes(f"step {step} of 200", {"loss": loss})
        recorder.step(step, 200, {"loss": loss if taken else None}, lambda: {"step": step})
    recorder.over(lambda: {"step": step})
    stage.metrics({"loss": loss})
    if "SLOW_END" in os.environ:
        print("trained", flush=True)
        time.sleep(60)


run(__name__, main, __doc__)
'''


@pytest.fixture
def place(project: Project) -> Project:
    project.path("tasks/sft.py").write_text(STAGE)
    return project


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "DVC_STAGE": "sft", **more}


def begin(place: Project, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tasks.sft"]
    return subprocess.Popen(command, cwd=place.root, env=environment(**more), stdout=subprocess.PIPE, text=True)


def steps(place: Project) -> list[str]:
    path = place.path("data/reports/sft/history.csv")
    return path.read_text().splitlines()[1:] if path.exists() else []


def snapshot(place: Project) -> Path:
    return place.path(".resume/sft/0123/last/rest.json")


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_the_step_at_hand_and_goes_on_from_there(place: Project, sign: signal.Signals) -> None:
    child = begin(place)
    wait_for(lambda: len(steps(place)) >= 3)
    child.send_signal(sign)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + sign and not place.path("data/reports/sft/metrics.json").exists()
    done = len(steps(place))
    assert 3 <= done < 200 and json.loads(snapshot(place).read_text())["step"] == done
    assert "asked to stop: finishing this step" in said and f"step {done} is saved" in said
    again = begin(place, QUICK="1")
    said, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and f"continuing after step {done} " in said and len(steps(place)) == 200
    assert json.loads(snapshot(place).read_text())["step"] == 200  # until DVC has recorded it
    assert snapshot(place).parents[1].joinpath("finished").exists()


def test_asked_twice_it_stops_at_once(place: Project) -> None:
    child = begin(place, LONG="4")
    wait_for(lambda: len(steps(place)) == 3)
    child.send_signal(signal.SIGTERM)
    assert child.stdout and any("asked to stop" in line for line in iter(child.stdout.readline, ""))
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 143 and not snapshot(place).exists()


def test_when_the_training_is_over_it_stops_at_once(place: Project) -> None:
    child = begin(place, QUICK="1", SLOW_END="1")
    assert child.stdout and any("trained" in line for line in iter(child.stdout.readline, ""))
    child.send_signal(signal.SIGINT)
    assert child.wait(20) == 130


def test_a_number_that_is_none_ends_the_stage_in_a_line_that_says_where_and_what_to_do(place: Project) -> None:
    command = [sys.executable, "-m", "tasks.sft"]
    done = subprocess.run(command, cwd=place.root, env=environment(QUICK="1", BROKEN="7"), capture_output=True, text=True)
    assert done.returncode == 2 and len(steps(place)) == 6
    assert "[sft] NumbersError: step 7 of 200: loss nan\nNothing was trained on it;" in done.stderr
    assert "params.yaml, section `sft`" in done.stderr and "Traceback" not in done.stderr


def test_after_it_stopped_the_rule_to_skip_lets_it_go_on_from_its_last_snapshot(place: Project) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        told = environment(QUICK="1", BROKEN="7")
        return subprocess.run([sys.executable, "-m", "tasks.sft"], cwd=place.root, env=told, capture_output=True, text=True)

    place.set(runtime__checkpoint_steps=1)
    stopped = run()
    assert stopped.returncode == 2 and "runtime.skip_steps" in stopped.stderr
    assert json.loads(snapshot(place).read_text())["step"] == 6 and not place.path("data/reports/sft/metrics.json").exists()
    place.set(runtime__skip_steps=1)
    done = run()
    assert done.returncode == 0 and "continuing after step 6 " in done.stdout
    assert "WARNING: step 7 of 200: loss nan: skipped" in done.stdout
    assert json.loads(place.path("data/reports/sft/metrics.json").read_text()) == {"loss": 1 / 200, "skipped_steps": 1}
    assert steps(place)[5:8] == ["6,0.166667", "7,", "8,0.125"] and len(steps(place)) == 200


def test_a_bad_sign_ends_the_stage_by_the_rule_and_with_the_other_the_same_command_goes_on(place: Project) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        told = environment(QUICK="1", SIGN="7")
        return subprocess.run([sys.executable, "-m", "tasks.sft"], cwd=place.root, env=told, capture_output=True, text=True)

    place.set(runtime__checkpoint_steps=1, runtime__on_bad_sign="stop")
    stopped = run()
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert "[sft] BadSignError: step 7 of 200: responses run away in length\nNothing was trained on it;" in stopped.stderr
    assert json.loads(snapshot(place).read_text())["step"] == 6 and len(steps(place)) == 6
    place.set(runtime__on_bad_sign="warn")
    done = run()
    assert done.returncode == 0 and "continuing after step 6 " in done.stdout and len(steps(place)) == 200
    assert "WARNING: step 7 of 200: responses run away in length" in done.stdout
