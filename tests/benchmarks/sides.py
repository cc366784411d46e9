"""Sides that need no library: what the tests measure."""

import gc
import time
from collections.abc import Callable

Figures = dict[str, float]


def sleeper(seconds: float) -> Callable[[int], Callable[[], Figures]]:
    """Sleeps: wall time and no CPU time. Says which repeat it was, and prints what must not disturb."""

    def prepare(repeat: int) -> Callable[[], Figures]:
        def work() -> Figures:
            print("noise")
            time.sleep(seconds)
            return {"repeat": float(repeat)}

        return work

    return prepare


def failing() -> Callable[[int], Callable[[], Figures]]:
    """Fails in its second repeat."""

    def prepare(repeat: int) -> Callable[[], Figures]:
        if repeat:
            raise RuntimeError("no second time")
        return dict

    return prepare


class Litter:
    """Holds itself, so that only garbage collection frees it."""

    def __init__(self) -> None:
        self.itself = self


def littering() -> Callable[[int], Callable[[], Figures]]:
    """Leaves something behind; says how much of it was there before."""

    def prepare(repeat: int) -> Callable[[], Figures]:
        left = sum(isinstance(one, Litter) for one in gc.get_objects())
        Litter()
        return lambda: {"left": float(left)}

    return prepare
