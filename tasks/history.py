"""`history.csv` of a stage: a row of figures each step, read by trackers while it grows and by reports afterwards."""

import csv
from collections.abc import Iterator
from pathlib import Path


class History:
    """`history.csv`, one row a step, flushed as it happens so that a tracker can follow; fixed header."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, rows: list[dict[str, float | None]]) -> None:
        """Begin anew, with the rows of the steps already done (on resuming)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        for row in rows:
            self.append(row)

    def append(self, row: dict[str, float | None]) -> None:
        """Add one step."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({key: "" if value is None else f"{value:.6g}" for key, value in row.items()})


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file as dicts."""
    with path.open(newline="") as file:
        yield from csv.DictReader(file)
