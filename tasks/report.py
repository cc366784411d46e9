"""One table with intervals and paired differences, curves, samples side by side: report.json, report.md, report.html.

Reads what the evaluations and the training stages wrote and runs no model. Same inputs, same bytes.
"""

from apprentice.demonstrations import atomic_write
from tasks.report_evidence import collect
from tasks.report_html import page
from tasks.report_markdown import comparison_table, document
from tasks.stage import Stage, run, write_json


def main(stage: Stage) -> None:
    """Read all, write the three files."""
    folder = stage.data / "reports"
    evidence = collect(folder, stage.params)
    write_json(folder / "report.json", evidence.report)
    for name, text in (("report.md", document(evidence)), ("report.html", page(evidence))):
        with atomic_write(folder / name) as file:
            file.write(text)
    stage.say(f"95% intervals, accuracies in per cent:\n{comparison_table(evidence.report)}")


run(__name__, main, __doc__)
