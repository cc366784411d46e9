"""Task arithmetic on folders: the numbers of the arithmetic in memory, whole checkpoints, and folders that are refused."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from apprentice import vector_folders
from apprentice.policy import PINNED, file_hashes, load_policy
from apprentice.tokens import train_word_tokenizer
from apprentice.vector_folders import Checkpoint, add_to_folder, check_alike, folder_difference
from apprentice.vectors import add, difference, facts, random_vector
from tests.apprentice.toys import tiny_llama

ROLES = ("plus", "minus", "target")
Make = Callable[..., dict[str, Path]]


def save(folder: Path, model: LlamaForCausalLM, words: str = "one two", **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    train_word_tokenizer([words], 2).save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Make:
    """Three checkpoints of one architecture; `dtype` and the arguments of save_pretrained may be given."""

    def make(dtype: torch.dtype = torch.float32, **how: Any) -> dict[str, Path]:
        return {role: save(tmp_path / role, tiny_llama(seed).to(dtype), **how) for seed, role in enumerate(ROLES)}

    return make


def load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def write(paths: dict[str, Path], out: Path, coefficient: float = 1.0, **vector: Any) -> float | None:
    plus, minus, target = (Checkpoint(paths[role]) for role in ROLES)
    return add_to_folder(target, folder_difference(plus, minus, **vector), coefficient, out, lambda share: f"share {share}")


def equal(a: LlamaForCausalLM, b: LlamaForCausalLM) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and x.dtype == y.dtype and torch.equal(x, y) for (name, x), (other, y) in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [None, 3])
def test_both_paths_agree_bit_for_bit(folders: Make, tmp_path: Path, dtype: torch.dtype, seed: int | None) -> None:
    paths = folders(dtype)
    models = {role: load(path) for role, path in paths.items()}
    vector = difference(models["plus"], models["minus"], ["*norm*"])
    vector = vector if seed is None else random_vector(vector, seed)
    wanted = add(copy.deepcopy(models["target"]), vector, -0.7)
    write(paths, tmp_path / "out", -0.7, exclude=["*norm*"], random_seed=seed)
    got = load(tmp_path / "out")
    assert got.dtype == dtype and equal(got, wanted) and not equal(got, models["target"])
    assert got.lm_head.weight is got.model.embed_tokens.weight
    folder = folder_difference(Checkpoint(paths["plus"]), Checkpoint(paths["minus"]), ["*norm*"], seed)
    found, same = folder.facts("chain"), facts(vector, models["minus"], "chain")
    assert found.norm == pytest.approx(same.norm) and found.vanishing == same.vanishing
    assert found.groups.keys() == same.groups.keys() and found.lineage == "chain"


def test_shards_are_read_and_written(folders: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = folders(max_shard_size="8KB")
    assert len(list(paths["target"].glob("*.safetensors"))) > 2
    write(paths, tmp_path / "whole")
    assert not (tmp_path / "whole" / vector_folders.INDEX).exists()  # the target's index does not travel
    monkeypatch.setattr(vector_folders, "SHARD_BYTES", 9000)
    write(paths, tmp_path / "parts")
    shards = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    index = json.loads((tmp_path / "parts" / vector_folders.INDEX).read_text())
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(shards)
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "parts" / shard).values()) for shard in shards]
    assert max(sizes) <= 9000 and all(a + b > 9000 for a, b in itertools.pairwise(sizes))
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in load(tmp_path / "parts").parameters())
    assert equal(load(tmp_path / "parts"), load(tmp_path / "whole"))


def test_the_new_folder_is_a_whole_checkpoint(folders: Make, tmp_path: Path) -> None:
    paths = folders()
    (paths["target"] / "LICENSE").write_text("free")
    for name in ("training_args.bin", "pytorch_model.bin", "modeling_own.py", "optimizer.pt", "trainer_state.json"):
        (paths["target"] / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    share = write(paths, tmp_path / "deep" / "out")
    out, target = tmp_path / "deep" / "out", paths["target"]
    kept = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
    }
    assert {path.name for path in out.iterdir()} == kept | {"model.safetensors", "README.md"}
    assert all((out / name).read_bytes() == (target / name).read_bytes() for name in kept)
    assert share is not None and (out / "README.md").read_text() == f"share {share}"
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(target).get_vocab()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_share_lost_to_rounding_by_hand(folders: Make, tmp_path: Path) -> None:
    # near 1 the grid of bfloat16 is 2^-7: of the steps 2^-9, 2^-6, 0, 0, ... one of two is lost
    paths = folders(torch.bfloat16)
    for role, steps in (("plus", [2.0**-9, 2.0**-6]), ("minus", [0.0, 0.0]), ("target", [1.0, 1.0])):
        file = paths[role] / "model.safetensors"
        tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        tensors["model.norm.weight"][:2] = torch.tensor(steps)
        save_file(tensors, file, metadata={"format": "pt"})
    assert write(paths, tmp_path / "out") == 0.5
    assert load(tmp_path / "out").model.norm.weight[:3].tolist() == [1.0, 1.0 + 2.0**-6, 0.0]
    assert write(paths, tmp_path / "nothing", 0.0) is None


def test_V3_a_tied_tensor_stored_twice_takes_the_vector_once(folders: Make, tmp_path: Path) -> None:
    paths = folders()
    write(paths, tmp_path / "once", random_seed=1)
    for role in ("plus", "target"):
        file = paths[role] / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"})
    write(paths, tmp_path / "twice", random_seed=1)
    assert equal(load(tmp_path / "twice"), load(tmp_path / "once"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1  # no longer tied
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight is \[4, 16\] in target, absent in plus"):
        write(paths, tmp_path / "untied")


def test_V3_whole_numbers_stay_as_the_target_has_them(folders: Make, tmp_path: Path) -> None:
    paths = folders()
    for value, role in enumerate(ROLES):
        file = paths[role] / "model.safetensors"
        save_file({**load_file(file), "model.steps": torch.tensor([value])}, file, metadata={"format": "pt"})
    write(paths, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["model.steps"].tolist() == [2]


def test_V4_other_tensors_heads_or_words_are_refused(folders: Make, tmp_path: Path) -> None:
    paths = folders()
    for name, model, words, told in (
        ("deeper", tiny_llama(4, num_hidden_layers=3), "one two", r"9 tensors differ: model\.layers\.2\."),
        ("wider", tiny_llama(4, vocab=5), "one two", r"model\.embed_tokens\.weight is \[5, 16\] in target, \[4, 16\] in plus"),
        ("heads", tiny_llama(4, num_attention_heads=4, num_key_value_heads=4, head_dim=4), "one two", "num_attention_heads"),
        ("words", tiny_llama(4), "one three", "tokenizers of target and plus differ in 2 tokens: 'three'; 'two'"),
    ):
        with pytest.raises(ValueError, match=told):
            write({**paths, "target": save(tmp_path / name, model, words)}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"q_proj\.weight is absent in plus"):
        part = tmp_path / "words" / "model.safetensors"
        save_file({k: v for k, v in load_file(part).items() if "q_proj" not in k}, part, metadata={"format": "pt"})
        check_alike({"plus": Checkpoint(tmp_path / "words"), "minus": Checkpoint(paths["minus"])}, ())
    assert not (tmp_path / "out").exists()


def test_an_error_on_the_way_leaves_no_folder(folders: Make, tmp_path: Path) -> None:
    paths = folders(torch.float16)
    with pytest.raises(ValueError, match="not finite"):
        write(paths, tmp_path / "out", 1e6)
    assert {path.name for path in tmp_path.iterdir()} == set(ROLES)
    (tmp_path / ".out.partial").mkdir()  # what a killed run leaves
    (tmp_path / ".out.partial" / "junk.json").write_text("{}")
    write(paths, tmp_path / "out")
    assert not (tmp_path / "out" / "junk.json").exists() and not (tmp_path / ".out.partial").exists()
    with pytest.raises(ValueError, match=r"out exists"):
        write(paths, tmp_path / "out")


def test_a_pinned_checkpoint_is_read_where_it_stands(folders: Make, tmp_path: Path) -> None:
    paths = folders()
    write(paths, tmp_path / "plain")
    origin = paths["target"]
    pinned = tmp_path / "base"
    pinned.mkdir()

    def pin(checkpoint: str) -> None:
        content = {"checkpoint": checkpoint, "revision": None, "files": file_hashes(origin)}
        (pinned / PINNED).write_text(json.dumps(content))

    pin(str(origin))
    write({**paths, "target": pinned}, tmp_path / "out")
    assert equal(load(tmp_path / "out"), load(tmp_path / "plain")) and equal(load_policy(pinned), load(origin))
    with (origin / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="has changed since it was pinned"):
        Checkpoint(pinned)
    pin("some/model")
    with pytest.raises(ValueError, match=r"pins some/model, which is no local folder"):
        Checkpoint(pinned)


def test_a_folder_that_is_no_safetensors_checkpoint_is_refused(folders: Make, tmp_path: Path) -> None:
    folder = folders()["plus"]
    file, index = folder / "model.safetensors", folder / vector_folders.INDEX
    whole = file.read_bytes()

    def refused(told: str) -> None:
        with pytest.raises(ValueError, match=told) as error:
            Checkpoint(folder)
        assert "\n" not in str(error.value)

    file.write_bytes(whole[:1000])
    refused("no safetensors file that can be read")
    file.rename(folder / "other.safetensors")
    refused("neither model.safetensors nor .*; convert it")
    (folder / "adapter_config.json").write_text("{}")
    refused("it is an adapter")
    (folder / "adapter_config.json").unlink()
    (folder / "other.safetensors").write_bytes(whole)
    index.write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    refused(r"plus/gone\.safetensors: named in .* but missing")
    index.write_text('{"weight_map": {"model.norm.bias": "other.safetensors"}}')
    refused(r"says that it holds model\.norm\.bias, and it does not")
    index.write_text("[]")
    refused("not a safetensors index")
    index.unlink()
    file.write_bytes(whole)
    (folder / "config.json").write_text('{"model_type": "no such"}')
    refused("no config.json that can be read")
    with pytest.raises(ValueError, match="no such folder"):
        Checkpoint(tmp_path / "nowhere")


def test_a_folder_without_a_tokenizer_is_refused(folders: Make, tmp_path: Path) -> None:
    paths = folders()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (paths["plus"] / name).unlink()
    with pytest.raises(ValueError, match=r"plus"):
        write(paths, tmp_path / "out")
