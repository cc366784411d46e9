"""LoRA through the stages: what stands on what, what is refused, the room it takes, and the main line with it in small."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from apprentice.compute import CPU
from apprentice.footprint import shape_of
from apprentice.lora import ADAPTER, Role, adapter_shape, read_origin
from apprentice.policy import PINNED, file_hashes
from apprentice.tilt import Tilt, write_tilt
from tasks import evaluating, roles
from tasks.checkpoints import lineage
from tasks.evaluating import measured
from tasks.roles import preflight, roles_of, trunk_of
from tasks.stage import Stage, StageError
from tests.apprentice.test_lora import CONFIG, logits, stirred
from tests.apprentice.toys import tiny_llama
from tests.main_line import run_here
from tests.tables import write_model

StageOf = Callable[..., Stage]
RANK_4 = {"lora.rank": 4, "lora.alpha": 8.0, "compute.device": "cpu"}
SMALL = {
    "ingest.world.demonstrations": 24,
    "ingest.world.validation": 6,
    "ingest.world.prompts": 24,
    "ingest.world.evaluation": 1,
    "ingest.world.suboptimal": 0,
    "ingest.world.preferences": 0,
    "pretrain.hidden_size": 32,
    "pretrain.intermediate_size": 64,
    "pretrain.layers": 1,
    "pretrain.heads": 2,
    "pretrain.steps": 30,
    "pretrain.warmup_steps": 2,
    "sft.epochs": 1,
    "sft.gate_prompts": 2,
    "sft.gate_samples": 1,
    "srppo.iterations": 2,
    "srppo.batch_size": 8,
    "srppo.minibatch_size": 4,
    "srppo.max_new_tokens": 24,
    "srppo.kl_stop": None,
    "sft.learning_rate": 5e-3,
    "srppo.learning_rate": 2e-3,
    "pairs.prompts": 8,
    "pairs.candidates": 6,
    "pairs.accepted": 4,
    "pairs.max_new_tokens": 24,
    "rso.epochs": 1,
    "rso.batch_size": 8,
    "judge.epochs": 1,
    "bt_reward.epochs": 1,
    "bt_reward.samples": 1,
    "evaluate.samples": 1,
    "evaluate.temperatures": [1.0],
    "evaluate.max_new_tokens": 8,
}


@pytest.fixture
def stage(stage_of: StageOf) -> Stage:
    """A stage beside a base and an SFT model that is an adapter on it."""
    made = stage_of("srppo", **RANK_4)
    write_model(made.data, "base", tiny_llama(0, vocab=12))
    model, _ = roles_of(made, "base", [], CPU)
    write_model(made.data, "sft", stirred(model))
    return made


def test_models_of_one_trunk_are_roles_on_it(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    policy, frozen = roles_of(stage, "sft", ["sft", "base"], CPU)
    assert trunk_of(stage, "sft") == trunk_of(stage, "base") == "base"
    assert list(frozen) == ["sft", "base"] and {role.trunk for role in frozen.values()} == {policy.trunk}
    for name, role in {**frozen, "sft": policy}.items():
        merged = AutoModelForCausalLM.from_pretrained(stage.data / "models" / name).eval()
        torch.testing.assert_close(logits(role), logits(merged), atol=1e-5, rtol=0)
    assert "LoRA of rank 4 on base\n" in capsys.readouterr().out


def test_an_evaluation_has_its_models_on_one_trunk_and_a_tilt_whole(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    models = stage.data / "models"
    write_tilt(models / "tilt", models / "sft", models / "base", 1.0, {})
    found = measured(stage, ["tilt", "sft", "base"], CPU)
    assert list(found) == ["tilt", "sft", "base"] and isinstance(found["tilt"].model, Tilt)
    assert found["sft"].model.trunk is found["base"].model.trunk
    merged = AutoModelForCausalLM.from_pretrained(models / "sft").eval()
    torch.testing.assert_close(logits(found["sft"].model), logits(merged), atol=1e-5, rtol=0)
    asked: list[Any] = []
    monkeypatch.setattr(roles.room, "check_shapes", lambda *shapes: asked.append(shapes[2:]))
    for name in ("sft", "tilt"):
        evaluating._preflight(stage, name, CPU)
    shape, adapter = shape_of(tiny_llama(0, vocab=12).config), adapter_shape(tiny_llama(0, vocab=12).config, CONFIG)
    assert asked == [([], [shape, adapter], True), ([], [shape, adapter, shape, shape], True)]


def test_a_model_that_is_no_adapter_is_a_trunk_of_its_own(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(stage.data, "tuned", tiny_llama(5, vocab=12))
    policy, frozen = roles_of(stage, "sft", ["tuned", "base"], CPU)
    assert frozen["tuned"].trunk is not policy.trunk is frozen["base"].trunk
    assert torch.equal(logits(frozen["tuned"]), logits(tiny_llama(5, vocab=12)))
    assert "LoRA of rank 4 on base, tuned\n" in capsys.readouterr().out


def test_without_lora_the_models_are_whole(stage: Stage, stage_of: StageOf) -> None:
    whole = stage_of("srppo", **{"compute.device": "cpu"})
    policy, frozen = roles_of(whole, "sft", ["base"], CPU)
    assert not isinstance(policy, Role) and not isinstance(frozen["base"], Role)
    assert all(p.requires_grad for p in policy.parameters()) and not any(p.requires_grad for p in frozen["base"].parameters())


@pytest.mark.parametrize(
    ("again", "said"), [(True, "is another; run the stage that made 'sft' again"), (False, "is not there")]
)
def test_an_adapter_whose_trunk_is_not_the_one_it_was_trained_on_is_refused(stage: Stage, again: bool, said: str) -> None:
    (stage.data / "models" / "base").rename(stage.data / "old")
    if again:
        write_model(stage.data, "base", tiny_llama(3, vocab=12))
    with pytest.raises(StageError, match=f"it stands on the model 'base' with the hash [0-9a-f]+, and .*models/base {said}"):
        roles_of(stage, "sft", ["base"], CPU)


def test_an_adapter_of_another_rank_is_refused_in_a_line(stage: Stage, stage_of: StageOf) -> None:
    other = stage_of("srppo", **{**RANK_4, "lora.rank": 8})
    with pytest.raises(
        StageError, match=r"rank and alpha \(4, 8.0\), and params.yaml says lora.rank and lora.alpha \(8, 8.0\)"
    ):
        roles_of(other, "sft", ["base"], CPU)


def test_a_pinned_checkpoint_is_a_trunk_by_its_pin(stage_of: StageOf, tmp_path: Path) -> None:
    made, place = stage_of("sft", **RANK_4), tmp_path / "real"
    tiny_llama(0, vocab=12).save_pretrained(place)
    folder = made.data / "models" / "base"
    folder.mkdir(parents=True)
    pin = {"checkpoint": str(place), "revision": None, "files": file_hashes(place)}
    (folder / PINNED).write_text(json.dumps(pin))
    write_model(made.data, "sft", stirred(roles_of(made, "base", [], CPU)[0]))
    policy, _ = roles_of(made, "sft", [], CPU)
    assert read_origin(made.data / "models" / "sft") == {"trunk": "base", "hash": lineage(folder), "path": "data/models/base"}
    assert not torch.equal(logits(policy), logits(tiny_llama(0, vocab=12)))


def test_the_room_is_that_of_one_trunk_and_adapters(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(roles.room, "check_shapes", lambda *shapes: asked.append(shapes[2:]))
    preflight(stage, CPU, ["sft", "sft"], ["sft", "base"], samples=True)
    config = tiny_llama(0, vocab=12).config
    adapter = adapter_shape(config, CONFIG)
    assert asked == [([adapter, adapter], [shape_of(config), adapter], True)]


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_main_line_runs_with_adapters_and_goes_on_from_a_snapshot_with_the_same_bytes(stage_of: StageOf) -> None:
    settings = {**SMALL, **RANK_4, "runtime.checkpoint_steps": 1}
    for name in ("ingest", "tokenizer", "pretrain", "sft", "srppo"):
        run_here(stage_of(name, **settings))
    models = stage_of("sft", **settings).data / "models"
    undisturbed = bytes_under(models / "srppo")
    (models / "srppo").rename(models / "first")
    stopped = stage_of("srppo", **settings)
    stopped.stop_signal = 15
    with pytest.raises(SystemExit):
        run_here(stopped)
    assert not (models / "srppo").exists()
    run_here(stage_of("srppo", **settings))
    assert bytes_under(models / "srppo") == undisturbed and f"{ADAPTER}/trunk.json" in undisturbed
    for name in ("pairs", "rso", "bt_reward"):
        run_here(stage_of(name, **settings))
    evaluation = stage_of("evaluate", **settings)
    evaluation.item, evaluation.reports = "rso", evaluation.data / "reports" / "evaluate" / "rso"
    run_here(evaluation)
    figures = json.loads((evaluation.reports / "metrics.json").read_text())
    assert figures["in_domain/kl_to_sft"] != 0 and figures["validation/held_out_loss"] > 0
    base = AutoModelForCausalLM.from_pretrained(models / "base").state_dict()
    for name in ("sft", "srppo", "rso"):
        merged = AutoModelForCausalLM.from_pretrained(models / name).state_dict()
        moved = {key for key in base if not torch.equal(base[key], merged[key])}
        assert merged.keys() == base.keys() and moved and all("proj" in key for key in moved)
        assert '\n    "rank": 4,\n' in (models / name / "README.md").read_text()
