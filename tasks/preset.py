"""Merge a preset of presets/ into params.yaml: comments kept, every change shown; `make preset NAME=smoke`.

With --dry-run nothing is changed: it prints what the main line would need of memory, disk and time.

The file is edited as text, entry by entry, so that all else in it stays as it is to the byte. A section that takes an entry
from another one by a merge key (`<<: *ppo`) gets an entry of its own; the other section keeps its value.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from apprentice.config import Params, ParamsError, parse
from tasks.stage import ROOT, read_params

Keys = tuple[str, ...]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast; a merge parses the file for every entry


def merge(text: str, preset: dict[str, Any]) -> str:
    """Put the preset's values into the text of a params file.

    Raises ParamsError for an entry that it does not have.
    """
    leaves = list(_leaves(yaml.load(text, LOADER), preset))
    while True:  # an entry that is right by now may be taken over from one that is set later
        params = yaml.load(text, LOADER)
        wrong = next(((keys, value) for keys, value in leaves if _at(params, keys) != value), None)
        if wrong is None:
            return text
        text = _set(text, *wrong)
        if _at(yaml.load(text, LOADER), wrong[0]) != wrong[1]:
            raise ParamsError(f"{'.'.join(wrong[0])}: cannot be edited where it stands in params.yaml; set it there by hand")


def changes_between(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each entry that differs, in every section that takes it over."""
    lines = []
    for name, value in after.items():
        old = before[name]
        if isinstance(value, dict) and isinstance(old, dict) and old:
            lines += changes_between(old, value, f"{prefix}{name}.")
        elif value != old:
            lines.append(f"{prefix}{name}: {old} -> {value}")
    return lines


def _leaves(params: Any, preset: dict[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Keys and value of every entry of the preset; a mapping that params.yaml leaves empty (`fields: {}`) is one entry."""
    for name, value in preset.items():
        keys = (*above, name)
        if name not in params:
            raise ParamsError(f"{'.'.join(keys)}: the preset names an entry that params.yaml does not have")
        if isinstance(value, dict) and isinstance(params[name], dict) and params[name]:
            yield from _leaves(params[name], value, keys)
        else:
            yield keys, value


def _at(params: Any, keys: Keys) -> Any:
    for key in keys:
        params = params[key]
    return params


def _set(text: str, keys: Keys, value: Any) -> str:
    """The text with one entry changed, or added where its section has it by a merge key only."""
    node, raw = yaml.compose(text, LOADER), yaml.load(text, LOADER)
    for depth, key in enumerate(keys):
        raw = raw[key]
        own = next(((name, found) for name, found in node.value if name.value == key), None)
        if own is None or _is_alias(*own):
            if below := keys[depth + 1 :]:  # a copy of the whole mapping, with that one entry changed
                raw = copy.deepcopy(raw)
                _at(raw, below[:-1])[below[-1]] = value
                value = raw
            return _replace(text, *own, value) if own else _add(text, node, key, value)
        name, node = own
    return _replace(text, name, node, value)


def _is_alias(name: yaml.Node, found: yaml.Node) -> bool:
    """Whether a value is written elsewhere (`*name`)."""
    return bool(found.start_mark.index < name.end_mark.index)


def _add(text: str, section: yaml.MappingNode, key: str, value: Any) -> str:
    """A new entry at the end of a section."""
    if section.flow_style:
        at = text.index("{", section.start_mark.index) + 1
        return f"{text[:at]}{key}: {_plain(value)}, {text[at:]}"
    name, last = section.value[-1]
    line = f"{' ' * name.start_mark.column}{key}: {_plain(value)}\n"
    at = text.find("\n", _end(last, text, name)) + 1
    return text[:at] + line + text[at:] if at else f"{text}\n{line}"


def _replace(text: str, name: yaml.Node, found: yaml.Node, value: Any) -> str:
    """The value after `name:` replaced; a comment behind it keeps its column where there is room."""
    colon = text.index(":", name.end_mark.index) + 1
    start, end, new = colon, _end(found, text, name), f" {_plain(value)}"
    if isinstance(found, yaml.CollectionNode) and not found.flow_style and found.value:
        first = text.rfind("\n", 0, found.start_mark.index)  # a block on lines of its own: what follows the colon stays
        return text[:colon] + new + text[colon:first] + text[end:]
    rest = text[end:].split("\n", 1)[0]
    comment = rest.lstrip(" ")
    if comment.startswith("#"):
        column = end + len(rest) - len(comment) - start
        return text[:start] + f"{new:<{column - 1}} " + comment + text[end + len(rest) :]
    return text[:start] + new + text[end:]


def _end(found: yaml.Node, text: str, name: yaml.Node) -> int:
    """Where a value's text ends; a block ends with its last entry, not where the next one begins."""
    if _is_alias(name, found):
        star = text.index("*", name.end_mark.index)
        return next(i for i in range(star, len(text) + 1) if i == len(text) or text[i] in " \n,}")
    while isinstance(found, yaml.CollectionNode) and not found.flow_style and found.value:
        last = found.value[-1]
        found = last[1] if isinstance(last, tuple) else last
    return int(found.end_mark.index)


def _plain(value: Any) -> str:
    """A value on one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def read_preset(name: str, root: Path = ROOT) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of presets/<name>.yaml to merge, and its block `dry_run`, which is not merged."""
    values = yaml.safe_load((root / "presets" / f"{name}.yaml").read_text(encoding="utf-8"))
    return values, values.pop("dry_run", {})


def in_force(name: str, root: Path = ROOT) -> Params:
    """The params as the preset would make them."""
    text = (root / "params.yaml").read_text(encoding="utf-8")
    return parse(yaml.safe_load(merge(text, read_preset(name, root)[0])))


def apply(name: str, root: Path = ROOT) -> list[str]:
    """Merge presets/<name>.yaml into params.yaml of a project and check the result; returns the changes."""
    path = root / "params.yaml"
    before = path.read_text(encoding="utf-8")
    after = merge(before, read_preset(name, root)[0])
    path.write_text(after, encoding="utf-8")
    try:
        read_params(path)
    except ParamsError:
        path.write_text(before, encoding="utf-8")
        raise
    return changes_between(yaml.safe_load(before), yaml.safe_load(after))


def main() -> int:
    """Command line."""
    names = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="python -m tasks.preset", description=__doc__)
    parser.add_argument("name", choices=names)
    parser.add_argument("--dry-run", action="store_true", help="print what it would need; change and download nothing")
    parser.add_argument("--flops", type=float, help="FLOP/s that the machine meant keeps up, for the times of --dry-run")
    asked = parser.parse_args()
    try:
        return _show(asked.name, asked.flops) if asked.dry_run else _put_in_force(asked.name)
    except ValueError as error:
        print(f"presets/{asked.name}.yaml: {error}", file=sys.stderr)
        return 2


def _show(name: str, rate: float | None) -> int:
    from tasks.dry_run import dry_run

    print(dry_run(in_force(name), read_preset(name)[1], rate))
    return 0


def _put_in_force(name: str) -> int:
    if (ROOT / ".git").exists() and subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "params.yaml"], cwd=ROOT
    ).returncode:
        print("params.yaml has uncommitted edits, which a preset could overwrite: commit them, or `git checkout params.yaml`")
        return 2
    print("\n".join(apply(name)) or "nothing to change")
    print("next: `dvc repro` (or `make run`); back: `git checkout params.yaml`")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
