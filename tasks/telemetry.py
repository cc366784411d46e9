"""What `.telemetry/<stage>.jsonl` tells of the execution that wrote a stage's files: times, rate, device."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EARLY, LATE = 2.0, 60.0  # seconds by which a file's time may lie outside the execution: DVC copies it after the end


@dataclass(frozen=True)
class Execution:
    """One execution of a stage: its events from `started` on, to `finished` where it came to its end."""

    events: tuple[dict[str, Any], ...]

    @property
    def began(self) -> float:
        """When it started, in seconds since 1970."""
        return float(self.events[0]["time"])

    @property
    def ended(self) -> float:
        """When it finished."""
        return float(self.events[-1]["time"])

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return bool(self.events[-1].get("event") == "finished")

    def figures(self) -> dict[str, float]:
        """Wall time and the last rate, as metrics."""
        rates = [event["steps_per_second"] for event in self.events if "steps_per_second" in event]
        return {"runtime/seconds": round(self.ended - self.began, 1)} | (
            {"runtime/steps_per_second": rates[-1]} if rates else {}
        )

    def tags(self) -> dict[str, str]:
        """Where it ran."""
        found = {key: event[key] for event in self.events for key in ("host", "device", "dtype") if key in event}
        return {key: str(value) for key, value in found.items()}


def execution_of(root: Path, label: str, written: float) -> Execution | None:
    """The last execution that can have written a file of that modification time; None for a file pulled later."""
    fitting = [one for one in executions_of(root, label) if one.finished and one.began - EARLY <= written <= one.ended + LATE]
    return fitting[-1] if fitting else None


def executions_of(root: Path, label: str) -> Iterator[Execution]:
    """Every execution of a stage, in their order."""
    path = root / ".telemetry" / f"{label}.jsonl"
    events: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:  # a line cut short by a crash
            continue
        if event.get("event") == "started" and events:
            yield Execution(tuple(events))
            events = []
        events.append(event)
    if events:
        yield Execution(tuple(events))
