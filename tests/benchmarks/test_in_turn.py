"""All families in turn, a process each."""

import sys
from collections.abc import Sequence

import pytest

from benchmarks import __main__ as program


def test_each_family_is_measured_by_a_process_of_its_own_until_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Sequence[str]] = []

    def call(command: Sequence[str]) -> int:
        ran.append(command[1:])
        return 3 if "dpo" in command else 0

    monkeypatch.setattr(program.subprocess, "call", call)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--runs", "2"])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 3
    assert ran == [["-m", "benchmarks", "--only", name, "--runs", "2"] for name in ("ppo", "sft", "dpo")]
