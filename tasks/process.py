"""A child process in a group of its own: its lines as they come, and an end that takes the whole group along.

`dvc repro` ignores SIGINT while its command runs and leaves the command behind when it is itself terminated, so signals go
to the group; and a child that is not waited for still counts as a living holder of DVC's locks, so it always is.

Each group is led by a keeper, this file run as a program: it notices when the process that started it is gone, however that
ended (SIGKILL included), and then ends the group too.
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
GRACE = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))  # signal, seconds to obey it

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
        _stop(list(_live), GRACE[-1:])
        raise


def run(command: Sequence[str], cwd: Path, env: dict[str, str], say: Callable[[str], None]) -> int:
    """Run a command to its end, handing each line it prints to `say`; its exit code (negative: ended by a signal).

    Raises `Stopped` when `stop_all` ended it; any exception in this thread (Ctrl-C, a cancelled task) ends the group too.
    """
    if _stopping.is_set():
        raise Stopped(" ".join(command))
    child = start(command, cwd, {**env, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"})
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


def start(command: Sequence[str], cwd: Path, env: dict[str, str]) -> "subprocess.Popen[str]":
    """Start a command in a group of its own that ends with this process, or when the child's `stdin` is closed.

    Both of its streams come from the child's `stdout`.
    """
    reading, writing = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *command],
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


def _stop(children: "Sequence[subprocess.Popen[str]]", steps: Sequence[tuple[signal.Signals, float]] = ()) -> None:
    """Signal whole groups, ever harder, until nothing of them is left; children that ended cleanly are only reaped."""
    for sign, seconds in steps or GRACE:
        groups = [child for child in children if _alive(child)]
        if not groups:
            return
        for child in groups:
            try:
                os.killpg(child.pid, sign)
            except (ProcessLookupError, PermissionError):
                continue
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(_alive(child) for child in groups):
            time.sleep(0.05)


def _alive(child: "subprocess.Popen[str]") -> bool:
    """Whether the child (reaped here when it has ended) or anything in its group still runs."""
    if child.poll() is None:
        return True
    if (PROC / "self" / "stat").exists():  # Linux: tells the dead that nobody has waited for yet from the living
        return bool(_members(child.pid))
    try:
        os.killpg(child.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _members(group: int) -> set[int]:
    """Ids of the living processes of a group, where /proc tells."""
    return {int(entry.parent.name) for entry in PROC.glob("[0-9]*/stat") if _group_of(entry) == group}


def _group_of(stat: Path) -> int | None:
    """The process group of a living process, from Linux's /proc; None for the dead."""
    try:
        state, _parent, group = stat.read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(group)


def _keep(command: Sequence[str]) -> None:
    """Run a command in this process's group and end as it ends; once standard input is closed, end the group."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: None)  # they are for the command; ignoring them outright would pass on to it
    child, abandoned = subprocess.Popen(command, stdin=subprocess.DEVNULL), threading.Event()
    end = threading.Thread(target=_end_with_owner, args=(child, abandoned), daemon=True)
    end.start()
    code = child.wait()
    if abandoned.is_set():
        end.join()  # others of the group may still run
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    raise SystemExit(code)


def _end_with_owner(child: "subprocess.Popen[bytes]", abandoned: threading.Event) -> None:
    os.read(0, 1)
    abandoned.set()
    for sign, seconds in GRACE:
        os.killpg(0, sign)
        until = time.monotonic() + seconds
        while time.monotonic() < until and (child.poll() is None or _members(os.getpgrp()) - {os.getpid()}):
            time.sleep(0.05)


if __name__ == "__main__":
    _keep(sys.argv[1:])
