"""What ends a stage for want of room or for bad numbers, whatever library raises it: what to do, as one message."""

import errno
from pathlib import Path

from apprentice.finite import BadSignError, NumbersError

FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left, quota exceeded
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # as torch has it, of a CPU and of devices
UNTRAINED = "Nothing was trained on it; the last snapshot stays under .resume/."
ADVICE = (
    "Lower the learning rate (params.yaml, section `{}`) or look for a model or reward that is broken already. With "
    "runtime.skip_steps above 0 the same command goes on from the snapshot and skips up to so many such steps in a row."
)
SIGN_ADVICE = "That is the rule runtime.on_bad_sign: stop; with `warn` the same command goes on from the snapshot."
ROOM_ADVICE = (
    "lower compute.forward_tokens (training, scoring) or compute.cache_tokens (sampling) in params.yaml, set "
    "compute.gradient_checkpointing, train adapters (lora.rank) or take a smaller checkpoint or a larger machine. "
    "The last snapshot stays under .resume/"
)


def in_a_line(error: Exception, stage: str, root: Path) -> str | None:
    """What to say of an error that ended a stage; None for one that is a fault of the program."""
    if isinstance(error, BadSignError):
        return f"BadSignError: {error}\n{UNTRAINED} {SIGN_ADVICE}"
    if isinstance(error, NumbersError):
        return f"NumbersError: {error}\n{UNTRAINED} {ADVICE.format(stage)}"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"StageError: the disk is full ({error}); free some of {root} and give the same command again"
    if is_out_of_memory(error):
        said = " ".join(str(error).split())[:300] or type(error).__name__
        return f"StageError: out of memory ({said}); {ROOM_ADVICE}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the CPU's allocator or a device had no memory left; torch says so of a CPU in text only."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
