"""The main line and every further method in one report: methods.json, methods.md, methods.html.

It has exactly the models of `evaluate.models` and `evaluate_methods.models`, and says what each learned from.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apprentice.config import Params
from tasks.report_evidence import Evidence, collect
from tasks.report_files import write_report
from tasks.report_form import methods_form
from tasks.stage import METHODS, Stage, StageError, run

if TYPE_CHECKING:
    from tasks.dvcstage import StageInfo

AFTER = ("evaluate_methods", "report_methods", "register_methods")


def main(stage: Stage) -> None:
    """Ask DVC what stands behind each model, read all, write the three files."""
    from tasks.dvcstage import read_stages

    write_report(stage, collect_methods(stage.data / "reports", stage.params, read_stages()))


def collect_methods(folder: Path, params: Params, stages: "Sequence[StageInfo]") -> Evidence:
    """Read data/reports and compute the numbers; `stages` as DVC has them, each after what it needs."""
    from tasks.lineage import labels_of, maker_of

    own, further = params.evaluate.models, params.evaluate_methods.models
    if twice := [model for model in further if model in own]:
        raise StageError(f"evaluate_methods.models: {', '.join(twice)} is in evaluate.models already; name it once")
    makers, labels = {model: maker_of(model, stages).name for model in (*own, *further)}, labels_of(stages)
    evaluated = {model: folder / "evaluate" / model for model in own}
    evaluated |= {model: folder / "evaluate_methods" / model for model in further}
    return collect(
        folder,
        params,
        methods_form(shown_stages([makers[model] for model in further], stages)),
        evaluated,
        {model: labels[maker] for model, maker in makers.items()},
    )


def shown_stages(makers: Sequence[str], stages: "Sequence[StageInfo]") -> list[str]:
    """The stages of methods/dvc.yaml behind the models, and those that only measure what these wrote (calibration)."""
    from tasks.lineage import behind

    shown = {stage.name for stage in behind(makers, stages)}
    own = [stage for stage in stages if stage.file == METHODS and stage.name.split("@")[0] not in AFTER]
    for stage in own:
        makes_models = any(out.startswith("data/models/") for out in stage.outs)
        if not makes_models and all(need in shown for need in stage.upstream):
            shown.add(stage.name)
    return [stage.name for stage in own if stage.name in shown]


run(__name__, main, __doc__)
