"""Prefect's work pools: the commands at the head of prefect.yaml, word for word, and a run that a worker takes from its own."""

import json
import shlex
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from flows.server import Server, free_port, prefect_server
from tests.conftest import ROOT, Project
from tests.toy import ask, empty_prefect, make_toy, run, with_stores

pytestmark = pytest.mark.slow
POOLS = ("process", "kubernetes")
DEPLOYED = """
import asyncio, json
from prefect.client.orchestration import get_client

async def main():
    async with get_client() as client:
        found = [(await client.read_deployment_by_name(f"align/{name}")) for name in ("align", "align-kubernetes")]
        pools = [await client.read_work_pool(one.work_pool_name) for one in found]
    shown = [[one.entrypoint, one.pull_steps, one.job_variables, pool.type] for one, pool in zip(found, pools)]
    print(json.dumps([*shown, pools[1].base_job_template]))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(empty_prefect(), home)
    server = prefect_server(free_port(), PREFECT_HOME=str(home), PREFECT_UI_ENABLED="0")
    server.start()
    server.wait_until_it_answers()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return with_stores(make_toy(tmp_path_factory.mktemp("deployed") / "toy"))


def commands(kind: str) -> list[list[str]]:
    """Those of a kind of pool: arguments of `prefect`, the worker's left out."""
    lines = [line.strip("# ") for line in (ROOT / "prefect.yaml").read_text().splitlines() if line.startswith("#   prefect")]
    mine = [shlex.split(line)[1:] for line in lines if ("kubernetes" in line) == (kind == "kubernetes")]
    assert [words[-3] for words in mine if "start" in words] == ["start"]
    return [words for words in mine if "start" not in words]


def prefect(toy: Project, server: Server, *words: str) -> str:
    done = run(toy, "-m", "prefect", *words, PREFECT_API_URL=f"{server.address}/api", PREFECT_LOGGING_TO_API_ENABLED="0")
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def deployed(toy: Project, server: Server) -> list[Any]:
    """Both deployments as the server has them, and the template of the second's pool."""
    for kind in POOLS:
        for words in commands(kind):
            prefect(toy, server, *words)
    return ask(toy, f"import os; os.environ['PREFECT_API_URL'] = '{server.address}/api'\n{DEPLOYED}")


def test_both_deployments_stand_in_their_pools(toy: Project, deployed: list[Any]) -> None:
    process, kubernetes, template = deployed
    assert [one[0] for one in (process, kubernetes)] == ["flows/align.py:align"] * 2
    assert [one[3] for one in (process, kubernetes)] == ["process", "kubernetes"]
    assert str(toy.root) in json.dumps(process[1])
    assert json.dumps(kubernetes[1]).count("/workspace") == 1
    assert template == json.loads((ROOT / "kubernetes/pool.json").read_text())


def test_the_pools_template_takes_every_variable_of_the_deployment(deployed: list[Any]) -> None:
    _, (_, _, given, _), template = deployed
    variables = template["variables"]
    assert given.keys() <= variables["properties"].keys() and set(variables["required"]) <= given.keys()
    written = json.dumps(template["job_configuration"])
    assert all(f'"{{{{ {name} }}}}"' in written for name in variables["properties"]), "a variable that nothing reads"


def test_a_worker_runs_the_flow_from_its_pool(toy: Project, server: Server, deployed: list[Any]) -> None:
    prefect(toy, server, "deployment", "run", "align/align", "--param", 'only=["prepare"]')
    said = prefect(toy, server, "worker", "start", "--pool", "apprentice", "--run-once")
    assert "Running stage 'prepare'" in said and "Completed" in said, said
    assert toy.path("data/clean/answers.jsonl").exists() and toy.path("dvc.lock").exists()
