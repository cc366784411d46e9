"""DVC's locks on paths, `.dvc/tmp/rwlock`: who holds one, and entries that nobody holds any more.

The lock on the repository is an flock, which ends with its holder. An entry in this file outlives a holder that was killed.
DVC takes it out when no process has its id; but ids are used again, after a restart of a container the very same, and a file
that was cut short by a crash stops every command. A flow takes out what nobody holds by itself; where a `dvc` by hand is
stopped by it: `python -m tasks.dvclocks`.
"""

import argparse
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


def drop_stale() -> tuple[list[str], list[str]]:
    """Take out the entries whose process is not the one that made them; begin anew when the file cannot be read.

    Returns what was taken out and what is held, a line each.
    """
    from dvc.lock import make_lock

    place = ROOT / ".dvc" / "tmp"
    path = place / "rwlock"
    if not path.is_file():
        return [], []
    with make_lock(str(place / "rwlock.lock"), tmp_dir=str(place), wait=True):  # as DVC does to edit it
        try:
            lock = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # cut short: whoever holds something in it cannot give it back either
            path.unlink()
            return [f"the whole of {path}, which was cut short"], []
        kept = {
            "write": {name: holder for name, holder in lock.get("write", {}).items() if _holds(holder)},
            "read": {name: left for name, holders in lock.get("read", {}).items() if (left := [*filter(_holds, holders)])},
        }
        if kept != lock:
            path.write_text(json.dumps(kept), encoding="utf-8")
    held = _lines(kept)
    return [line for line in _lines(lock) if line not in held], held


def _lines(lock: dict[str, dict[str, Any]]) -> list[str]:
    """Each entry of the file: how it is used, the path, by whom."""
    entries = [("written", name, holder) for name, holder in lock.get("write", {}).items()]
    entries += [("read", name, holder) for name, holders in lock.get("read", {}).items() for holder in holders]
    return [f"{name}, {how} by `{holder['cmd']}` (pid {holder['pid']})" for how, name, holder in entries]


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


def main() -> None:
    """Take out the entries that nobody holds any more, and say which, and who holds what is left."""
    argparse.ArgumentParser(prog="python -m tasks.dvclocks", description=main.__doc__).parse_args()
    taken, held = drop_stale()
    for line in taken:
        print(f"taken out: {line}")
    for line in held:
        print(f"held: {line}")
    if not held:
        print("no path is held: the next `dvc` is free to begin")


if __name__ == "__main__":
    main()
