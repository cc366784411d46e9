"""Lock files that let one process at a time through and end with it, and a process that ends with its DVC."""

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import psutil

PARENT = 1.0  # seconds between two looks at the parent
KEPT = {"APPRENTICE_KEPT": "1"}  # the environment of a stage that has a keeper (tasks/process.py)


def hold(path: Path, say: Callable[[str], None]) -> tuple[IO[str], bool]:
    """Take a lock file, waiting for its end when another process has it, which `say` is told.

    Held until the file that is returned is closed, at the latest until this process ends; the second is whether it had to wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file, waited = path.open("a+", encoding="utf-8"), False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        say(f"waiting for another process that does the same: {file.read().strip()}")
        fcntl.flock(file, fcntl.LOCK_EX)
        waited = True
    file.truncate(0)
    print(f"`{' '.join(sys.argv)}` (pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')})", file=file, flush=True)
    return file, waited


def end_with_dvc() -> None:
    """Send this process SIGTERM once the DVC that started it is gone, however and however early that ended.

    A keeper asks it by itself; asked twice, it would stop at once and not save.
    """
    if KEPT.items() <= os.environ.items():
        return
    first = _started_by()

    def watch() -> None:
        while _started_by() == first and _of_this_session(first[1] or first[0]):
            time.sleep(PARENT)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="end with DVC").start()


def _started_by() -> tuple[int, int | None]:
    """The parent; where that is the shell in which DVC runs a command (some shells stay, some become it), its parent too."""
    parent, shell = os.getppid(), Path(os.environ.get("SHELL") or "/bin/sh").name
    try:
        above = psutil.Process(parent)
        return parent, above.ppid() if above.name() == shell else None
    except psutil.Error:
        return parent, None


def _of_this_session(process: int) -> bool:
    """Whether DVC can be this process: it shares its session with its commands, whoever adopts an orphan does not."""
    try:
        return os.getsid(process) == os.getsid(0)
    except OSError:
        return False
