"""One table with intervals and paired differences, curves, samples side by side: report.json, report.md, report.html.

Reads what the evaluations and the training stages wrote and runs no model. Same inputs, same bytes.
"""

from tasks.report_evidence import collect_main
from tasks.report_files import write_report
from tasks.stage import Stage, run


def main(stage: Stage) -> None:
    """Read all, write the three files."""
    write_report(stage, collect_main(stage.data / "reports", stage.params))


run(__name__, main, __doc__)
