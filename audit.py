"""Known vulnerabilities and licences of the set that constraints.txt pins: `make audit`, or `python audit.py`.

Vulnerabilities are looked up by pip-audit, in an environment of its own that is gone afterwards; licences are those that the
installed packages state. Exit code: 0 all is well, 1 something is wrong, 3 not every package could be looked up.
"""

import json
import re
import subprocess
import sys
import tempfile
import venv
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

PINS = Path(__file__).with_name("constraints.txt")
TOOL = "pip-audit>=2.10,<3"

# Permissive and weak copyleft licences by their SPDX names, and what else packages call them.
ALLOWED: dict[str, tuple[str, ...]] = {
    "0BSD": (),
    "Apache-2.0": ("Apache Software License", "Apache License 2.0", "Apache 2.0 License"),
    "BSD-2-Clause": (),
    "BSD-3-Clause": ("BSD", "BSD License", "3-Clause BSD License"),
    "BSL-1.0": (),
    "CC0-1.0": (),
    "CNRI-Python": (),
    "EPL-2.0": (),
    "ISC": ("ISC License (ISCL)",),
    "MIT": ("MIT License",),
    "MIT-0": (),
    "MIT-CMU": (),
    "MPL-2.0": ("Mozilla Public License 2.0 (MPL 2.0)",),
    "PSF-2.0": ("Python Software Foundation License",),
    "Zlib": (),
    "ZPL-2.1": ("Zope Public License",),
}
# Packages whose metadata does not tell, and why they are allowed: somebody has read the licence in them.
READ: dict[str, str] = {
    "cuda-toolkit": "nothing of its own, only the names of what comes with nvidia-*",
    "grandalf": "either GPL-2.0 or EPL-1.0",
    "huey": "MIT",
    "nvidia-*": "NVIDIA's own terms; comes with torch's CUDA build only, README.md shows how to install the other",
    "pygit2": "GPL-2.0 with an exception: what links to it keeps its own licence",
    "pytest-timeout": "MIT",
    "skops": "MIT",
    "text-unidecode": "either GPL or Artistic",
}


def plain(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    """Name to version, from constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in PINS.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {plain(name): version for name, version in pairs}


def stated(package: Distribution) -> str:
    """The licence that a package's metadata states, as an SPDX expression where it has one; empty when it says nothing."""
    if expression := package.metadata.get("License-Expression"):
        return str(expression)
    classifiers = package.metadata.get_all("Classifier", [])
    names = [name.split(" :: ")[-1] for name in classifiers if name.startswith("License :: ")]
    names = [name for name in names if name != "OSI Approved"]
    return " AND ".join(names) or str(package.metadata.get("License") or "").strip().partition("\n")[0]


def is_allowed(licence: str) -> bool:
    """Whether an SPDX expression, or another name of a licence, can be met by allowed licences alone."""
    names = {name for spdx, others in ALLOWED.items() for name in (spdx, *others)}

    def met(expression: str) -> bool:
        choices = expression.split(" OR ")
        return any(all(name.split(" WITH ")[0].strip() in names for name in one.split(" AND ")) for one in choices)

    names.add("met")
    while licence not in names and (inner := re.search(r"\(([^()]*)\)", licence)):
        licence = licence.replace(inner[0], "met" if met(inner[1]) else "unmet")
    return met(licence)


def wrong_licences(pins: dict[str, str]) -> tuple[list[str], list[str]]:
    """A line for each package whose licence is not allowed, and the packages that are not installed here."""
    wrong, absent = [], []
    for name, version in pins.items():
        if any(fnmatch(name, pattern) for pattern in READ):
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:
            absent.append(name)
            continue
        if package.version.split("+")[0] != version:
            wrong.append(f"{name} {version}: {package.version} is installed; remove .venv, run `make setup` and this again")
        elif not is_allowed(licence := stated(package)):
            what = f"its licence is {licence!r}" if licence else "its metadata states no licence"
            wrong.append(f"{name} {version}: {what}; read it, then add it to ALLOWED or READ in audit.py or drop the package")
    return wrong, absent


def look_up() -> tuple[list[dict[str, Any]], str]:
    """What pip-audit knows of every package; nothing, and the reason, when it could not ask."""
    with tempfile.TemporaryDirectory() as place:
        report, python = Path(place) / "report.json", Path(place) / "bin" / "python"
        venv.create(place, with_pip=True)
        words = ["-r", str(PINS), "--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json", "-o", str(report)]
        for command in (["pip", "install", "-q", TOOL], ["pip_audit", *words]):
            done = subprocess.run([python, "-m", *command], capture_output=True, text=True, check=False)
            if done.returncode and not report.is_file():  # with a report it has found something
                return [], (done.stderr.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"])[-1]
        return json.loads(report.read_text(encoding="utf-8"))["dependencies"], ""


def vulnerabilities(found: list[dict[str, Any]]) -> list[str]:
    """A line for each known vulnerability."""
    lines = []
    for package in found:
        for one in package.get("vulns", []):
            fixed = " or ".join(one["fix_versions"])
            what = f"fixed in {fixed}: raise its pin in constraints.txt" if fixed else "not fixed yet: replace it, or wait"
            lines.append(f"{package['name']} {package['version']}: {one['id']}, {what}; https://osv.dev/{one['id']}")
    return lines


def main() -> int:
    """Print what was found; the exit code."""
    pins = pinned()
    wrong, absent = wrong_licences(pins)
    found, trouble = look_up()
    wrong += vulnerabilities(found)
    known = {plain(package["name"]) for package in found if "skip_reason" not in package}
    unknown = [name for name in pins if name not in known]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if absent:
        print(f"Not installed on this machine, so their licences were not read: {', '.join(absent)}.")
    if unknown and not known:
        print(
            f"NOT LOOKED UP: no vulnerability is known or ruled out ({trouble or 'the service knows none of these packages'})."
        )
        print("The vulnerability service could not be reached: run this where PyPI answers.")
    elif unknown:
        print(f"NOT LOOKED UP: the vulnerability service does not know {', '.join(unknown)}.")
    print(f"{len(pins)} packages are pinned, {len(known)} were looked up; {len(wrong)} findings.")
    return 1 if wrong else 3 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
