"""A report as files: <name>.json, <name>.md and <name>.html under data/reports."""

from apprentice.demonstrations import atomic_write
from tasks.report_evidence import Evidence
from tasks.report_html import page
from tasks.report_markdown import comparison_table, document
from tasks.stage import Stage, write_json


def write_report(stage: Stage, evidence: Evidence) -> None:
    """Write the three files and print the table."""
    folder, name = stage.data / "reports", evidence.form.file
    write_json(folder / f"{name}.json", evidence.report)
    for ending, text in (("md", document(evidence)), ("html", page(evidence))):
        with atomic_write(folder / f"{name}.{ending}") as file:
            file.write(text)
    stage.say(f"95% intervals, accuracies in per cent:\n{comparison_table(evidence.report)}")
