"""What `.telemetry/<stage>.jsonl` tells of the execution that wrote a stage's files: times, rate, device."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EARLY, LATE = 2.0, 60.0  # seconds by which a file's time may lie outside the execution: DVC copies it after the end


@dataclass(frozen=True)
class Execution:
    """One execution of a stage: its events from `started` to `finished`."""

    events: tuple[dict[str, Any], ...]

    @property
    def began(self) -> float:
        """When it started, in seconds since 1970."""
        return float(self.events[0]["time"])

    @property
    def ended(self) -> float:
        """When it finished."""
        return float(self.events[-1]["time"])

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
    path = root / ".telemetry" / f"{label}.jsonl"
    events: list[dict[str, Any]] = []
    found = None
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:  # a line cut short by a crash
            continue
        events = [event] if event.get("event") == "started" else [*events, event]
        if event.get("event") == "finished" and events[0]["time"] - EARLY <= written <= event["time"] + LATE:
            found = Execution(tuple(events))
    return found
