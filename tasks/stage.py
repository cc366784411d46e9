"""What every stage shares: params, paths, history, metrics, telemetry, progress, resuming.

A stage module is `def main(stage): read, call one core function, write` and ends with `run(__name__, main, __doc__)`.
"""

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from apprentice.config import Params, ParamsError, parse
from apprentice.demonstrations import atomic_write
from apprentice.finite import BadSignError, all_finite
from tasks.alone import end_with_dvc, hold
from tasks.faults import in_a_line
from tasks.history import History

HELPER = "APPRENTICE_HELPER"  # what a helper of a stage was told (tasks/helpers.py)
_HELPER: dict[str, Any] | None = json.loads(os.environ.get(HELPER, "null"))
ROOT = Path(_HELPER["root"]) if _HELPER else Path(__file__).resolve().parents[1]
MAIN_LINE, METHODS = "dvc.yaml", "methods/dvc.yaml"  # the two pipeline files
SETTINGS = {"report_methods": "report", "register_methods": "register"}  # these go by the section of another stage
# Before torch loads OpenMP: threads that wait by spinning cost a factor of ten on a core that something else uses too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
PRIVACY = {  # no tool phones home, under a plain `dvc repro` neither
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # or reading a table of one's own counts as a download
}
for _name, _value in PRIVACY.items():
    os.environ.setdefault(_name, _value)


class StageError(RuntimeError):
    """A stage cannot go on for a reason the user can mend; the message says what to do."""


def stores_root() -> Path:
    """Where stores that outlive a workspace live: the project itself, also inside `dvc exp run --temp`."""
    return Path(os.environ.get("DVC_ROOT") or ROOT)


def read_params(path: Path | None = None) -> Params:
    """Read and check the whole of params.yaml (ours, unless another is named)."""
    import yaml

    path = path or ROOT / "params.yaml"
    try:
        return parse(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ParamsError(f"{path.name} is no valid YAML: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def address_of(label: str) -> str:
    """Where DVC finds a stage, called from the project's root: `sft` itself, `methods/dvc.yaml:crlft` of the further methods.

    `label` is the stage's name, with its item if it has one (`evaluate@base`); names are unique over both pipeline files.
    """
    import yaml

    path = ROOT / METHODS
    try:
        further = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages", {}) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise StageError(f"{METHODS} is no valid YAML: {error}") from error
    return f"{METHODS}:{label}" if label.split("@")[0] in further else label


class Stage:
    """One running stage: its params, its folders, and where it reports."""

    def __init__(self, name: str, params: Params, item: str | None = None) -> None:
        self.name, self.params, self.item = name, params, item
        self.config = getattr(params, SETTINGS.get(name, name))
        self.data = ROOT / "data"
        self.reports = self.data / "reports" / name / (item or "")
        self.history = History(self.reports / "history.csv")
        self._made = self._began = self._said = time.monotonic()
        self._first_step: int | None = None
        self._at_end: list[Callable[[], None]] = []
        self.skipped_steps = 0  # of training, since a number of theirs was not finite
        self.stoppable = False  # while steps are being taken, each of which can be saved
        self.by_hand, self.helper = "DVC_STAGE" not in os.environ, _HELPER
        self.lock: IO[str] | None = None  # held while it runs
        self.held: dict[Path, IO[str]] = {}  # the same of its unfinished work, by folder
        self.stop_signal = 0  # the signal that asked to stop after the step at hand
        self.agree: Callable[[int], int] = int  # what it shall go by: with models spread over processes, what the first says

    @property
    def label(self) -> str:
        """The stage's name with its item, e.g. `sft` or `evaluate@base`; `address_of` says where DVC has it."""
        return f"{self.name}@{self.item}" if self.item else self.name

    def expect_inside(self, path: Path, entry: str) -> None:
        """Raise StageError for a path of the params outside the project, symlinks followed, unless `runtime` allows it."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of symlinks, a name too long, a NUL in it
            raise StageError(f"{entry}: {str(path)!r} is no path that can be followed: {error}") from error
        projects = (self.data.parent.resolve(), stores_root().resolve())
        if not self.params.runtime.outside_project and not any(map(real.is_relative_to, projects)):
            raise StageError(
                f"{entry}: expected a path inside the project, got {str(real)!r}; copy it into the project, or set "
                "runtime.outside_project: true to read it from there"
            )

    def say(self, message: str) -> None:
        """Print one line under the stage's name."""
        print(f"[{self.label}] {message}", flush=True)

    def warn(self, message: str) -> None:
        """Print a warning and keep it in the telemetry."""
        self.say(f"WARNING: {message}")
        self.telemetry(event="warning", message=message)

    def bad_sign(self, message: str) -> None:
        """Warn of a sign that the run goes wrong; with `runtime.on_bad_sign: stop` raise BadSignError instead."""
        if self.params.runtime.on_bad_sign == "stop":
            raise BadSignError(message)
        self.warn(message)

    def progress(self, step: int, total: int, **shown: float) -> None:
        """Print step, figures, rate and remaining time, at most every `runtime.progress_seconds`."""
        now = time.monotonic()
        self._first_step = step - 1 if self._first_step is None else self._first_step
        rate = (step - self._first_step) / max(now - self._began, 1e-9)
        self.telemetry(event="step", step=step, total=total, steps_per_second=round(rate, 4))
        if step < total and now - self._said < self.params.runtime.progress_seconds:
            return
        self._said = now
        left = timedelta(seconds=round((total - step) / rate))
        figures = " ".join(f"{key} {value:.4g}" for key, value in shown.items())
        self.say(f"{step}/{total} {figures} | {rate:.3g} steps/s, {left} left")

    def start_clock(self) -> None:
        """Begin the rate and remaining time of `progress` here, loading left out."""
        self._began, self._first_step = time.monotonic(), None

    def metrics(self, values: dict[str, Any]) -> None:
        """Write `metrics.json`, the figures DVC and MLflow show; raises StageError for one that is not finite."""
        for name, value in values.items():
            if not all_finite({name: value}):
                raise StageError(
                    f"{self.label}: the figure {name} is {value}, not a finite number: a model that this stage loads holds NaN "
                    "or infinite weights, or scores a response so; run the stage that made it again"
                )
        write_json(self.reports / "metrics.json", self.counted(values))

    def counted(self, values: dict[str, Any]) -> dict[str, Any]:
        """Figures of the stage, with `skipped_steps` where there are some."""
        return {**values, "skipped_steps": self.skipped_steps} if self.skipped_steps else values

    def telemetry(self, **event: Any) -> None:
        """Append what differs from run to run (times, rates, host); never a DVC output."""
        path = stores_root() / ".telemetry" / f"{self.label}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")

    @cached_property
    def key(self) -> str:
        """Hash of the stage's command, params and inputs: equal keys mean equal work."""
        from tasks.dvcstage import current_key

        return str(self.helper["key"]) if self.helper else current_key(self.label)

    def ask_to_stop(self, number: int, _frame: object) -> None:
        """On SIGTERM or SIGINT: stop once the step at hand is saved; at once where there is none, or when asked again."""
        if not self.stoppable or self.stop_signal:
            raise SystemExit(128 + number)
        self.stop_signal = number
        self.say("asked to stop: finishing this step, then saving; ask again to stop at once")

    def snapshot_due(self, done: int, saved_at: float) -> bool:
        """Whether `runtime` asks for a snapshot after step `done`, the last one being of `saved_at` (monotonic seconds)."""
        runtime = self.params.runtime
        by_steps = runtime.checkpoint_steps is not None and done % runtime.checkpoint_steps == 0
        return not self.helper and (by_steps or time.monotonic() - saved_at >= runtime.checkpoint_seconds)

    def resumed(self, unit: str, done: int) -> None:
        """Say and note that the stage goes on after step (or piece) `done` of an interrupted run."""
        self.say(f"continuing after {unit} {done} of an interrupted run")
        self.telemetry(event="resumed", unit=unit, resumed_at=done)

    def saved(self, unit: str, done: int) -> None:
        """Note a snapshot after step (or piece) `done`; exit with 128 + signal where the stage was asked to stop."""
        self.telemetry(event="saved", unit=unit, step=done)
        if self.stop_signal:
            self.say(f"stopped; {unit} {done} is saved, and the same command goes on from there")
            raise SystemExit(128 + self.stop_signal)

    def at_end(self, act: Callable[[], None]) -> None:
        """Do something once the stage has ended well, what was asked for last first."""
        self._at_end.append(act)

    def finish(self) -> None:
        """Do what was asked for the end, note it, then leave unfinished work: killed in between, it goes on from there."""
        from tasks.unfinished import leave

        for act in reversed(self._at_end):
            act()
        unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes there, KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
        self.telemetry(event="finished", seconds=round(time.monotonic() - self._made, 1), peak_memory_mib=peak)
        for folder in list(self.held):
            leave(self, folder)


def run(
    module: str, main: Callable[[Stage], None], about: str | None, items: Callable[[Params], list[str]] | None = None
) -> None:
    """Entry point of a stage module: parse the command line, check params, run, report errors in a line.

    Does nothing on import. `items` lists the allowed items of a `foreach` stage, given on the command line.
    """
    if module != "__main__":
        return
    name = Path(sys.argv[0]).stem
    failed: str | None = None
    try:
        params = read_params()
        item = _command_line(name, about, items(params) if items else None)
        stage = Stage(name, params, item)
        if not stage.helper:
            _begin(stage)
        main(stage)
        _finish(stage)
    except (ParamsError, StageError) as error:
        failed = f"{type(error).__name__}: {error}"
    except Exception as error:
        failed = in_a_line(error, name, ROOT)
        if failed is None:
            raise
    if failed:
        print(f"[{name}] {failed}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    sys.stdout.flush()
    os._exit(0)  # unloading torch takes a while: killed meanwhile, the finished stage would be begun anew


def _command_line(name: str, about: str | None, items: list[str] | None) -> str | None:
    import argparse

    section = SETTINGS.get(name, name)
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{name}",
        description=about,
        epilog=f"Settings: params.yaml, section `{section}`. `dvc repro {address_of(name)}` runs this and what it needs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if items:
        # DVC names the item in DVC_STAGE: in the command itself, a value of params.yaml would reach a shell
        _, _, asked = os.environ.get("DVC_STAGE", "").partition("@")
        parser.add_argument("item", choices=items, nargs="?" if asked else None, default=asked, help="the model")
    return getattr(parser.parse_args(), "item", None)


def _begin(stage: Stage) -> None:
    """Be the only one at this stage; by hand, remove its outputs first, as DVC does; sweep; obey signals; note the start."""
    from tasks.unfinished import sweep

    stage.lock, waited = hold(ROOT / ".dvc" / "tmp" / "stages" / f"{stage.label}.lock", stage.say)
    if stage.by_hand or waited:
        from tasks.dvcstage import outputs_of

        for path in outputs_of(stage.label):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stage.ask_to_stop)
    if not stage.by_hand:
        end_with_dvc()  # which, killed, would leave it behind
    sweep(stage)
    stage.reports.mkdir(parents=True, exist_ok=True)
    stage.telemetry(event="started", host=os.uname().nodename, pid=os.getpid())


def _finish(stage: Stage) -> None:
    """Note the end, and say what is next by hand."""
    stage.finish()
    if stage.by_hand:
        address = address_of(stage.label)
        rest = "dvc repro" if address == stage.label else "dvc repro -P"
        stage.say(f"done. `dvc commit {address}` records it, `{rest}` brings what depends on it up to date.")
