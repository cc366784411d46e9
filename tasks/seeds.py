"""The main line over several seeds, one DVC experiment each in a temporary workspace: `python -m tasks.seeds 0 1 2`.

Bases, data and sampling all vary with the seed. Writes study/seeds.json and study/seeds.md: the differences paired over the
same prompts and pooled over seeds, and those of each seed. Nothing is computed twice, and the workspace stays as it is.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tasks.report_evidence import Values, differences, read_values, summary
from tasks.stage import ROOT, read_params, write_json

SHOWN = (
    "in_domain/greedy_accuracy",
    "out_of_domain/greedy_accuracy",
    "in_domain/sampled_accuracy",
    "out_of_domain/sampled_accuracy",
)


def run_seed(seed: int) -> str:
    """Bring the pipeline of one seed up to date as an experiment; returns its name.

    Stages done before come from DVC's cache.
    """
    name = f"seed-{seed}"
    _dvc("exp", "remove", name, check=False)  # `exp run --force` would overwrite it too, but run every stage anew
    _dvc("exp", "run", "--temp", "--name", name, "--set-param", f"seed={seed}")
    return name


def _dvc(*words: str, check: bool = True) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for `python` of dvc.yaml
    subprocess.run([sys.executable, "-m", "dvc", *words], cwd=ROOT, check=check, env={**os.environ, "PATH": path})


def values_of(experiment: str, models: list[str], seed: int) -> dict[str, Values]:
    """The per-prompt values of every model of an experiment, prompt ids carrying the seed."""
    import dvc.api

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            path = Path(folder) / f"{model}.csv"
            path.write_text(dvc.api.read(f"data/reports/evaluate/{model}/prompts.csv", repo=str(ROOT), rev=experiment))
            found[model] = {
                key: {f"{seed}/{row}": value for row, value in by_id.items()} for key, by_id in read_values(path).items()
            }
    return found


def pool(seeds: dict[int, dict[str, Values]]) -> dict[str, Values]:
    """Values of several seeds side by side: the ids keep them apart."""
    pooled: dict[str, Values] = {}
    for models in seeds.values():
        for model, values in models.items():
            for key, by_id in values.items():
                pooled.setdefault(model, {}).setdefault(key, {}).update(by_id)
    return pooled


def study(seeds: dict[int, dict[str, Values]], baselines: list[str]) -> dict[str, Any]:
    """Pooled means and differences, and the differences of each seed."""
    pooled = pool(seeds)
    return {
        "seeds": list(seeds),
        "command": "python -m tasks.seeds " + " ".join(map(str, seeds)),
        "models": {model: summary(values) for model, values in pooled.items()},
        "differences": differences(pooled, baselines),
        "by_seed": {str(seed): differences(models, baselines) for seed, models in seeds.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The headline differences as Markdown: pooled with 95% interval, then each seed."""
    lines = [
        f"`{result['command']}`: differences paired over the same prompts, pooled over seeds, with 95% intervals; in brackets "
        "each seed.",
        "",
        "| model | against | " + " | ".join(SHOWN) + " |",
        "| --- | --- |" + " --- |" * len(SHOWN),
    ]
    cells = {(d["model"], d["baseline"], d["metric"]): d for d in result["differences"]}
    each = [{(d["model"], d["baseline"], d["metric"]): d for d in found} for found in result["by_seed"].values()]
    for model, baseline in dict.fromkeys((d["model"], d["baseline"]) for d in result["differences"]):
        row = []
        for metric in SHOWN:
            d = cells[model, baseline, metric]
            own = " ".join(f"{seed[model, baseline, metric]['difference']:+.3f}" for seed in each)
            row.append(f"{d['difference']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] ({own})")
        lines.append(f"| {model} | {baseline} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tasks.seeds", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("seeds", type=int, nargs="+", help="seeds to run, e.g. 0 1 2")
    params = read_params()
    seeds = {}
    for seed in parser.parse_args().seeds:
        print(f"seed {seed}", flush=True)
        seeds[seed] = values_of(run_seed(seed), params.evaluate.models, seed)
    result = study(seeds, ["base", *params.report.baselines])
    write_json(ROOT / "study" / "seeds.json", result)
    (ROOT / "study" / "seeds.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
