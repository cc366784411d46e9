"""Memory that the control groups of this process allow: in a container that is less than the machine has."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Version(NamedTuple):
    """Where a version of the kernel's interface is mounted, and what it calls limit, use, and droppable pages of files."""

    folder: str
    limit: str
    used: str
    cache: str


V1 = Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Version(".", "memory.max", "memory.current", "inactive_file")


def limits(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[int, int]]:
    """Free and all memory, in bytes, of each limited group that this process is in, parents included; none elsewhere than on
    Linux."""
    if not groups.is_file():
        return
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        version = V1 if controllers else V2
        below = PurePosixPath(path.lstrip("/"))  # as the host has it: within a container the mount may be its own group
        for part in (below, *below.parents):
            yield from _limit(mount / version.folder / part, version)


def _limit(group: Path, version: Version) -> Iterator[tuple[int, int]]:
    try:
        limit, used = ((group / name).read_text().strip() for name in (version.limit, version.used))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # no such group here, or one without a limit
        return
    if limit != "max":
        total = int(limit)
        yield max(0, total - int(used) + int(stat.get(version.cache, 0))), total
