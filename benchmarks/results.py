"""benchmarks/results.json and results.md: one family's figures replace that family's alone."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import peer_environment
from benchmarks.measure import ROOT, THREADS, Measured, ratio, summary

FILE, README = ROOT / "benchmarks" / "results.json", ROOT / "README.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"  # of the table in README.md
BARS = {  # smallest ratio, largest share of the peer's peak memory (None: no bar)
    "ppo/wide_forced/trl_as_shipped": (2.5, 0.4),
    "ppo/tiny_natural/trl_as_shipped": (2.0, None),
    "ppo/tiny_natural/trl_without_gc": (1.7, None),
    "sft/tiny/trl": (1.2, 1.0),
    "sft/wide/trl": (1.3, 1.0),
    "dpo/tiny/trl": (1.4, 1.0),
    "dpo/wide/trl": (1.7, 1.0),
    **{f"sampling/tiny/generate_{rows}": (2.0, None) for rows in (16, 64, 256, 1024)},
    **{f"sampling/wide/generate_{rows}": (1.0, None) for rows in (16, 64, 256, 1024)},
}
PARTS = ("ratios", "sides", "figures", "correctness")


class Results:
    """What one family has found, merged into the file by `save`."""

    def __init__(self, family: str, file: Path = FILE, readme: Path = README) -> None:
        self.family, self.file, self.readme = family, file, readme
        self.found: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
        self.load = os.getloadavg()[1]

    def compare(self, prefix: str, measured: Mapping[str, Measured], ours: str = "ours") -> None:
        """Note the side named `ours` against every other one, and each side's own figures."""
        for name, side in measured.items():
            key = f"{prefix}/{name}"
            self.found["sides"][key] = summary(side)
            if name != ours:
                self.found["ratios"][key] = judged(key, ratio(side, measured[ours]))
                print(line(key, self.found["ratios"][key]), flush=True)

    def figure(self, key: str, values: Mapping[str, Any]) -> None:
        """Note figures that are no comparison."""
        self.found["figures"][key] = dict(values)
        print(f"{key}: {short(values)}", flush=True)

    def gate(self, key: str, values: Mapping[str, float]) -> None:
        """Note figures of the gate of correctness."""
        self.found["correctness"][key] = dict(values)
        print(f"correctness of {key}: {short(values)}", flush=True)

    def save(self) -> None:
        """Put this family's figures in the place of its former ones; write the table beside the file."""
        old = json.loads(self.file.read_text()) if self.file.exists() else {}
        whole = merged(old, self.family, self.found)
        whole["machine"] = machine()
        whole["measured"][self.family] = {"date": today(), "commit": commit(), "load": [self.load, os.getloadavg()[1]]}
        self.file.write_text(json.dumps(whole, indent=1) + "\n")
        self.file.with_suffix(".md").write_text(table(whole))
        self.readme.write_text(with_table(self.readme.read_text(encoding="utf-8"), whole), encoding="utf-8")


def merged(old: Mapping[str, Any], family: str, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The former results with those of one family replaced; keys are `family/...`, or the family itself."""
    whole: dict[str, Any] = {"machine": old.get("machine", {}), "measured": dict(old.get("measured", {}))}
    for part in PARTS:
        kept = {key: value for key, value in old.get(part, {}).items() if key.split("/")[0] != family}
        whole[part] = dict(sorted((kept | dict(found[part])).items()))
    return whole


def judged(key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A ratio with its bar, and whether it is met."""
    if key not in BARS:
        return entry
    least, most = BARS[key]
    met = entry["median"] >= least and (most is None or entry["memory_share"] <= most)
    return {**entry, "bar": {"median": least, "memory_share": most, "met": met}}


def machine() -> dict[str, Any]:
    """Where the figures were measured."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": THREADS,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "trl": peer_environment.CURRENT,
        "trl_with_ppo": peer_environment.PPO,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def today() -> str:
    """The date of the measurement."""
    return datetime.date.today().isoformat()


def commit() -> str:
    """The commit that was measured, with + for uncommitted changes; `none` outside a checkout."""
    done = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "none"


def short(values: Mapping[str, Any]) -> str:
    """Figures in a line."""
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())


def line(key: str, entry: Mapping[str, Any]) -> str:
    """A ratio in a line."""
    bar = {None: "", True: " bar met", False: " BAR MISSED"}[entry.get("bar", {}).get("met")]
    return (
        f"{key}: CPU {entry['median']:.2f}x [{entry['low']:.2f}, {entry['high']:.2f}], wall {entry['wall']['median']:.2f}x, "
        f"memory {entry['memory_share']:.2f} of the peer's, {entry['runs']} rounds{bar}"
    )


def table(whole: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    return "\n".join([*_head(whole), *_ratios(whole), *_sides(whole), *_figures(whole), *_correctness(whole), ""])


def with_table(text: str, whole: Mapping[str, Any]) -> str:
    """README.md with the table of ratios in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n" + "\n".join(_ratios(whole)) + f"\n{END}{rest.split(END)[1]}"


def _head(whole: Mapping[str, Any]) -> list[str]:
    machine = ", ".join(f"{name} {value}" for name, value in whole["machine"].items())
    runs = [
        f"{name} on {given['date']} at {given['commit']}, load {given['load'][0]:.1f}"
        for name, given in whole["measured"].items()
    ]
    return [
        "# Speed against peers",
        "",
        f"Measured on: {machine}.",
        "",
        f"Each family's date, commit, and load of the machine when it began (above {whole['machine']['cores']} other work ran "
        f"beside it): {'; '.join(runs)}.",
        "",
    ]


def _ratios(whole: Mapping[str, Any]) -> list[str]:
    rows = [
        "Peer over ours, both sides in turn in each round: above 1, ours is faster. Median [least, most] over the rounds; "
        "memory is our peak over the peer's.",
        "",
        "| against | CPU time | wall time | memory | rounds | bar |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, entry in whole["ratios"].items():
        rows.append(
            f"| {key} | {_spread(entry)} | {_spread(entry['wall'])} | {entry['memory_share']:.2f} | {entry['runs']} | "
            f"{_bar(entry.get('bar'))} |"
        )
    return [*rows, ""]


def _spread(entry: Mapping[str, float]) -> str:
    return f"{entry['median']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _bar(bar: Mapping[str, Any] | None) -> str:
    if bar is None:
        return ""
    memory = "" if bar["memory_share"] is None else f", memory at most {bar['memory_share']:g}"
    return f"at least {bar['median']:g}{memory}: {'met' if bar['met'] else 'MISSED'}"


def _sides(whole: Mapping[str, Any]) -> list[str]:
    rows = [
        "| side | CPU s | wall s | peak MiB | of them begun with | of its work (medians) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, side in whole["sides"].items():
        cpu, wall = median(side["cpu"]), median(side["wall"])
        said = {name: value for name, value in side.items() if name not in ("cpu", "wall", "peak_mib", "begun_mib")}
        if "tokens" in said:
            said["tokens_per_cpu_second"] = said["tokens"] / cpu
        rows.append(f"| {key} | {cpu:.3g} | {wall:.3g} | {side['peak_mib']:.0f} | {side['begun_mib']:.0f} | {short(said)} |")
    return [*rows, ""]


def _figures(whole: Mapping[str, Any]) -> list[str]:
    if not whole["figures"]:
        return []
    rows = ["| figure | values |", "| --- | --- |"]
    return [*rows, *(f"| {key} | {short(values)} |" for key, values in whole["figures"].items()), ""]


def _correctness(whole: Mapping[str, Any]) -> list[str]:
    return [f"Correctness of {key}: {short(values)}." for key, values in whole["correctness"].items()]
