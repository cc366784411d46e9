"""Sequences side by side in the rows that a model reads, first fit, none of which sees another: less padding, equal values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Shelf:
    """Rows of one width that are filled from the left; a sequence goes where it first fits."""

    def __init__(self, width: int) -> None:
        self.width, self.used = width, list[int]()

    def fits(self, length: int, rows: int) -> bool:
        """Whether another sequence leaves no more than that many rows."""
        return len(self.used) < rows or self._row(length) < rows

    def place(self, length: int) -> tuple[int, int]:
        """Row and first column of another sequence."""
        row = self._row(length)
        if row == len(self.used):
            self.used.append(0)
        start = self.used[row]
        self.used[row] += length
        return row, start

    def _row(self, length: int) -> int:
        return next((row for row, used in enumerate(self.used) if used + length <= self.width), len(self.used))


@dataclass(frozen=True)
class Layout:
    """Where the B sequences of a batch stand in what a model reads: ids [R, W]; position_ids [R, W], counted from the start of
    each sequence, or None where each has a row of its own; rows, starts: [B] row and first column of each."""

    ids: Tensor
    position_ids: Tensor | None
    rows: Tensor
    starts: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model is called with."""
        return {"input_ids": self.ids} | ({} if self.position_ids is None else {"position_ids": self.position_ids})

    def kept(self, columns: Tensor, mask: Tensor) -> Tensor:
        """[K] columns of the rows, rising, that hold what is asked for: columns [B, T] of each sequence, where mask is 1."""
        wanted = (columns + self.starts[:, None])[mask > 0]
        if self.position_ids is None:
            return torch.arange(int(wanted.min()), int(wanted.max()) + 1, device=wanted.device)
        found: Tensor = wanted.unique()
        return found

    def take(self, values: Tensor, columns: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, T] of values [R, W], or of [R, K] at the columns `kept`, at columns [B, T] of each sequence; what stands for
        those that were not kept means nothing."""
        places = columns + self.starts[:, None]
        places = places if kept is None else torch.searchsorted(kept, places)
        flat = self.rows[:, None] * values.size(1) + places.clamp(max=values.size(1) - 1)
        return values.flatten().gather(0, flat.flatten()).view(columns.shape)


def alone(ids: Tensor) -> Layout:
    """Each sequence in a row of its own: ids [B, L]."""
    rows = torch.arange(len(ids), device=ids.device)
    return Layout(ids, None, rows, torch.zeros_like(rows))


def packed(ids: Tensor, lengths: Sequence[int], width: int) -> Layout:
    """Sequences ids [B, L] of these lengths in rows of `width`, the longest placed first.

    What is left of a row is a sequence of its own, of any tokens, which nothing sees.
    """
    shelf, places = Shelf(width), [(0, 0)] * len(lengths)
    for one in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        places[one] = shelf.place(lengths[one])
    source = torch.zeros(len(shelf.used), width, dtype=torch.long)
    position_ids = torch.zeros_like(source)
    for row, used in enumerate(shelf.used):
        position_ids[row, used:] = torch.arange(width - used)
    for one, (row, start) in enumerate(places):
        own = torch.arange(lengths[one])
        source[row, start : start + len(own)] = one * ids.size(1) + own
        position_ids[row, start : start + len(own)] = own
    rows, starts = torch.tensor(places, device=ids.device).unbind(1)
    return Layout(ids.flatten()[source.to(ids.device)], position_ids.to(ids.device), rows, starts)
