"""Presets: they fit params.yaml, keep its comments, and never lose an edit."""

from pathlib import Path

import pytest
import yaml

from apprentice.config import ParamsError
from tasks.preset import apply, merge
from tasks.stage import ROOT, read_params


def project_with(preset: str, tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.yaml").write_text(preset)
    return tmp_path


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "presets").glob("*.yaml")])
def test_every_shipped_preset_fits(name: str, tmp_path: Path) -> None:
    root = project_with((ROOT / "presets" / f"{name}.yaml").read_text(), tmp_path)
    assert apply("mine", root)


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
        merge({"srppo": {"kl_coef": 1.0}}, {"srppo": {"kl_coeff": 2.0}})


def test_a_bad_value_leaves_params_as_they_were(tmp_path: Path) -> None:
    root = project_with("srppo: {kl_coef: -1.0}\n", tmp_path)
    with pytest.raises(ParamsError, match=r"srppo\.kl_coef"):
        apply("mine", root)
    assert (root / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()
