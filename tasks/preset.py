"""Merge a preset of presets/ into params.yaml: comments kept, every change shown; `make preset NAME=smoke`."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from apprentice.config import ParamsError
from tasks.stage import ROOT, read_params


def merge(params: dict[str, Any], preset: dict[str, Any], prefix: str = "") -> list[str]:
    """Put the preset's values into nested `params` in place; returns one line per changed entry.

    Raises ParamsError for an entry that params.yaml does not have.
    """
    changes = []
    for name, value in preset.items():
        key = f"{prefix}{name}"
        if name not in params:
            raise ParamsError(f"{key}: the preset names an entry that params.yaml does not have")
        if isinstance(value, dict) and isinstance(params[name], dict):
            changes += merge(params[name], value, f"{key}.")
        elif params[name] != value:
            changes.append(f"{key}: {params[name]} -> {value}")
            params[name] = value
    return changes


def apply(name: str, root: Path = ROOT) -> list[str]:
    """Merge presets/<name>.yaml into params.yaml of a project and check the result; returns the changes."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    path = root / "params.yaml"
    before = path.read_text()
    params = yaml.load(before)
    changes = merge(params, yaml.load((root / "presets" / f"{name}.yaml").read_text()))
    with path.open("w") as file:
        yaml.dump(params, file)
    try:
        read_params(path)
    except ParamsError:
        path.write_text(before)
        raise
    return changes


def main() -> int:
    """Command line."""
    names = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="python -m tasks.preset", description=__doc__)
    parser.add_argument("name", choices=names)
    name = parser.parse_args().name
    if (ROOT / ".git").exists() and subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "params.yaml"], cwd=ROOT
    ).returncode:
        print("params.yaml has uncommitted edits, which a preset could overwrite: commit them, or `git checkout params.yaml`")
        return 2
    try:
        changes = apply(name)
    except ParamsError as error:
        print(f"presets/{name}.yaml: {error}", file=sys.stderr)
        return 2
    print("\n".join(changes) or "nothing to change")
    print("next: `dvc repro` (or `make run`); back: `git checkout params.yaml`")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
