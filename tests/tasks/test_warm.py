"""Programs forked from the warm Python: they run as if started anew, and end with their callers."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import process
from tasks.warm import warm_python
from tests.toy import runs, wait_for

pytestmark = pytest.mark.slow  # loads torch and transformers once
ECHO = """import os, sys
print(os.getcwd(), sys.argv[1:], os.environ["WORD"], "torch" in sys.modules, "tasks" in sys.modules)
print(sys.stdin.read(), file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    """The folder of a `python` that stands for a warm one."""
    with warm_python(20.0) as folder:
        yield folder


def command(python: Path, *words: str) -> list[str]:
    return [str(python / "python"), *words]


@pytest.mark.parametrize("words", [("-m", "echo"), ("echo.py",)])
def test_a_program_has_its_callers_arguments_folder_environment_and_streams(
    python: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "echo.py").write_text(ECHO)
    environment = {**os.environ, "WORD": "x y"}
    done = subprocess.run(
        command(python, *words, "a b", "c"), cwd=tmp_path, env=environment, input="said", capture_output=True, text=True
    )
    assert done.returncode == 7 and done.stdout == f"{tmp_path} ['a b', 'c'] x y True False\n" and done.stderr == "said\n"


def test_each_program_sees_the_code_of_its_own_folder(python: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"print('{name}')")
        assert subprocess.check_output(command(python, "-m", "mine"), cwd=tmp_path / name, text=True) == f"{name}\n"


@pytest.mark.parametrize(
    ("line", "code"), [("", 0), ("raise SystemExit('why')", 1), ("1 / 0", 1), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_the_exit_code_is_the_programs(python: Path, tmp_path: Path, line: str, code: int) -> None:
    (tmp_path / "end.py").write_text(line)
    done = subprocess.run(command(python, "-m", "end"), cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == code
        and ("ZeroDivisionError" in done.stderr) == (line == "1 / 0")
        and ("why" in done.stderr) == ("why" in line)
    )


SAVING = """import os, signal, sys, time
def save(number, _):
    print("saving", number, flush=True)
    if number == signal.SIGTERM:
        sys.exit(143)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
print(os.getpid(), flush=True)
while True:
    time.sleep(0.1)
"""


def test_a_program_is_told_what_its_caller_is_told_and_may_save_first(python: Path, tmp_path: Path) -> None:
    (tmp_path / "save.py").write_text(SAVING)
    caller = subprocess.Popen(command(python, "-m", "save"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert caller.stdout
    program = int(caller.stdout.readline())
    for sign in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        assert runs(program) and caller.poll() is None
        caller.send_signal(sign)
        assert caller.stdout.readline() == b"saving %d\n" % sign
    assert caller.wait(20) == 143 and not runs(program) and caller.stdout.read() == b""


def test_a_program_whose_dvc_is_killed_is_asked_once_and_saves(python: Path, tmp_path: Path) -> None:
    """The caller's keeper asks it (tasks/process.py); `dvc` is here the caller's parent."""
    (tmp_path / "train.py").write_text(
        "import os, signal, time\nasked = []\nsignal.signal(2, lambda *_: asked.append(1))\nprint(os.getpid(), flush=True)\n"
        "while not asked: time.sleep(0.05)\ntime.sleep(3)\nopen('saved', 'w').write(str(len(asked)))\n"
    )
    dvc = f"import os, subprocess; print(os.getpid(), flush=True); subprocess.run({command(python, 'train.py')!r})"
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            os.kill(int(said[0]), signal.SIGKILL)

    assert process.run([sys.executable, "-c", dvc], tmp_path, dict(os.environ), hear, 20.0) == -signal.SIGKILL
    wait_for(lambda: not runs(int(said[1])))
    assert (tmp_path / "saved").read_text() == "1"


def test_a_program_that_was_asked_is_killed_with_its_caller(python: Path, tmp_path: Path) -> None:
    """So a flow that is stopped twice is not held up by one that does not listen."""
    (tmp_path / "deaf.py").write_text(SAVING.replace("sys.exit(143)", "pass"))
    caller = subprocess.Popen(command(python, "-m", "deaf"), cwd=tmp_path, stdout=subprocess.PIPE)
    assert caller.stdout
    program = int(caller.stdout.readline())
    caller.send_signal(signal.SIGINT)
    assert caller.stdout.readline() == b"saving 2\n"
    caller.kill()
    caller.wait()
    wait_for(lambda: not runs(program), 15)


def test_nothing_is_loaded_where_no_program_comes() -> None:
    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    with warm_python(20.0):
        pass
    assert used() - before < 1.0  # torch alone takes more


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_program_ends_with_its_caller(python: Path, tmp_path: Path, sign: signal.Signals) -> None:
    (tmp_path / "wait.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(300)")
    caller = subprocess.Popen(command(python, "-m", "wait"), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert caller.stdout
    program = int(caller.stdout.readline())
    assert runs(program)
    caller.send_signal(sign)
    caller.wait(60)
    wait_for(lambda: not runs(program))


def test_other_words_are_refused(python: Path) -> None:
    done = subprocess.run(command(python, "-c", "print(1)"), capture_output=True, text=True)
    assert done.returncode == 1 and "`-m module ...`" in done.stderr and done.stdout == ""


def test_it_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    code = "import time; from tasks.warm import warm_python\nwith warm_python(20.0) as p: print(p, flush=True); time.sleep(300)"
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    folder = Path(owner.stdout.readline().strip())
    owner.kill()
    owner.wait()
    (tmp_path / "x.py").write_text("")
    until = time.monotonic() + 10
    while time.monotonic() < until:
        done = subprocess.run(command(folder, "-m", "x"), cwd=tmp_path, capture_output=True, text=True)
        if done.returncode:
            break
    assert "refused" in done.stderr.lower()
