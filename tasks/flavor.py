"""A checkpoint as MLflow model files: hard links to DVC's cache and a small MLmodel, so weights cost no second copy.

`mlflow.transformers.log_model` cannot take a folder with transformers 5, and would copy. Links keep the bytes also after
`dvc gc`; across file systems they become copies, and a remote server gets one upload.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.locked import LockedOut
from tasks.stage import stores_root

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

TOKENIZER = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template", "spiece")


def write_model(client: "MlflowClient", model: "LoggedModel", out: LockedOut, run_id: str) -> None:
    """Put the files of a checkpoint where MLflow keeps those of a model, unless they are there."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    place = model.artifact_location
    if not place.startswith(("/", "file:")):
        if not client.list_logged_model_artifacts(model.model_id):
            _upload(client, model, out, run_id)
        return
    folder = Path(local_file_uri_to_path(place))
    if not all((folder / "model" / name).exists() for name in out.files or {}) or not (folder / "MLmodel").exists():
        _fill(folder, model, out, run_id)


def _upload(client: "MlflowClient", model: "LoggedModel", out: LockedOut, run_id: str) -> None:
    place = stores_root() / ".telemetry"
    with tempfile.TemporaryDirectory(dir=place) as folder:
        _fill(Path(folder), model, out, run_id)
        client.log_model_artifacts(model.model_id, folder)


def _fill(folder: Path, model: "LoggedModel", out: LockedOut, run_id: str) -> None:
    files = out.files or {}
    for name, source in files.items():
        link(source, folder / "model" / name)
        if name.startswith(TOKENIZER):
            link(source, folder / "components" / "tokenizer" / name)
    _describe(folder, model, run_id)


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where links do not reach."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _describe(folder: Path, model: "LoggedModel", run_id: str) -> None:
    """Write the MLmodel file; a checkpoint that is only pinned (no weights here) gets one without a way to load it."""
    from mlflow.models import Model

    about = Model(run_id=run_id, model_id=model.model_id)
    if any((folder / "model").glob("*.safetensors")):
        config = json.loads((folder / "model" / "config.json").read_text())
        tokenizer = json.loads((folder / "model" / "tokenizer_config.json").read_text())
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        about.add_flavor(
            "transformers",
            model_binary="model",
            pipeline_model_type=config["architectures"][0],
            task="text-generation",
            instance_type="TextGenerationPipeline",
            framework="pt",
            source_model_name=None,
            torch_dtype=f"torch.{dtype}",
            components=["tokenizer"],
            tokenizer_type=tokenizer.get("tokenizer_class", "PreTrainedTokenizerFast"),
        )
        python = ".".join(map(str, sys.version_info[:3]))
        about.add_flavor("python_function", loader_module="mlflow.transformers", python_version=python, env={})
    about.save(str(folder / "MLmodel"))
