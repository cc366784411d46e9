"""The models of a stage: one to train and frozen ones; with LoRA on, adapters on as few trunks as they stand on."""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from apprentice.compute import Compute
from apprentice.footprint import shape_of
from apprentice.layers import hold_as_cast
from apprentice.lora import ADAPTER, Trunk, adapter_shape, read_origin
from apprentice.policy import load_policy
from tasks import room
from tasks.checkpoints import lineage, model_folder, policy_of, refused_in_a_line, scorers_of
from tasks.needs import on_trunks
from tasks.stage import Stage, StageError

Load = Callable[[Path, Compute], Any]


def roles_of(stage: Stage, init: str, names: Sequence[str], compute: Compute) -> tuple[Any, dict[str, Any]]:
    """The model to train, from `init`, and frozen ones by name.

    With `lora.rank` above 0 what is trained is an adapter, which starts as that of `init` and stands on the same trunk; a model
    that has none is a trunk itself. Raises StageError for an adapter of another form, or whose trunk was made anew since.
    """
    if not stage.params.lora.rank:
        return policy_of(stage, init, compute), scorers_of(stage, names, compute)
    found = frozen_roles(stage, [init, *names], compute)
    return copy.deepcopy(found[init]), {name: found[name] for name in names}


def frozen_roles(stage: Stage, names: Sequence[str], compute: Compute) -> dict[str, Any]:
    """The same without one to train."""
    if not stage.params.lora.rank:
        return scorers_of(stage, names, compute)
    trunks: dict[str, Trunk] = {}
    found = {name: _role(stage, name, trunks, compute, load_policy) for name in dict.fromkeys(names)}
    stage.say(f"LoRA of rank {stage.params.lora.rank} on {', '.join(trunks)}")
    return found


def preflight(
    stage: Stage, compute: Compute, trained: Sequence[str], frozen: Sequence[str], samples: bool, whole: Sequence[str] = ()
) -> None:
    """`tasks.room.preflight` for the models that `roles_of` loads: each trunk once, and adapters; and `whole` ones beside."""
    if not stage.params.lora.rank:
        return room.preflight(stage, compute, trained, [*frozen, *whole], samples)
    with refused_in_a_line():
        own, held = on_trunks(
            trained,
            frozen,
            lambda name: trunk_of(stage, name),
            lambda trunk: shape_of(room.config_of(stage, trunk)),
            cache(lambda trunk: adapter_shape(room.config_of(stage, trunk), stage.params.lora)),
        )
    held += [shape_of(room.config_of(stage, name)) for name in whole]
    room.check_shapes(stage, compute, own, held, samples)


def model_to_train(stage: Stage, init: str, compute: Compute, load: Load, heads: Sequence[str]) -> Any:
    """The same for one model alone that `load` makes of a folder, with `heads` that are trained whole."""
    if not stage.params.lora.rank:
        return load(model_folder(stage, init), compute)
    return copy.deepcopy(_role(stage, init, {}, compute, load, heads))


def adapted(stage: Stage, model: Any, name: str) -> Any:
    """A model at hand, which was written as `name`, to train on."""
    return _trunk(stage, model, name).train() if stage.params.lora.rank else model


def trunk_of(stage: Stage, name: str) -> str:
    """The model whose weights a model of the pipeline shares: itself where it is no adapter.

    Raises StageError where that was made anew since.
    """
    folder = model_folder(stage, name)
    origin = read_origin(folder)
    if origin is None:
        return name
    trunk = origin["trunk"]
    place = model_folder(stage, trunk)
    if not place.is_dir() or lineage(place) != origin["hash"]:
        raise StageError(
            f"{folder / ADAPTER}: it stands on the model {trunk!r} with the hash {origin['hash']}, and {place} is "
            f"{'another' if place.is_dir() else 'not there'}; run the stage that made {name!r} again"
        )
    return trunk


def _role(stage: Stage, name: str, trunks: dict[str, Trunk], compute: Compute, load: Load, heads: Sequence[str] = ()) -> Any:
    """A frozen model on its trunk, which is loaded unless it is among `trunks`."""
    below = trunk_of(stage, name)
    with refused_in_a_line():
        if below not in trunks:
            model = hold_as_cast(load(model_folder(stage, below), compute), compute, lossless=True)
            trunks[below] = _trunk(stage, model, below, heads)
        return trunks[below].role(None if below == name else model_folder(stage, name) / ADAPTER)


def _trunk(stage: Stage, model: Any, name: str, heads: Sequence[str] = ()) -> Trunk:
    folder = model_folder(stage, name)
    origin = {"trunk": name, "hash": lineage(folder), "path": folder.relative_to(stage.data.parent).as_posix()}
    return Trunk(model, stage.params.lora, seed=f"{stage.params.seed}/lora", origin=origin, heads=heads)
