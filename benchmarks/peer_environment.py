"""The peers' own environments: TRL on top of the libraries of the Python that runs the benchmark, never among our dependencies.

A virtual environment under benchmarks/.peers that sees this Python's packages through a .pth file, so that both sides use
the same torch and transformers to the byte.
"""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig

from benchmarks.measure import ROOT, BenchmarkError

PPO = "1.12.0"  # the last release of TRL with PPO
CURRENT = "1.16.0"


def python_with_trl(version: str) -> str:
    """The interpreter of an environment with that release of TRL, built when it is not there.

    Raises BenchmarkError when pip cannot install it, or would change torch or transformers.
    """
    folder = ROOT / "benchmarks" / ".peers" / f"trl-{version}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"building {folder.relative_to(ROOT)}", flush=True)
        _call([sys.executable, "-m", "venv", "--clear", str(folder)])
        packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (packages / "benchmark.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pins = str(ROOT / "constraints.txt")
        _call([str(python), "-m", "pip", "install", "-qq", "-c", pins, *_pip_arguments(), f"trl=={version}"])
        for name in ("torch", "transformers"):
            ours, theirs = importlib.metadata.version(name), _version(str(python), name)
            if ours != theirs:
                raise BenchmarkError(f"{folder}: expected {name} {ours} as on our side, got {theirs}")
        (folder / "ready").touch()
    return str(python)


def _pip_arguments() -> list[str]:
    return os.environ.get("PIP_ARGS", "").split()


def _version(python: str, name: str) -> str:
    return _call([python, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]).strip()


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout
