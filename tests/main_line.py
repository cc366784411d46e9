"""The main line in one process, stage by stage through their own `main`: python -m tests.main_line CHECKPOINT...

Runs in the folder of a project whose packages are first on the path, once for each checkpoint folder, what a run before wrote
removed. What each stage says goes to standard output; a line of JSON with the report's figures ends each run.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

from tasks.preset import merge
from tasks.stage import ROOT, Stage, read_params

STAGES = ("ingest", "tokenizer", "validate", "pretrain", "sft", "sft_tuned", "srppo", "pairs", "rso", "evaluate", "report")


def run_here(stage: Stage) -> None:
    """What `tasks.stage.run` does around a stage's work, in this process, without DVC's word on what the work is."""
    stage.__dict__["key"] = "0"
    stage.reports.mkdir(parents=True, exist_ok=True)
    try:
        importlib.import_module(f"tasks.{stage.name}").main(stage)
        stage.finish()
    finally:
        end_of_process(stage)


def end_of_process(stage: Stage) -> None:
    """What that does to a stage's locks."""
    for lock in stage.held.values():
        lock.close()
    stage.held.clear()


def try_here(folder: Path) -> None:
    """The trial of a checkpoint without the child process, which would load torch again each time."""
    from apprentice import checkpoint_trial

    checkpoint_trial.begin = lambda *_: None  # no CPU limit on this process
    checkpoint_trial.trial(folder)


def main(checkpoints: list[str]) -> None:
    """The stages, then DVC told of what they wrote, then the registry."""
    from dvc.repo import Repo

    from tasks import intake

    intake.try_out = try_here
    path = ROOT / "params.yaml"
    for checkpoint in checkpoints:
        path.write_text(merge(path.read_text(), {"pretrain": {"checkpoint": checkpoint}}))
        for folder in ("clean", "models", "pairs", "reports"):
            shutil.rmtree(ROOT / "data" / folder, ignore_errors=True)
        params = read_params()
        for name in STAGES:
            for item in params.evaluate.models if name == "evaluate" else [None]:
                run_here(Stage(name, params, item))
        with Repo(str(ROOT)) as repo:
            repo.commit("report", with_deps=True, force=True)
        run_here(Stage("register", params))
        report = json.loads((ROOT / "data/reports/report.json").read_text())
        registry = json.loads((ROOT / "data/reports/registry.json").read_text())
        print(json.dumps({"checkpoint": Path(checkpoint).name, "models": report["models"], "registry": registry}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
