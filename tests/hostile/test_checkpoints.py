"""A corpus of poisoned checkpoint folders: each is refused with its reason, at every door, and nothing of it has run."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from apprentice import checkpoint_trial
from apprentice.foreign_checkpoint import INDEX, inspect_checkpoint, try_out
from apprentice.policy import load_policy, load_tokenizer
from apprentice.tokens import train_word_tokenizer
from apprentice.vector_folders import Checkpoint
from tasks.preset import apply
from tests.apprentice.toys import tiny_llama
from tests.conftest import ROOT, Project
from tests.imports import sources as py_files

CONTENT = "{% for m in messages %}{{ m.content }}{% endfor %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
WEIGHT = "model.layers.1.mlp.up_proj.weight"
Poison = Callable[[Path], Any]


class Marker:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "ran"))


def whole(folder: Path) -> Path:
    """A checkpoint with nothing wrong: 4 words and 11 reserved tokens."""
    tokenizer = train_word_tokenizer(["one two three"], 3)
    tiny_llama(0, vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def entry(file: str, **values: Any) -> Poison:
    """Set entries of a JSON file."""

    def poison(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return poison


def text(file: str, content: str) -> Poison:
    return lambda folder: (folder / file).write_text(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Poison:
    def poison(folder: Path) -> None:
        path = folder / "model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    return poison


def pickled(folder: Path) -> None:
    """Weights in pickle only, and every other pickle that lies about in real folders."""
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pkl"):
        (folder / name).write_bytes(pickle.dumps(Marker(folder.parent / "ran")))


def own_code(file: str, kind: str) -> Poison:
    """A config that names a module of the folder, which writes the marker when it is imported."""

    def poison(folder: Path) -> None:
        (folder / "modeling_own.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w').write('ran')\nclass Own: pass\n")
        entry(file, auto_map={kind: ["modeling_own.Own", None] if kind == "AutoTokenizer" else "modeling_own.Own"})(folder)

    return poison


def link(file: str) -> Poison:
    def poison(folder: Path) -> None:
        secret = folder.parent / "secret"
        secret.write_text("{}")
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(secret)

    return poison


def sharded(name: str) -> Poison:
    def poison(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {WEIGHT: name}}))

    return poison


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 8)


def grow(weights: dict[str, torch.Tensor]) -> None:
    weights[WEIGHT] = torch.zeros(33, 16)


def spoil(weights: dict[str, torch.Tensor]) -> None:
    weights[WEIGHT][3, 5] = float("nan")


# Found without loading anything, so at every load.
STATIC: dict[str, tuple[Poison, str]] = {
    "pickle alone": (pickled, "only optimizer.pt, which could run any code when loaded; convert it to safetensors"),
    "own model code": (own_code("config.json", "AutoModelForCausalLM"), "`auto_map` asks for code of the checkpoint's own"),
    "own config code": (own_code("config.json", "AutoConfig"), "`auto_map` asks for code"),
    "own tokenizer code": (own_code("tokenizer_config.json", "AutoTokenizer"), "tokenizer_config.json: `auto_map` asks for"),
    "trust asked for": (entry("config.json", trust_remote_code=True), "`trust_remote_code` asks for code"),
    "own code deep down": (entry("config.json", text_config={"auto_map": {"AutoConfig": "x.X"}}), "`auto_map` asks for code"),
    "own generation": (entry("generation_config.json", custom_generate="evil/repo"), "`custom_generate` asks for code"),
    "kernel of the hub": (entry("config.json", attn_implementation="evil/kernel"), "a kernel from the hub, 'evil/kernel'"),
    "other weights": (entry("config.json", transformers_weights="../x.safetensors"), "names other weights, '../x.safetensors'"),
    "quantised": (entry("config.json", quantization_config={"quant_method": "x"}), "its weights are quantised"),
    "adapter": (text("adapter_config.json", '{"base_model_name_or_path": "evil/model"}'), "it is an adapter"),
    "shard above": (sharded("../outside.safetensors"), "names '../outside.safetensors'; expected safetensors files of"),
    "shard elsewhere": (sharded("/tmp/outside.safetensors"), "names '/tmp/outside.safetensors'"),
    "shard in pickle": (sharded("pytorch_model.bin"), "names 'pytorch_model.bin'"),
    "shard missing": (sharded("model-1.safetensors"), "named in model.safetensors.index.json but missing"),
    "index of nothing": (lambda f: (sharded("x")(f), text(INDEX, "[]")(f)), "not a safetensors index"),
    "config elsewhere": (link("config.json"), "a link that leaves the folder"),
    "words elsewhere": (link("vocab.txt"), "a link that leaves the folder"),
    "truncated": (truncate, "no safetensors file that can be read"),
    "no weights": (text("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "no safetensors file that can be"),
    "no config": (text("config.json", "{"), "config.json: no valid JSON"),
    "config of a list": (text("config.json", "[]"), "config.json: expected a mapping, got list"),
    "config without end": (text("config.json", "[" * 200_000), "config.json: no valid JSON (RecursionError"),
    "tokenizer cut off": (text("tokenizer.json", '{"version": "1.0", "model": {'), "tokenizer.json: no valid JSON"),
}
# Found by trying, within limits, when the checkpoint is taken in.
TRIED: dict[str, tuple[Poison, str]] = {
    "unknown architecture": (entry("config.json", model_type="no such"), "config.json describes no model that can be built"),
    "negative size": (entry("config.json", hidden_size=-16), "config.json describes no model that can be built"),
    "no heads": (entry("config.json", num_attention_heads=0), "config.json describes no model that can be built"),
    "huge size": (entry("config.json", hidden_size=10**9, head_dim=8), "is [15, 1000000000] by config.json, [15, 16] in the"),
    "size as text": (entry("config.json", hidden_size="16"), "config.json describes no model that can be built"),
    "layers of no attention": (
        lambda folder: MambaForCausalLM(MambaConfig(vocab_size=15, hidden_size=16, num_hidden_layers=1)).save_pretrained(
            folder
        ),
        "it has layers that are no attention (LinearAttentionLayer)",
    ),
    "layers missing": (entry("config.json", num_hidden_layers=4), "parameters, the files hold"),
    "shape mismatch": (tensors(grow), f"{WEIGHT} is [32, 16] by config.json, [33, 16] in the file"),
    "weight missing": (tensors(lambda held: held.pop(WEIGHT)), "parameters, the files hold"),
    "NaN": (tensors(spoil), f"{WEIGHT} holds numbers that are NaN or infinite"),
    "tokenizer of nothing": (text("tokenizer.json", "{}"), "no tokenizer that can be read"),
    "no end token": (entry("tokenizer_config.json", eos_token=None), "no end-of-text token"),
    "more words than rows": (
        lambda folder: train_word_tokenizer(["one two three four"], 4).save_pretrained(folder),
        "has token '<no>' at 15, its model embeds 15 tokens only",
    ),
    "template that reads files": (text("chat_template.jinja", "{% include '/etc/passwd' %}"), "cannot be rendered"),
    "template that escapes": (
        text("chat_template.jinja", "{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        "cannot be rendered (SecurityError",
    ),
    "template that calls": (
        text("chat_template.jinja", "{{ raise_exception.__globals__['os'].system('touch ran') }}"),
        "cannot be rendered (SecurityError",
    ),
    "template that loops long": (text("chat_template.jinja", "{% for i in range(10**12) %}{% endfor %}"), "OverflowError"),
    "template that swells": (text("chat_template.jinja", CONTENT + "{{ 'x' * 10000000 }}"), "its chat template makes"),
    "template of nonsense": (text("chat_template.jinja", "{% for %}"), "cannot be rendered (TemplateSyntaxError"),
}
# Found because the kernel ends the trial.
ENDED: dict[str, tuple[Poison, str]] = {
    "template without end": (text("chat_template.jinja", LOOP), "its chat template: it takes more time or memory than"),
    "template of one long sum": (text("chat_template.jinja", "{{ 7 ** (10 ** 9) }}"), "its chat template: it takes more time"),
    "template that doubles": (text("chat_template.jinja", CONTENT + DOUBLE), "chat template"),
    "layers without end": (entry("config.json", num_hidden_layers=10**9), "config"),
}
corpus = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _no_limit_stays() -> Iterator[None]:
    """A trial in this process would end it later."""
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return whole(tmp_path / "checkpoint")


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        act()
    return str(error.value)


def in_a_line(said: str, folder: Path, told: str) -> bool:
    """The reason and the folder in one line, and nothing of it has run."""
    return told in said and str(folder) in said and "\n" not in said and not (folder.parent / "ran").exists()


@corpus("name", STATIC)
def test_what_can_be_seen_is_refused_at_every_door(folder: Path, name: str) -> None:
    poison, told = STATIC[name]
    poison(folder)
    for door in (inspect_checkpoint, load_policy, load_tokenizer, Checkpoint):
        said = refusal(lambda door=door: door(folder))
        assert in_a_line(said, folder, told), said


def test_there_are_no_other_doors() -> None:
    """Whatever loads by `from_pretrained` is given a folder that was inspected right there, or in the trial's own process."""
    doors = {
        "apprentice/policy.py": "checkpoint_arguments",
        "apprentice/reward_model.py": "checkpoint_arguments",
        "apprentice/vector_folders.py": "checkpoint_arguments",
        "tasks/room.py": "checkpoint_arguments",
        "tasks/dry_run.py": "inspect_checkpoint",
        "apprentice/checkpoint_trial.py": "",
    }
    sources = {path: (ROOT / path).read_text() for path in py_files("apprentice", "tasks", "flows")}
    loading = {path for path, code in sources.items() if ".from_pretrained(" in code}
    assert loading == doors.keys() and all(doors[path] in sources[path] for path in loading)


@corpus("name", TRIED)
def test_what_has_to_be_tried_is_refused(folder: Path, name: str) -> None:
    poison, told = TRIED[name]
    poison(folder)
    inspect_checkpoint(folder)
    said = refusal(lambda: checkpoint_trial.trial(folder))
    assert in_a_line(said, folder, told), said


@pytest.mark.slow
@corpus("name", ENDED)
def test_what_would_not_end_is_ended(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison, told = ENDED[name]
    poison(folder)
    inspect_checkpoint(folder)
    said = refusal(lambda: try_out(folder))
    assert in_a_line(said, folder, told), said


@pytest.mark.slow
def test_the_first_of_several_that_is_refused_is_named(folder: Path, tmp_path: Path) -> None:
    other = whole(tmp_path / "other")
    try_out(folder, other)
    TRIED["NaN"][0](other)
    said = refusal(lambda: try_out(folder, other))
    assert in_a_line(said, other, TRIED["NaN"][1]), said


def test_pickles_and_code_beside_whole_safetensors_are_left_unread(folder: Path) -> None:
    bytes_ = pickle.dumps(Marker(folder.parent / "ran"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pkl"):
        (folder / name).write_bytes(bytes_)
    for name in ("modeling_own.py", "conftest.py", "sitecustomize.py", "torch.py"):
        (folder / name).write_text(f"open({str(folder.parent / 'ran')!r}, 'w').write('ran')")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w').write('ran')")
    inspect_checkpoint(folder)
    checkpoint_trial.trial(folder)
    Checkpoint(folder)
    assert load_policy(folder).config.vocab_size == len(load_tokenizer(folder)) == 15
    assert not (folder.parent / "ran").exists()
    pickle.loads(bytes_)  # it would have
    assert (folder.parent / "ran").exists()


def test_links_within_the_folder_and_into_the_caches_of_tools_are_taken(folder: Path, tmp_path: Path) -> None:
    stores = {"config.json": f"hub/blobs/{'a' * 40}", "tokenizer.json": f"cache/files/md5/ab/{'c' * 30}"}
    for name, place in stores.items():
        (tmp_path / place).parent.mkdir(parents=True)
        (folder / name).rename(tmp_path / place)
        (folder / name).symlink_to(tmp_path / place)
    (folder / "again.json").symlink_to(folder / "config.json")
    inspect_checkpoint(folder)
    assert load_tokenizer(folder).eos_token == "<eos>"


@pytest.mark.slow
def test_the_command_line_of_vectors_refuses_in_a_line(folder: Path, tmp_path: Path) -> None:
    other = whole(tmp_path / "other")
    for poison, told in (STATIC["own model code"], ENDED["template without end"]):
        poison(other)
        words = ["--plus", str(folder), "--minus", str(other), "--out", str(tmp_path / "out")]
        command = [sys.executable, "-m", "tasks.vector_arithmetic", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
        whole(other)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "pretrain"])
def test_the_stages_that_take_a_checkpoint_in_refuse_in_a_line(project: Project, folder: Path, stage: str) -> None:
    apply("smoke", project.root)
    project.without_git()
    project.set(pretrain__checkpoint=str(folder), runtime__outside_project=True)
    for poison, told in (STATIC["own tokenizer code"], TRIED["NaN"]):
        poison(folder)
        done = project.run("-m", f"tasks.{stage}")
        assert done.returncode == 2 and "StageError: pretrain.checkpoint is refused: " in done.stderr, done.stderr
        assert told in done.stderr and "Traceback" not in done.stderr
        assert not list(project.path("data").rglob("pinned.json")) and not (folder.parent / "ran").exists()
        whole(folder)


@pytest.mark.parametrize("revision", [None, "main", "../x", "a" * 39])
def test_a_checkpoint_of_the_hub_needs_its_commit(
    stage_of: Callable[..., Any], revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.intake import take_in
    from tasks.stage import StageError

    stage = stage_of("pretrain", **{"pretrain.checkpoint": "some/model", "pretrain.revision": revision})
    with pytest.raises(StageError, match=r"pretrain\.revision: expected the commit of 'some/model'"):
        take_in(stage)


def test_of_the_hub_neither_pickles_nor_code_are_fetched(
    stage_of: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from tasks import intake

    asked: dict[str, Any] = {}

    def fetch(name: str, **how: Any) -> str:
        asked.update(how, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(intake, "try_out", lambda *folders: None)
    stage = stage_of("pretrain", **{"pretrain.checkpoint": "some/model", "pretrain.revision": "a" * 40})
    assert intake.take_in(stage) == folder
    assert (asked["name"], asked["revision"]) == ("some/model", "a" * 40)
    wanted = {"model.safetensors", "config.json", "chat_template.jinja", "tokenizer.model", INDEX}
    left = {"pytorch_model.bin", "modeling_own.py", "training_args.bin", "model.pt", "model.gguf"}
    taken = {name for name in wanted | left if any(Path(name).match(pattern) for pattern in asked["allow_patterns"])}
    assert taken == wanted
    own_code("config.json", "AutoConfig")(folder)
    with pytest.raises(intake.StageError, match="`auto_map` asks for code"):
        intake.take_in(stage)
