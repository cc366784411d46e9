"""Children in groups of their own: lines, exit codes, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import process
from tests.toy import runs, wait_for

STUBBORN = (
    "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)"
)


@pytest.fixture(autouse=True)
def _started_afresh() -> Iterator[None]:
    process.allow()
    yield
    process.allow()


DEAF = (
    "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True)\n"
    "signal.signal(signal.SIGINT, lambda *_: print('asked', flush=True))\nwhile True: time.sleep(0.1)"
)


def run(code: str, folder: Path, said: list[str], patience: float = 1.0) -> int:
    return process.run([sys.executable, "-c", code], folder, dict(os.environ), said.append, patience)


def test_lines_come_as_they_are_printed_and_the_code_is_returned(tmp_path: Path) -> None:
    said: list[str] = []
    assert run("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)", tmp_path, said) == 3
    assert said == ["one", "two"]


def test_what_a_child_leaves_running_in_its_group_is_ended(tmp_path: Path) -> None:
    code = "import subprocess; p = subprocess.Popen(['sleep', '300']); print(p.pid)"
    said: list[str] = []
    assert run(code, tmp_path, said) == 0
    assert not runs(int(said[0]))


def stop_while_running(code: str, folder: Path, patience: float = 1.0) -> tuple[list[str], list[BaseException]]:
    said: list[str] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            run(code, folder, said, patience)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: said)
    process.stop_all()
    thread.join(20)
    assert not thread.is_alive()
    return said, raised


def test_stop_all_ends_a_child_that_ignores_ctrl_c_and_its_own_child(tmp_path: Path) -> None:
    code = (
        f"import subprocess, sys; {STUBBORN}; p = subprocess.Popen([sys.executable, '-c', '''{STUBBORN}; time.sleep(300)''']);"
    )
    said, raised = stop_while_running(code + "print(p.pid, os.getpid()); time.sleep(300)", tmp_path)
    assert [runs(int(pid)) for pid in said[0].split()] == [False, False]
    assert isinstance(raised[0], process.Stopped)


def test_a_child_told_to_stop_may_end_in_its_own_way(tmp_path: Path) -> None:
    code = "import time\ntry:\n print('up')\n time.sleep(300)\nexcept KeyboardInterrupt:\n open('saved', 'w')"
    stop_while_running(code, tmp_path)
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_step_may_take_its_time_and_is_asked_once(tmp_path: Path) -> None:
    """Longer than a group has where its starter names no time; what asks twice would be seen."""
    seconds, asked = process.PATIENCE + 2, "lambda *_: print('asked', flush=True)"
    code = f"import signal, time; signal.signal(2, {asked}); signal.signal(15, {asked}); print('up', flush=True); "
    code += f"end = time.monotonic() + {seconds}\nwhile time.monotonic() < end: time.sleep(0.1)\nopen('saved', 'w')"
    said, _raised = stop_while_running(code, tmp_path, patience=60.0)
    assert (tmp_path / "saved").exists() and said == ["up", "asked"]


def stopped(folder: Path, said: list[str]) -> None:
    with pytest.raises(process.Stopped):
        run(DEAF, folder, said, 60.0)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    working = threading.Thread(target=stopped, args=[tmp_path, said])
    working.start()
    wait_for(lambda: said)
    threading.Thread(target=lambda: (wait_for(lambda: "asked" in said), os.kill(os.getpid(), signal.SIGINT))).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        process.stop_all()
    working.join(20)
    assert not working.is_alive() and not runs(int(said[0])) and time.monotonic() - began < 30


def test_what_asked_a_child_does_not_ask_again_when_it_is_killed(tmp_path: Path) -> None:
    """As Prefect kills a flow some time after it asked it to stop: the stage has what is left of its time."""
    (tmp_path / "train.py").write_text(
        "import os, signal, time\nasked = []\nsignal.signal(2, lambda *_: asked.append(1))\n"
        "open('pid', 'w').write(str(os.getpid()))\n"
        "while not asked: time.sleep(0.05)\nopen('asked', 'w')\ntime.sleep(3)\nopen('saved', 'w').write(str(len(asked)))\n"
    )
    code = "import os, pathlib, signal, sys, threading; from tasks import process; "
    code += "signal.signal(15, lambda *_: threading.Thread(target=process.stop_all).start()); "
    code += f"process.run([sys.executable, 'train.py'], pathlib.Path({str(tmp_path)!r}), dict(os.environ), print, 60.0)"
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    owner.terminate()
    wait_for((tmp_path / "asked").exists)
    owner.kill()
    owner.wait()
    wait_for(lambda: not runs(int((tmp_path / "pid").read_text())))
    assert (tmp_path / "saved").read_text() == "1"


def test_nothing_starts_after_stop_all_until_it_is_allowed(tmp_path: Path) -> None:
    process.stop_all()
    with pytest.raises(process.Stopped):
        run("print('ran')", tmp_path, [])
    process.allow()
    assert run("print('ran')", tmp_path, []) == 0


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_children_end_with_the_process_that_started_them(tmp_path: Path, sign: signal.Signals) -> None:
    """The trainer may save first, what it prints then going nowhere; its own child goes too."""
    (tmp_path / "train.py").write_text(
        "import os, subprocess, time\nother = subprocess.Popen(['sleep', '300'])\n"
        "open('pids', 'w').write(f'{os.getpid()} {other.pid} {os.getppid()}')\n"
        "try:\n    print('up', flush=True)\n    time.sleep(300)\n"
        "except KeyboardInterrupt:\n    print('saving', flush=True)\n    open('saved', 'w')\n"
    )
    code = "import os, pathlib, sys; from tasks import process; "
    code += f"process.run([sys.executable, 'train.py'], pathlib.Path({str(tmp_path)!r}), dict(os.environ), print)"
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen([sys.executable, "-u", "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert owner.stdout and owner.stdout.readline() == "up\n"
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    owner.send_signal(sign)
    owner.wait()
    wait_for(lambda: not any(runs(pid) for pid in pids))
    assert (tmp_path / "saved").exists()


def test_what_obeys_nothing_is_killed_with_its_group(tmp_path: Path) -> None:
    """A keeper whose command obeys Ctrl-C and leaves a child that obeys nothing."""
    quick = "process.KILL = ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0))"
    leave = f"import subprocess, sys; {STUBBORN}; print(os.getpid(), flush=True); time.sleep(300)"
    command = ["sh", "-c", f'"{sys.executable}" -c "{leave}" & exec sleep 300']
    code = f"import signal; from tasks import process; {quick}; process._keep(1.0, {command!r})"
    keeper = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert keeper.stdin and keeper.stdout
    stubborn = int(keeper.stdout.readline())
    keeper.stdin.close()
    assert keeper.wait(20) == -signal.SIGINT  # of its command
    wait_for(lambda: not runs(stubborn))


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_child_that_a_signal_ended_says_so(tmp_path: Path, sign: signal.Signals) -> None:
    code = f"import os, signal; signal.signal({int(sign)}, signal.SIG_DFL) if {sign != signal.SIGKILL} else 0; "
    assert run(code + f"os.kill(os.getpid(), {int(sign)})", tmp_path, []) == -sign


def test_the_living_of_a_group_are_found_without_proc_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are those that nobody waited for, such as the `true` of this shell, which becomes `sleep`."""
    words = "true & echo $!; sleep 300 & echo $!; exec sleep 300"
    leader = subprocess.Popen(["sh", "-c", words], start_new_session=True, stdout=subprocess.PIPE, text=True)
    dead, other = int(leader.stdout.readline()), int(leader.stdout.readline())
    wait_for(lambda: not runs(dead))
    wait_for(lambda: process._members(leader.pid) == {leader.pid, other})
    monkeypatch.setattr(process, "PROC", tmp_path)
    assert process._members(leader.pid) == {leader.pid, other}
    os.killpg(leader.pid, signal.SIGKILL)
    wait_for(lambda: not process._members(leader.pid))
    leader.wait()
