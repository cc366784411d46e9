"""What README.md quotes exists: commands, files, params, metrics."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import yaml

from tasks.report_metrics import DOMAINS, METRICS, TRAINING, entry
from tests import readme
from tests.imports import PACKAGES, ROOT, pipelines, sources

EXTENSIONS = {"csv", "dvc", "html", "ini", "json", "jsonl", "lock", "md", "png", "py", "svg", "toml", "txt", "yaml"}


def quoted_params() -> list[str]:
    """Names such as `srppo.kl_coef`, and what `-S` sets."""
    sections = yaml.safe_load((ROOT / "params.yaml").read_text())
    names = [name for name in readme.spans() if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name)]
    names = [name for name in names if name.split(".")[0] in sections and name.split(".")[-1] not in EXTENSIONS]
    return names + re.findall(r"(?:-S|--set-param)[ =]'?([\w.]+)=", readme.text())


def shown_stages() -> set[str]:
    """Stages that README.md shows how to add."""
    return set(re.findall(r"^  (\w+):\n    desc:", readme.text(), re.MULTILINE))


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line.split("  ")[0].split()[1:] for line in readme.commands() if re.match(r"make( |$)", line)]
    quoted = {word for words in lines for word in words if "=" not in word and not word.startswith("-")}
    assert {"run", "test"} <= quoted <= targets


def test_every_module_run_with_python_exists() -> None:
    modules = {name for line in readme.commands() for name in re.findall(r"\bpython3? -m ([\w.]+)", line)}
    assert modules, "README.md quotes no `python -m ...`"
    modules -= {f"tasks.{name}" for name in shown_stages()}
    assert not {name for name in modules if importlib.util.find_spec(name) is None}


def test_every_stage_named_in_a_command_exists() -> None:
    stages = {name for path in pipelines() for name in yaml.safe_load(path.read_text())["stages"]}
    stages |= {"pipelines.dvc", "dvc.yaml"} | shown_stages()
    words = [line.split()[2:] for line in readme.commands() if re.match(r"dvc (repro|status|commit) ", line)]
    named = {word.split("@")[0].split(":")[-1] for one in words for word in one if re.match(r"[a-z]", word)}
    assert named, "README.md quotes no `dvc repro <stage>`"
    assert named <= stages


def test_the_map_of_the_code_is_right_and_whole() -> None:
    paths = readme.code_map()
    assert [path for path in paths if not (ROOT / path).exists() or path.endswith("/") != (ROOT / path).is_dir()] == []
    code = {path for path in sources(*PACKAGES) if Path(path).name != "__init__.py"}
    assert code - set(paths) == set()
    assert len(paths) == len(set(paths))


def test_every_file_and_link_quoted_exists() -> None:
    quoted = [name for name in readme.spans() if re.fullmatch(r"(apprentice|tasks|flows|tests|presets|methods)/[\w./-]+", name)]
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", readme.text())]
    assert [name for name in quoted + links if not (ROOT / name).exists()] == []


def test_every_params_key_quoted_exists() -> None:
    params: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    quoted = quoted_params()
    assert quoted, "README.md quotes no entry of params.yaml"
    for name in quoted:
        section: Any = params
        for part in name.split("."):
            assert isinstance(section, dict) and part in section, f"`{name}` is not in params.yaml"
            section = section[part]


def test_every_metric_is_explained_and_every_metric_quoted_exists() -> None:
    named = {entry(name) for name in readme.metric_names()}
    assert METRICS.keys() - named == set()
    assert named - METRICS.keys() - TRAINING.keys() == set()
    keys = [name.split("/") for name in readme.spans() if name.split("/")[0] in DOMAINS and "/" in name]
    assert [key for key in keys if entry(key[1]) not in METRICS] == []
