"""A small DVC project around the real tasks and flows: stages of a second, fake checkpoints, the real params.

prepare -> base -> sft -> evaluate@base, evaluate@sft -> report -> register
        -> words (no torch, beside base)
In methods/dvc.yaml: sft -> extra -> evaluate_methods@extra -> report_methods -> register_methods, and `told`, which learned
from the verifier's answers and is measured by nobody.
"""

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import PARTS, ROOT, Project

PROC = Path("/proc")

WORKER = '''
"""Does what a stage of the toy does: python worker.py <stage> [<item>]."""
import csv, hashlib, json, os, pathlib, signal, sys, time


def real_model(folder, seed):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    sizes = dict(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained(folder)


name, item = sys.argv[1], (sys.argv + [""])[2]
knobs = json.loads(pathlib.Path("knobs.json").read_text())
if name in knobs.get("fail", []):
    print("ERROR: the stage cannot", flush=True)
    raise SystemExit(3)
print(f"[{name}] from a {'warm' if 'colorsys' in sys.modules else 'cold'} start", flush=True)
data, reports = pathlib.Path("data"), pathlib.Path("data/reports") / name / item
reports.mkdir(parents=True, exist_ok=True)
seed = int(hashlib.md5((name + item + pathlib.Path("salt").read_text()).encode()).hexdigest()[:4], 16)
if name in knobs.get("hang", []):
    pathlib.Path("hanging").write_text(str(os.getpid()))
    print("hanging", flush=True)
    if knobs.get("deaf"):
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, lambda *_: pathlib.Path("asked").touch())
    time.sleep(600)
if name in ("base", "sft", "extra", "told"):
    model = data / "models" / name
    model.mkdir(parents=True)
    if knobs.get("real"):
        real_model(model, seed)
    else:
        (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "dtype": "float32"}))
        (model / "tokenizer_config.json").write_text("{}")
        (model / "model.safetensors").write_bytes(seed.to_bytes(4, "big") * 1000)
    with (reports / "history.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\\n")
        writer.writerow(["step", "loss"])
        for step in range(1, 6):
            while name in knobs.get("hold", []) and step == 3 and not pathlib.Path("go").exists():
                time.sleep(0.1)
            writer.writerow([step, f"{seed / step:.6g}"])
            file.flush()
            time.sleep(knobs.get("step_seconds", 0))
if name in ("report", "report_methods"):
    files = {path.parent.name: path for path in sorted((data / "reports/evaluate").glob("*/metrics.json"))}
    if name == "report_methods":
        files |= {"extra": data / "reports/evaluate_methods/extra/metrics.json"}
    models = {m: json.loads(path.read_text()) for m, path in files.items()}
    page = "methods" if name == "report_methods" else "report"
    loss = {m: {"mean": v["loss"], "low": v["loss"] - 1, "high": v["loss"] + 1} for m, v in models.items()}
    figures = {m: {"validation/held_out_loss": value} for m, value in loss.items()}
    (data / f"reports/{page}.json").write_text(json.dumps({"seed": 0, "models": figures, "differences": []}))
    last = list(models)[-1]
    text = f"# Report\\n\\n| model | loss |\\n| --- | --- |\\n| {last} | 1 |\\n\\nmore\\n"
    (data / f"reports/{page}.md").write_text(text)
    (data / f"reports/{page}.html").write_text("<p>report</p>")
else:
    if name == "prepare":
        (data / "clean").mkdir()
        (data / "clean/answers.jsonl").write_text("answers")
    (reports / "metrics.json").write_text(json.dumps({"loss": seed, "text": "left out"}))
print(f"[{name}] done on {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
'''


def _stage(name: str, deps: list[str], outs: list[str], metric: str | None = None, **more: Any) -> dict[str, Any]:
    metric = metric or f"data/reports/{name}/metrics.json"
    return {"cmd": f"python worker.py {name}", "deps": [*deps, "salt"], "outs": outs, "metrics": [metric], **more}


def pipeline() -> dict[str, Any]:
    """The toy's dvc.yaml."""
    stages = {"prepare": _stage("prepare", [], ["data/clean"]), "words": _stage("words", ["data/reports/prepare"], [])}
    for name, need in (("base", "data/reports/prepare"), ("sft", "data/models/base")):
        outs = [f"data/models/{name}", f"data/reports/{name}/history.csv"]
        meta = {"torch": True, "register": name}
        stages[name] = _stage(name, [need], outs, params=["seed", "sft.learning_rate"], meta=meta, desc=f"makes {name}")
    stages["evaluate"] = {
        "foreach": ["base", "sft"],
        "do": {
            "cmd": "python worker.py evaluate ${item}",
            "deps": ["data/models/${item}", "salt"],
            "params": ["evaluate.samples"],
            "metrics": ["data/reports/evaluate/${item}/metrics.json"],
            "meta": {"torch": True},
        },
    }
    outs = ["data/reports/report.md", "data/reports/report.html"]
    stages["report"] = _stage("report", ["data/reports/evaluate"], outs, "data/reports/report.json")
    stages["register"] = {
        "cmd": "python -m tasks.register",
        "deps": ["data/reports/report.json", "data/models/base", "data/models/sft"],
        "params": ["register"],
        "outs": ["data/reports/complete", {"data/reports/registry.json": {"persist": True}}],
    }
    return {"stages": stages}


def methods() -> dict[str, Any]:
    """The toy's methods/dvc.yaml."""
    stages: dict[str, Any] = {}
    for name, needs in (("extra", ["data/models/sft"]), ("told", ["data/models/sft", "data/clean/answers.jsonl"])):
        outs = [f"data/models/{name}", f"data/reports/{name}/history.csv"]
        stages[name] = _stage(name, needs, outs, params=["seed"], meta={"torch": True, "register": name}, wdir="..")
    stages["evaluate_methods"] = {
        "foreach": ["extra"],
        "do": {
            "wdir": "..",
            "cmd": "python worker.py evaluate_methods ${item}",
            "deps": ["data/models/${item}", "salt"],
            "params": ["evaluate.samples"],
            "metrics": ["data/reports/evaluate_methods/${item}/metrics.json"],
            "meta": {"torch": True},
        },
    }
    read = ["data/reports/evaluate", "data/reports/evaluate_methods"]
    outs = ["data/reports/methods.md", "data/reports/methods.html"]
    stages["report_methods"] = _stage("report_methods", read, outs, "data/reports/methods.json", wdir="..")
    stages["register_methods"] = {
        "wdir": "..",
        "cmd": "python -m tasks.register_methods",
        "deps": ["data/reports/methods.json", "data/models/extra", "data/models/told"],
        "params": ["register"],
        "outs": ["data/reports/complete_methods", {"data/reports/registry_methods.json": {"persist": True}}],
    }
    return {"vars": ["../params.yaml"], "stages": stages}


def make_toy(root: Path) -> Project:
    """A new toy in an empty folder: our tasks and flows packages around the toy's stages."""
    for part in (*PARTS, "pyproject.toml"):
        source, target = ROOT / part, root / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        elif source.is_file():
            shutil.copy(source, target)
    toy = Project(root)
    toy.path("dvc.yaml").write_text(yaml.safe_dump(pipeline(), sort_keys=False))
    toy.path("methods").mkdir(exist_ok=True)
    toy.path("methods/dvc.yaml").write_text(yaml.safe_dump(methods(), sort_keys=False))
    toy.path("methods/dvc.lock").unlink(missing_ok=True)
    toy.path("worker.py").write_text(WORKER)
    load_little(toy)
    toy.path("salt").write_text("a")
    toy.without_git()
    knobs(toy)
    return toy


def load_little(project: Project) -> None:
    """Let its warm Python load `colorsys` in place of torch, which takes seconds."""
    head, begins, rest = project.path("tasks/warm.py").read_text().partition("def _load() -> None:\n")
    rest = rest[rest.index("\n\n\n") :]
    project.path("tasks/warm.py").write_text(f"{head}{begins}    import colorsys  # stands for torch{rest}")


def knobs(toy: Project, **values: Any) -> None:
    """What the stages do beside their work: fail=[names], hang=[names] (deaf: to signals too), hold=[names] before their third
    step until there is a file `go`, step_seconds, real (checkpoints)."""
    toy.path("knobs.json").write_text(json.dumps(values))


def environment(toy: Project, **more: str) -> dict[str, str]:
    """The environment of a child in the toy: nothing of the stores of this process."""
    ours = ("DVC_", "MLFLOW_", "PREFECT_", "CUDA_")
    own = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", "")])
    return own | {"PYTHONPATH": str(toy.root), "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", **more}


def run(toy: Project, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` in the toy; both streams in stdout."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=toy.root,
        env=environment(toy, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ask(toy: Project, code: str) -> Any:
    """The JSON that a piece of Python prints as its last line in the toy."""
    done = run(toy, "-c", code)
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def begin(toy: Project, *command: str, **more: str) -> "subprocess.Popen[str]":
    """Start `python COMMAND` in the toy, in a group of its own, its output in output.txt."""
    with toy.path("output.txt").open("w") as file:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=toy.root,
            env=environment(toy, **more),
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@cache
def empty_store() -> Path:
    """An MLflow database with nothing in it, to copy: making one takes seconds."""
    import mlflow

    path = _scratch() / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@cache
def empty_prefect() -> Path:
    """The same of Prefect, whose every new server would make it."""
    home = _scratch()
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    subprocess.run(command, cwd=home, env={**clean, "PREFECT_HOME": str(home)}, check=True, capture_output=True)
    return home / "prefect.db"


def _scratch() -> Path:
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path)
    return path


def with_stores(project: Project, mlflow: bool = True) -> Project:
    """Give a project the empty databases of Prefect's own server and, unless told otherwise, of MLflow."""
    project.path(".prefect").mkdir()
    shutil.copy(empty_prefect(), project.path(".prefect/prefect.db"))
    if mlflow:
        shutil.copy(empty_store(), project.path("mlflow.db"))
    return project


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float = 90.0, log: Path | None = None) -> None:
    """Return when the condition holds; else fail with what the log says."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited too long; {log}: {log.read_text() if log else ''}"
        time.sleep(0.1)


def runs(pid: int) -> bool:
    """Whether a process lives (a dead one that nobody waited for does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def begun_in(toy: Project) -> list[str]:
    """Commands of living processes of a toy: those that inherited its path."""
    found = []
    for entry in PROC.glob("[0-9]*"):
        try:
            if f"PYTHONPATH={toy.root}\0".encode() in (entry / "environ").read_bytes() and runs(int(entry.name)):
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found
