"""`make audit`: what is allowed, and that nothing passes unseen. The vulnerability service is never asked here."""

from importlib.metadata import distributions
from typing import Any

import pytest

import audit


def service(monkeypatch: pytest.MonkeyPatch, trouble: str = "", **vulns: list[dict[str, Any]]) -> None:
    """Let the service know every pinned package, these vulnerabilities, and nothing when there is trouble."""
    found = [{"name": name, "version": version, "vulns": vulns.get(name, [])} for name, version in audit.pinned().items()]
    monkeypatch.setattr(audit, "look_up", lambda: ([], trouble) if trouble else (found, ""))


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        ("MIT", True),
        ("MIT License", True),
        ("Apache-2.0 OR GPL-2.0-or-later", True),
        ("Apache-2.0 AND GPL-2.0-or-later", False),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
        ("MIT AND (GPL-3.0-only OR AGPL-3.0-only)", False),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception", True),
        ("GNU General Public License v2 (GPLv2)", False),
        ("Other/Proprietary License", False),
        ("", False),
    ],
)
def test_a_licence_is_allowed_when_allowed_ones_suffice(licence: str, allowed: bool) -> None:
    assert audit.is_allowed(licence) is allowed


def test_every_pinned_package_that_is_installed_has_an_allowed_licence() -> None:
    pins = audit.pinned()
    installed = {audit.plain(package.name): package.version.split("+")[0] for package in distributions()}
    assert audit.wrong_licences({name: version for name, version in pins.items() if installed.get(name) == version})[0] == []


def test_only_packages_whose_metadata_does_not_tell_are_allowed_by_name() -> None:
    names = [name for name in audit.READ if "*" not in name]
    assert [name for name in names if name not in audit.pinned()] == []
    packages = [package for package in distributions() if audit.plain(package.name) in names]
    assert [package.name for package in packages if audit.is_allowed(audit.stated(package))] == []


def test_nothing_wrong_is_zero(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    service(monkeypatch)
    monkeypatch.setattr(audit, "wrong_licences", lambda pins: ([], []))
    assert audit.main() == 0
    assert "0 findings" in capsys.readouterr().out


def test_a_package_that_is_wrong_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service(monkeypatch, requests=[{"id": "PYSEC-1", "fix_versions": ["9.1"]}], urllib3=[{"id": "PYSEC-2", "fix_versions": []}])
    monkeypatch.setattr(audit, "ALLOWED", {name: others for name, others in audit.ALLOWED.items() if name != "0BSD"})
    pins = audit.pinned()
    assert audit.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"requests {pins['requests']}: PYSEC-1, fixed in 9.1: raise its pin") for line in lines)
    assert any(line.startswith(f"urllib3 {pins['urllib3']}: PYSEC-2, not fixed yet") for line in lines)
    assert any(line.startswith(f"numpy {pins['numpy']}: its licence is 'BSD-3-Clause AND 0BSD") for line in lines)


def test_a_service_that_does_not_answer_is_no_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    service(monkeypatch, trouble="no route")
    monkeypatch.setattr(audit, "wrong_licences", lambda pins: ([], []))
    assert audit.main() == 3
    said = capsys.readouterr().out
    assert "could not be reached" in said and "no route" in said


def test_a_package_that_the_service_does_not_know_is_no_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [{"name": name, "version": version, "vulns": []} for name, version in audit.pinned().items()]
    found[0] = {"name": found[0]["name"], "skip_reason": "not found"}
    monkeypatch.setattr(audit, "look_up", lambda: (found, ""))
    monkeypatch.setattr(audit, "wrong_licences", lambda pins: ([], []))
    assert audit.main() == 3
    assert f"does not know {found[0]['name']}." in capsys.readouterr().out
