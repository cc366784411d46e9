"""What the pipeline files tell of a stage: what it learned from beside demonstrations, and which stages stand behind a model.

Pure functions over the stages as DVC resolves them (dvcstage.read_stages): nothing here is declared by hand.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

from tasks.dvcstage import StageInfo
from tasks.stage import StageError

LABELS = {  # what each table tells of responses that are no demonstrations
    "data/clean/answers.jsonl": "verifier",
    "data/clean/preferences.jsonl": "preferences",
    "data/clean/suboptimal.jsonl": "qualities",
}
NO_LESSON = {  # made from all tables, and yet no label passes through
    "data/reports/validate/passed",  # lets the pipeline pass or stops it
    "data/models/tokenizer",  # a vocabulary: the words of chosen and rejected responses alike
}
NO_LABELS = "none"


def labels_of(stages: Sequence[StageInfo]) -> dict[str, str]:
    """Which labels each stage learned from, itself or through other stages: none, or such of verifier, preferences and
    qualities as there were, joined by " and ".

    A stage reads labels that lie in a folder it names. `stages` stand in an order that can be run, each after what it needs.
    """
    found: dict[str, set[str]] = {}
    outs = {stage.name: stage.outs for stage in stages}
    for stage in stages:
        read = [dep for dep in stage.deps if dep not in NO_LESSON]
        own = {label for path, label in LABELS.items() for dep in read if _overlap(dep, path)}
        taught = [need for need in stage.upstream if any(_overlap(dep, out) for dep in read for out in outs[need])]
        found[stage.name] = own.union(*(found[need] for need in taught))
    return {name: " and ".join(sorted(labels)) or NO_LABELS for name, labels in found.items()}


def maker_of(model: str, stages: Sequence[StageInfo]) -> StageInfo:
    """The stage that writes data/models/<model>."""
    for stage in stages:
        if f"data/models/{model}" in stage.outs:
            return stage
    raise StageError(f"no stage writes data/models/{model}, the model {model!r} of params.yaml")


def behind(names: Sequence[str], stages: Sequence[StageInfo]) -> list[StageInfo]:
    """The stages of these names and all that they need, in an order that can be run."""
    needed = set(names)
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.upstream)
    return [stage for stage in stages if stage.name in needed]


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are the same or one lies inside the other."""
    a, b = PurePosixPath(one), PurePosixPath(other)
    return a == b or a in b.parents or b in a.parents
