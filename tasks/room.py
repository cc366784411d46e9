"""Room in memory and on disk: estimated and said before long work; where it gives out, an error that names what is missing."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.cgroup import limits
from tasks.faults import FULL
from tasks.stage import Stage, StageError

if TYPE_CHECKING:
    from apprentice.compute import Compute
    from apprentice.footprint import Shape


def preflight(stage: Stage, compute: "Compute", trained: Sequence[str], frozen: Sequence[str], samples: bool) -> None:
    """`check_room` for models of the pipeline, by name."""
    names = dict.fromkeys(frozen)
    check_room(
        stage, compute, [config_of(stage, name) for name in trained], [config_of(stage, name) for name in names], samples
    )


def config_of(stage: Stage, name: str) -> Any:
    """The configuration of a model of the pipeline."""
    from transformers import AutoConfig

    from apprentice.policy import checkpoint_arguments
    from tasks.checkpoints import model_folder, refused_in_a_line

    with refused_in_a_line():
        return AutoConfig.from_pretrained(**checkpoint_arguments(model_folder(stage, name)), trust_remote_code=False)


def check_room(
    stage: Stage, compute: "Compute", trained: Sequence[Any], frozen: Sequence[Any], samples: bool, written: int = 0
) -> None:
    """Say what training and scoring models of these configurations, and sampling from one, is estimated to take.

    `written`: how many models are written, each as large as the largest, though none is trained.

    Raises StageError where the models alone are larger than the memory, or what is to be written larger than the free disk.
    """
    from apprentice.footprint import shape_of

    shapes = [shape_of(one) for one in trained], [shape_of(one) for one in frozen]
    check_shapes(stage, compute, *shapes, samples, written)


def check_shapes(
    stage: Stage, compute: "Compute", trained: "Sequence[Shape]", frozen: "Sequence[Shape]", samples: bool, written: int = 0
) -> None:
    """The same for shapes of models and adapters."""
    from apprentice.footprint import footprint

    spread = compute.team.size if compute.sharding else 1
    needs = footprint(trained, frozen, compute, samples, written, spread)
    copies = compute.team.size if compute.device.type == "cpu" else 1
    needed, certain = copies * needs.memory, copies * needs.certain
    free_memory, memory = memory_of(compute)
    project = stage.data.parent
    free_disk = shutil.disk_usage(project).free
    stage.say(
        f"needs about {size(needed)} more memory ({size(free_memory)} free) and {size(needs.disk)} of disk "
        f"({size(free_disk)} free)" + f", with models spread over {spread} processes" * (spread > 1)
    )
    if samples and compute.sampler == "vllm":
        stage.say("vLLM draws the samples; it starts with the first, half a minute or more before there is progress to show")
    held = "weights, gradients and optimizer" if trained else "the weights of its models"
    if certain > memory:
        raise StageError(
            f"{stage.name}: {held} take {size(certain)}, and {compute.device} has "
            f"{size(memory)} of memory in all; take a smaller checkpoint, adapters (lora.rank) or a larger machine"
        )
    if needs.disk > free_disk:
        raise StageError(
            f"{stage.name}: what it writes, its copy in DVC's cache and two snapshots take {size(needs.disk)} of disk, and "
            f"{size(free_disk)} are free at {project}; free some (`dvc gc --workspace` drops what no stage uses any more)"
        )
    if needed > free_memory:
        stage.warn("that is more memory than is free: lower compute.forward_tokens or compute.cache_tokens if it gives out")


def memory_of(compute: "Compute") -> tuple[int, int]:
    """Free and all memory of the device, in bytes; of a CPU what the control groups of this process leave of it."""
    import psutil
    import torch

    if compute.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(compute.device)
        return int(free), int(total)
    found = psutil.virtual_memory()
    free, total = zip((found.available, found.total), *limits(), strict=True)
    return min(free), min(total)


@contextmanager
def writing(path: Path, needed: int, kept: str) -> Iterator[None]:
    """Write `needed` bytes at a path. Raises StageError where the disk is full, before or while writing; `kept`: what stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if needed > shutil.disk_usage(path.parent).free:
        raise full(path, needed, kept)
    try:
        yield
    except Exception as error:
        if is_full(error):
            shutil.rmtree(path, ignore_errors=True)
            raise full(path, needed, kept) from None
        raise


def is_full(error: BaseException) -> bool:
    """Whether a library says that the disk is full; safetensors says so in text only."""
    return getattr(error, "errno", None) in FULL or any(f"os error {number}" in str(error) for number in FULL)


def full(path: Path, needed: int, kept: str) -> StageError:
    """The error of a full disk."""
    free = shutil.disk_usage(path.parent).free
    return StageError(
        f"the disk is full: {path} takes {size(needed)}, and {size(free)} are free; {kept}. Free some of it and give the same "
        "command again"
    )


def size(count: float) -> str:
    """Bytes for people: 1536 is 1.5 KiB."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
