"""DVC's locks on paths, `.dvc/tmp/rwlock`: who holds one, and entries that nobody holds any more.

The lock on the repository is an flock, which ends with its holder. An entry in this file outlives a holder that was killed.
DVC takes it out when no process has its id; but ids are used again, after a restart of a container the very same, and a file
that was cut short by a crash stops every command.
"""

import json
import re
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import psutil

from tasks.process import Stopped, stopping
from tasks.stage import ROOT

HOLDER = re.compile(r"^\s+\(PID (\d+)\): (.*)$")  # how DVC names who holds a path
PAUSE, LONGEST = 2.0, 30.0  # seconds between two looks at the locks, and without a change


def holders_in(lines: Iterable[str]) -> dict[int, str]:
    """Process ids that DVC names as holders in what it printed, each with its command and since when it runs."""
    found = {}
    for line in lines:
        if match := HOLDER.match(line):
            pid = int(match[1])
            found[pid] = f"`{match[2]}` (pid {pid}{_since(pid)})"
    return found


def _since(pid: int) -> str:
    try:
        return f", since {datetime.fromtimestamp(psutil.Process(pid).create_time()):%Y-%m-%d %H:%M:%S}"
    except psutil.Error:
        return ", which has ended"


def wait_for_change() -> None:
    """Return once a lock was taken or given back, or its holder has ended; at the latest after LONGEST. May raise Stopped."""
    before, until = _content(), time.monotonic() + LONGEST
    while _content() == before and time.monotonic() < until:
        for _ in range(10):
            if stopping():
                raise Stopped("while waiting for another process")
            time.sleep(PAUSE / 10)
        drop_stale()


def drop_stale() -> None:
    """Take out the entries whose process is not the one that made them; begin anew when the file cannot be read."""
    from dvc.lock import make_lock

    place = ROOT / ".dvc" / "tmp"
    path = place / "rwlock"
    if not path.is_file():
        return
    with make_lock(str(place / "rwlock.lock"), tmp_dir=str(place), wait=True):  # as DVC does to edit it
        try:
            lock = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # cut short: whoever holds something in it cannot give it back either
            path.unlink()
            return
        kept = {
            "write": {name: holder for name, holder in lock.get("write", {}).items() if _holds(holder)},
            "read": {name: left for name, holders in lock.get("read", {}).items() if (left := [*filter(_holds, holders)])},
        }
        if kept != lock:
            path.write_text(json.dumps(kept), encoding="utf-8")


def _holds(holder: dict[str, Any]) -> bool:
    """Whether the process that made an entry still runs: its id alone could be another's by now."""
    words = holder["cmd"].partition(" ")[2]  # the program itself is written in another way
    try:
        process = psutil.Process(holder["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).endswith(words)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _content() -> str:
    try:
        return (ROOT / ".dvc" / "tmp" / "rwlock").read_text(encoding="utf-8")
    except OSError:
        return ""
