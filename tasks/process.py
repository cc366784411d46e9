"""A child process in a group of its own: its lines as they come, and an end that takes the whole group along.

`dvc repro` ignores SIGINT while its command runs and leaves the command behind when it is itself terminated, so signals go
to the group; and a child that is not waited for still counts as a living holder of DVC's locks, so it always is.

Each group is led by a keeper, this file run as a program. It ends the group when its command has ended, when it is told to,
and when the process that started it is gone, however that ended (SIGKILL included). It alone asks, so that nobody is asked
twice: to a stage that means "at once".
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PROC = Path("/proc")
PATIENCE = 20.0  # seconds that a group has to end once it is asked, where its starter names no other
KILL = ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))  # signal, seconds to obey it

_live: set["subprocess.Popen[str]"] = set()
_stopping = threading.Event()


class Stopped(RuntimeError):
    """The child was ended, or never begun, because everything is being stopped."""


def allow() -> None:
    """Let children start again after `stop_all` (a second flow run in one process)."""
    _stopping.clear()


def stopping() -> bool:
    """Whether `stop_all` was called."""
    return _stopping.is_set()


def stop_all() -> None:
    """End every child and its group, and refuse new ones until `allow`. A second Ctrl-C or SIGTERM kills at once."""
    _stopping.set()
    try:
        _stop(list(_live))
    except BaseException:
        _kill(list(_live))
        raise


def run(command: Sequence[str], cwd: Path, env: dict[str, str], say: Callable[[str], None], patience: float = PATIENCE) -> int:
    """Run a command to its end, handing each line it prints to `say`; its exit code (negative: ended by a signal).

    Asked to stop it has `patience` seconds, and is then ended whatever it does. Raises `Stopped` when `stop_all` ended it; any
    exception in this thread (Ctrl-C, a cancelled task) ends the group too.
    """
    if _stopping.is_set():
        raise Stopped(" ".join(command))
    child = start(command, cwd, {**env, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}, patience)
    _live.add(child)
    try:
        for line in _lines(child):
            say(line)
        code = child.wait()
    finally:
        _stop([child])
        _live.discard(child)
    if code and _stopping.is_set():
        raise Stopped(" ".join(command))
    return code


def start(command: Sequence[str], cwd: Path, env: dict[str, str], patience: float = PATIENCE) -> "subprocess.Popen[str]":
    """Start a command in a group of its own that ends with this process, or when the child's `stdin` is closed, then within
    `patience` and some seconds.

    Both of its streams come from the child's `stdout`.
    """
    reading, writing = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(patience), *command],
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE,
            stdout=writing,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            pass_fds=[reading],  # held open by the keeper, so that a command whose reader was killed can still print, and save
        )
    finally:
        os.close(writing)
    child.stdout = os.fdopen(reading, errors="replace")
    return child


def _lines(child: "subprocess.Popen[str]") -> Iterator[str]:
    """Lines as they are printed, until the child and all who write for it are done.

    A thread reads and this one waits in short steps, so that an exception can break in; and a grandchild that outlives the
    child and holds its output open does not keep us.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        for line in child.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if child.poll() is not None and lines.empty():
                return
            continue
        if line is None:
            return
        if line:
            yield line


def _stop(children: "Sequence[subprocess.Popen[str]]") -> None:
    """Have whole groups ended by their keepers; what is left once those are gone is killed."""
    for child in children:
        child.stdin.close()
    for child in children:
        while child.poll() is None:
            time.sleep(0.05)
    _kill(children)


def _kill(children: "Sequence[subprocess.Popen[str]]") -> None:
    """Kill what is left of whole groups and wait for its end."""
    groups = [child for child in children if _alive(child)]
    for child in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    until = time.monotonic() + KILL[-1][1]
    while time.monotonic() < until and any(map(_alive, groups)):
        time.sleep(0.05)


def _alive(child: "subprocess.Popen[str]") -> bool:
    """Whether the child (reaped here when it has ended) or anything in its group still runs."""
    return child.poll() is None or bool(_members(child.pid))


def _members(group: int) -> set[int]:
    """Ids of the living processes of a group: not of the dead that nobody has waited for yet."""
    if (PROC / "self" / "stat").exists():
        return {int(entry.parent.name) for entry in PROC.glob("[0-9]*/stat") if _group_of(entry) == group}
    command = ["ps", "-axo", "pid=,pgid=,state="]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, start_new_session=True).stdout
    found = [line.split() for line in listed.splitlines()]
    return {int(pid) for pid, of, state in found if int(of) == group and state[0] not in "ZX"}


def _group_of(stat: Path) -> int | None:
    """The process group of a living process, from Linux's /proc; None for the dead."""
    try:
        state, _parent, group = stat.read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(group)


def _keep(patience: float, command: Sequence[str]) -> None:
    """Run a command in this process's group, end the group with it or once standard input is closed, and end as it ended."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: None)  # they are for the command; ignoring them outright would pass on to it
    child, ending = subprocess.Popen(command, stdin=subprocess.DEVNULL), threading.Lock()

    def end() -> None:
        with ending:
            _end_group(child, patience)

    def end_with_owner() -> None:
        os.read(0, 1)
        end()

    threading.Thread(target=end_with_owner, daemon=True).start()
    code = child.wait()
    end()
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    raise SystemExit(code)


def _end_group(child: "subprocess.Popen[bytes]", patience: float) -> None:
    """Signal the child and all others of this process's group, ever harder, until nothing of them is left."""

    def left() -> set[int]:
        running = {child.pid} if child.poll() is None else set()
        return running | _members(os.getpgrp()) - {os.getpid()}

    for sign, seconds in ((signal.SIGINT, patience), *KILL):
        for pid in left():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, sign)
        until = time.monotonic() + seconds
        while left() and time.monotonic() < until:
            time.sleep(0.05)


if __name__ == "__main__":
    _keep(float(sys.argv[1]), sys.argv[2:])
