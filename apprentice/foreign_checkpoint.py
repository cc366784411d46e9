"""A checkpoint folder from elsewhere: what is wrong with it is told before anything of it is loaded.

`inspect_checkpoint` reads JSON and the headers of safetensors, no more, and is cheap enough for every load. `try_out` is for
the moment at which a checkpoint is taken in: it tries in a child process, under limits, what can only be tried
(`apprentice.checkpoint_trial`), so that what loops, grows or crashes takes that process alone.

Weights in pickle (`*.bin`, `*.pt`, `*.pkl`) and modules of its own (`*.py`) that lie beside whole safetensors are left unread.
They refuse a folder only where it needs them: no safetensors, or a config that names its own code.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
CONFIGS = (CONFIG, "generation_config.json", "tokenizer_config.json", "processor_config.json", "adapter_config.json")
WORDS = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json")
CODE = {"auto_map", "trust_remote_code", "custom_generate"}  # entries that name code to load
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5"}
JSON_BYTES = 2**28  # the largest tokenizer.json known has a tenth of it
STORED = re.compile(r"/blobs/[0-9a-f]{40,64}$|/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")  # the caches of the hub and of DVC


def inspect_checkpoint(folder: Path) -> None:
    """Refuse (ValueError, in one line) a folder that would run code, read elsewhere or is not whole; nothing is loaded.

    A folder without config.json is a tokenizer's and needs no weights.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    _check_links(folder)
    for name in (*CONFIGS, *WORDS):
        if (folder / name).exists():
            value = read_json(folder / name)
            if name in CONFIGS:
                _check_entries(folder / name, value)
    if (folder / CONFIG).exists():
        weight_places(folder)


def other_layers(config: Any) -> list[str]:
    """The kinds of a model's layers that keep something else than keys and values of each token, as transformers names them."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    return sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})


def weight_places(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a folder, by the tensor's name. Raises ValueError where they are not whole safetensors."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: it is an adapter, and would load the model it names; merge it into its base first")
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return dict.fromkeys(tensor_names(single), single)
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        reason = f", only {pickles[0]}, which could run any code when loaded" if pickles else ""
        raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX}{reason}; convert it to safetensors")
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index}: not a safetensors index; expected `weight_map`, a file for each tensor")
    for name in sorted(set(places.values())):
        file = folder / name
        if Path(name).name != name or file.suffix != ".safetensors":
            raise ValueError(f"{index}: names {name!r}; expected safetensors files of the same folder")
        if not file.is_file():
            raise ValueError(f"{file}: named in {INDEX} but missing; fetch the checkpoint again")
        held = set(tensor_names(file))
        if absent := [tensor for tensor, place in places.items() if place == name and tensor not in held]:
            raise ValueError(f"{file}: {INDEX} says that it holds {absent[0]}, and it does not")
    return {tensor: folder / name for tensor, name in places.items()}


def tensor_names(file: Path) -> list[str]:
    """Names in the header of a safetensors file, in its order. Raises ValueError for a file that its header does not fit."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: no safetensors file that can be read ({type(error).__name__}: {error})") from error


def read_json(file: Path) -> Any:
    """A JSON file of a checkpoint. Raises ValueError for one that is none, or too large to be one."""
    if not file.is_file() or file.stat().st_size > JSON_BYTES:
        raise ValueError(f"{file}: expected a file of at most {JSON_BYTES:,} bytes")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no valid JSON ({type(error).__name__}: {error})") from error


def try_out(*folders: Path) -> None:
    """Try inspected folders in a child process under limits: architecture, tokenizer, chat template and every weight.

    Raises ValueError with the reason where one is refused.
    """
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "apprentice.checkpoint_trial", *(str(folder.resolve()) for folder in folders)]
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return
    told = (done.stdout.splitlines() or ["it could not be tried"])[-1]
    if done.returncode < 0:
        raise ValueError(f"{told}: it takes more time or memory than any honest one, or crashes; use another checkpoint")
    last = (done.stderr.strip().splitlines() or [""])[-1]
    raise ValueError(told if done.returncode == 3 else f"{told} ({last})")


def _check_links(folder: Path) -> None:
    """Refuse links that leave the folder: what they point to would be read, and copied beside new weights."""
    for path in [*folder.iterdir(), *folder.glob("*/*.jinja"), *folder.glob("adapter/*")]:
        if path.is_symlink():
            target = path.resolve()
            if not target.is_relative_to(folder.resolve()) and not STORED.search(target.as_posix()):
                raise ValueError(f"{path}: a link that leaves the folder, to {target}; put the file itself there")


def _check_entries(file: Path, config: Any) -> None:
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a mapping, got {type(config).__name__}")
    for name, value in _entries(config):
        if name in CODE:
            raise ValueError(f"{file}: `{name}` asks for code of the checkpoint's own, which is never run; remove the entry")
        if name.endswith("_implementation") and "/" in str(value):
            raise ValueError(f"{file}: `{name}` asks for a kernel from the hub, {value!r}; remove the entry")
        if name == "transformers_weights":
            raise ValueError(f"{file}: `{name}` names other weights, {value!r}; expected {SINGLE} or {INDEX}")
        if name == "quantization_config":
            raise ValueError(f"{file}: `{name}`: its weights are quantised and cannot be trained; take the full ones")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON with its value."""
    todo = [value]
    while todo:
        found = todo.pop()
        if isinstance(found, dict):
            yield from found.items()
            todo += found.values()
        elif isinstance(found, list):
            todo += found
