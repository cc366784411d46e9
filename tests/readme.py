"""README.md taken apart: commands, the map of the code, quoted names, metric tables.

Conventions: commands stand in fenced blocks or backticks; the map is the first fenced block under a heading with "map of the
code", a file or folder/ first on each line, deeper lines inside the folder above; a metric table has "metric" in its first
header cell and names in backticks below it.
"""

import re

from tests.imports import ROOT

FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text() -> str:
    """The whole of it."""
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is missing"
    return path.read_text(encoding="utf-8")


def blocks() -> list[str]:
    """Contents of the fenced blocks."""
    return FENCED.findall(text())


def spans() -> list[str]:
    """Contents of the backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", text()))


def commands() -> list[str]:
    """Lines of fenced blocks and inline code, without prompts, comments and settings of the environment."""
    lines = [line for block in blocks() for line in block.splitlines()] + spans()
    return [re.sub(r"^\s*(\$ )?(\w+=\S+ )*|\s+#.*$", "", line).strip() for line in lines]


def code_map() -> list[str]:
    """Paths of the map of the code, in its order; folders end with a slash."""
    found = re.search(r"^#+ [^\n]*map of the code.*?^```[^\n]*\n(.*?)^```", text(), re.MULTILINE | re.DOTALL | re.IGNORECASE)
    assert found, 'README.md has no heading "Map of the code" with a fenced block below it'
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in found[1].splitlines():
        plain = re.sub(r"[│├└─]", " ", line)
        if plain.strip():
            indent, name = len(plain) - len(plain.lstrip()), plain.split()[0]
            folders = [folder for folder in folders if folder[0] < indent]
            paths.append("".join(prefix for _, prefix in folders) + name)
            if name.endswith("/"):
                folders.append((indent, name))
    return paths


def metric_names() -> set[str]:
    """Names in the first column of the tables headed "metric"."""
    names: set[str] = set()
    for table in re.findall(r"(?:^\|.*\n)+", text(), re.MULTILINE):
        header, *rows = table.splitlines()
        if header.split("|")[1].strip(" `*").lower() == "metric":
            names |= {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert names, 'README.md has no table whose first column is headed "metric"'
    return names
