"""Presets: they fit params.yaml, keep its comments, and never lose an edit."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from apprentice.config import ParamsError, parse
from tasks.preset import apply, changes_between, in_force, merge, read_preset
from tasks.stage import ROOT, read_params

PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))

MERGED = """\
seed: 0

# shared
ppo: &ppo                     # merged below
  kl: 0.5                     # lower moves further
  clip: 0.2
  deep: {a: 1, b: {c: 2, d: 3}}

# the paper's
srppo:                        # its own
  <<: *ppo
  span: sum                   # sum | mean

bare:
  <<: *ppo

flow: {<<: *ppo, span: mean}

# the end
models:                       # which
- one                         # the first
- two

fields: {}                    # names
first: &first {x: 1, y: [2]}
again: *first                 # the same
"""

DEEP = {"a": 1, "b": {"c": 2, "d": 3}}


def merged(preset: str) -> tuple[str, dict[str, Any]]:
    text = merge(MERGED, yaml.safe_load(preset))
    return text, yaml.safe_load(text)


def test_an_inherited_entry_becomes_its_sections_own_and_nothing_else_moves() -> None:
    text, params = merged("{srppo: {kl: 0.1}, bare: {clip: 0.3}, flow: {kl: 0.7}}")
    assert params["srppo"] == {"kl": 0.1, "clip": 0.2, "deep": DEEP, "span": "sum"}
    assert params["ppo"]["kl"] == 0.5 and params["ppo"]["clip"] == params["srppo"]["clip"] == 0.2
    assert params["bare"]["clip"] == 0.3 and params["bare"]["kl"] == 0.5
    assert params["flow"]["kl"] == 0.7 and params["flow"]["span"] == "mean"
    added = text.splitlines()
    assert added[added.index("  span: sum                   # sum | mean") + 1] == "  kl: 0.1"
    assert added[added.index("bare:") + 1 : added.index("bare:") + 3] == ["  <<: *ppo", "  clip: 0.3"]
    for line in ("  kl: 0.1", "  clip: 0.3"):
        added.remove(line)
    assert "\n".join(added).replace("{kl: 0.7, <<", "{<<") + "\n" == MERGED


def test_a_shared_value_changes_wherever_it_is_merged_and_every_change_is_shown() -> None:
    text, params = merged("ppo: {kl: 0.25}")
    assert {name: params[name]["kl"] for name in ("ppo", "srppo", "bare", "flow")} == dict.fromkeys(
        ("ppo", "srppo", "bare", "flow"), 0.25
    )
    assert "  kl: 0.25                    # lower moves further\n" in text, "the comment keeps its column"
    shown = changes_between(yaml.safe_load(MERGED), params)
    assert shown == [f"{name}.kl: 0.5 -> 0.25" for name in ("ppo", "srppo", "bare", "flow")]


@pytest.mark.parametrize("order", ["{srppo: {kl: 0.5}, ppo: {kl: 0.1}}", "{ppo: {kl: 0.1}, srppo: {kl: 0.5}}"])
def test_a_preset_that_names_both_gets_both_in_either_order(order: str) -> None:
    _text, params = merged(order)
    assert (params["ppo"]["kl"], params["srppo"]["kl"], params["bare"]["kl"]) == (0.1, 0.5, 0.1)


def test_part_of_an_inherited_mapping_is_copied_with_the_rest_of_it() -> None:
    _text, params = merged("srppo: {deep: {b: {c: 5}}}")
    assert params["srppo"]["deep"] == {"a": 1, "b": {"c": 5, "d": 3}}
    assert params["ppo"]["deep"] == params["bare"]["deep"] == DEEP


def test_lists_and_empty_mappings_are_replaced_whole() -> None:
    text, params = merged("{models: [three, four], fields: {prompt: question}}")
    assert params["models"] == ["three", "four"] and params["fields"] == {"prompt": "question"}
    assert "models: [three, four]                       # which\n\nfields: {prompt: question}    # names\n" in text
    assert "# the end\n" in text


def test_an_entry_that_names_another_one_gets_a_value_of_its_own() -> None:
    text, params = merged("again: {x: 3}")
    assert params["first"] == {"x": 1, "y": [2]} and params["again"] == {"x": 3, "y": [2]}
    assert text == MERGED.replace("again: *first        ", "again: {x: 3, y: [2]}")


def test_nothing_to_change_leaves_every_byte() -> None:
    assert merged("{srppo: {kl: 0.5}, models: [one, two]}")[0] == MERGED


def project_with(preset: str, tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.yaml").write_text(preset)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "laptop"])
def test_every_shipped_preset_fits_and_laptop_brings_the_defaults_back(name: str) -> None:
    text = (ROOT / "params.yaml").read_text()
    defaults, changed = yaml.safe_load(text), merge(text, read_preset(name)[0])
    assert parse(yaml.safe_load(changed)) != parse(defaults)
    back = yaml.safe_load(merge(changed, read_preset("laptop")[0]))
    assert changes_between(defaults, back) == [], "name the entry in presets/laptop.yaml, with its value in params.yaml"


def test_the_defaults_are_the_preset_laptop(tmp_path: Path) -> None:
    root = project_with((ROOT / "presets" / "laptop.yaml").read_text(), tmp_path)
    assert apply("mine", root) == []
    assert (root / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_what_the_dry_run_alone_reads_is_not_merged(tmp_path: Path) -> None:
    root = project_with("dry_run: {rows: 3}\nseed: 7\n", tmp_path)
    assert read_preset("mine", root) == ({"seed": 7}, {"rows": 3})
    assert in_force("mine", root).seed == 7 and yaml.safe_load((root / "params.yaml").read_text())["seed"] == 0
    assert apply("mine", root) == ["seed: 0 -> 7"]


def test_values_change_and_comments_stay(tmp_path: Path) -> None:
    root = project_with("srppo: {kl_coef: 0.25}\n", tmp_path)
    assert apply("mine", root) == ["srppo.kl_coef: 0.5 -> 0.25"]
    before, after = (ROOT / "params.yaml").read_text(), (root / "params.yaml").read_text()
    assert yaml.safe_load(after)["srppo"]["kl_coef"] == 0.25
    comments = [line.split("#", 1)[1] for line in before.splitlines() if "#" in line]
    assert [line.split("#", 1)[1] for line in after.splitlines() if "#" in line] == comments
    assert read_params(root / "params.yaml").srppo.kl_coef == 0.25


def test_an_entry_that_params_lacks_is_named() -> None:
    with pytest.raises(ParamsError, match=r"srppo\.kl_coeff"):
        merge("srppo: {kl_coef: 1.0}", {"srppo": {"kl_coeff": 2.0}})


def test_a_bad_value_leaves_params_as_they_were(tmp_path: Path) -> None:
    root = project_with("srppo: {kl_coef: -1.0}\n", tmp_path)
    with pytest.raises(ParamsError, match=r"srppo\.kl_coef"):
        apply("mine", root)
    assert (root / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()
