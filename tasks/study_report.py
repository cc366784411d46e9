"""What the study publishes, made from study/figures.json alone: claims.json, claims.md, the plots, the table in README.md."""

from pathlib import Path

from tasks.dvcstage import read_stages
from tasks.stage import ROOT, read_params, write_json
from tasks.study_claims import document, judge
from tasks.study_figures import Figures, read_figures
from tasks.study_plan import CLAIMS, Study, StudyError, main_models, read_study
from tasks.study_plots import draw
from tasks.study_runs import git
from tasks.study_table import learned_from, renew_readme, results

FOLDER = ROOT / "study"


def publish(seeds: int | None = None) -> str:
    """Write everything but the figures, from those of the first `seeds` seeds (None: all that are there); returns claims.md.

    A plot without figures is left out. The table in README.md comes last: without its markers or the main run the rest is
    written all the same, and StudyError says what is missing.
    """
    study, figures = read_study(), read_figures()
    if seeds is None:
        seeds = count_seeds(study, figures)
    labels = learned_from(main_models(read_params()), read_stages())
    judged = [(claim, judge(claim, study, figures, seeds)) for claim in study.claims]
    write_json(FOLDER / "claims.json", [one for _, one in judged])
    text = document(judged, seeds, committed(ROOT / CLAIMS))
    (FOLDER / "claims.md").write_text(text, encoding="utf-8")
    for plot in study.plots:
        path, picture = FOLDER / f"{plot.name}.svg", draw(plot, figures, labels, seeds)
        path.unlink(missing_ok=True)
        if picture:
            path.write_text(picture, encoding="utf-8")
    renew_readme(results(figures, labels, seeds))
    return text


def count_seeds(study: Study, figures: Figures) -> int:
    """How many seeds of the study it takes to have all that the figures are of."""
    return max((int(seed) - study.runs[run].first_seed + 1 for run in study.runs for seed in figures.get(run, {})), default=0)


def committed(path: Path) -> str:
    """The first and the last commit of a file, in words; says so when the file differs from the last."""
    try:
        commits = git("log", "--format=%h", "--", str(path)).split()
        changed = git("status", "--porcelain", "--", str(path)).strip()
    except StudyError:
        return "not under git"
    if not commits:
        return "not committed"
    known = f"commit {commits[0]}" if len(commits) == 1 else f"first in commit {commits[-1]}, now {commits[0]}"
    return f"{known}, with uncommitted changes" if changed else known


def published() -> str:
    """The claims.md that was written last."""
    return (FOLDER / "claims.md").read_text(encoding="utf-8")


def headline(text: str) -> str:
    """How many claims hold, and where to read on."""
    return f"{text.splitlines()[2]} All of them: study/claims.md."
