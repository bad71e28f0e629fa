"""The commands in deploy/, run as they stand but for paths, addresses and the length of the run."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, after_dashes, base, compose, entrypoints, one
from tests.system.conftest import free_port
from tests.system.driving import Command, Finished, entries_of, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

BIN = Path(sys.executable).parent
SHORT = ("--steps=2", "--evaluation.every=0", "--evaluation.episodes=4")


@dataclass(frozen=True)
class Deployed:
    """The head and one worker of compose.yaml on this machine."""

    command: Command
    dashboard: str
    shared: Path

    def submit(self, env: dict[str, Any], words: list[str]) -> Finished:
        """`ray job submit` of a command, as the service `train` and KubeRay's submitter do it."""
        train = compose()["services"]["train"]["command"]
        flags = [word for word in train[1:] if word not in after_dashes(train)]
        flags = [word if not word.startswith("--runtime-env-json") else f"--runtime-env-json={json.dumps(env)}"
                 for word in flags]  # fmt: skip
        return self.command.start(
            *(word.replace("http://head:8265", self.dashboard) for word in flags), *words, script=BIN / train[0]
        ).finish()


@pytest.fixture(scope="module")
def deployed(environment: dict[str, str]) -> Iterator[Deployed]:
    services = compose()["services"]
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    head, dashboard = free_port(), free_port()
    token = {**services["head"]["environment"], "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"

    def ray(words: list[str], **more: object) -> list[str]:
        words = [word.replace("head:6379", f"127.0.0.1:{head}").replace("=6379", f"={head}") for word in words[1:]]
        words = [word.replace("=0.0.0.0", "=127.0.0.1").replace("=8080", f"={free_port()}") for word in words]
        more |= {"dashboard-agent-listen-port": free_port(), "min-worker-port": 0, "max-worker-port": 0}
        return [*words, *(f"--{name.replace('_', '-')}={value}" for name, value in more.items())]

    with Command(folder, {**environment, **token, "PATH": path}) as command:
        first = ray(services["head"]["command"], temp_dir=folder, dashboard_port=dashboard,
                    ray_client_server_port=free_port())  # fmt: skip
        node = command.start(*first, script=BIN / "ray")
        node.until(lambda: "Ray runtime started" in node.out + node.err, "a head")

        def healthy() -> bool:
            probe = services["head"]["healthcheck"]["test"]
            return command.start(*probe[2:], "--address", f"127.0.0.1:{head}", script=BIN / probe[1]).finish().code == 0

        wait_for(healthy, "a healthy head")
        worker = command.start(*ray(services["worker"]["command"]), script=BIN / "ray")
        worker.until(lambda: "Ray runtime started" in worker.out + worker.err, "a worker")
        yield Deployed(command, f"http://127.0.0.1:{dashboard}", folder / "shared")
    shutil.rmtree(folder, ignore_errors=True)


def ready(words: list[str], run: Path) -> list[str]:
    """A training command for this machine, and short."""
    here = {"/shared/run": str(run), "/shared": str(run.parent), "0.0.0.0": "127.0.0.1", "9464": "0"}
    return [*(re.sub("/shared/run|/shared|0.0.0.0|9464", lambda found: here[found[0]], word) for word in words), *SHORT]


def test_compose_trains_on_its_cluster_with_tokens(deployed: Deployed) -> None:
    run = deployed.shared / "compose"
    flag = next(word for word in compose()["services"]["train"]["command"] if word.startswith("--runtime-env-json="))
    done = deployed.submit(json.loads(flag.partition("=")[2]), ready(entrypoints()["compose.yaml"], run))
    assert done.code == 0, done.out + done.err
    assert len(entries_of(run)) == 2
    assert f"with {compose()['services']['worker']['cpus']} workers" in done.out
    assert not list(deployed.shared.glob("*.json"))  # announced, and taken back at the end


def test_a_rayjob_goes_on_with_the_run_of_the_one_before(deployed: Deployed) -> None:
    run = deployed.shared / "rayjob"
    env = yaml.safe_load(base()["RayJob"]["spec"]["runtimeEnvYAML"])
    words = ready(entrypoints()["kuberay/base"], run)
    for _ in range(2):
        done = deployed.submit(env, words)
        assert done.code == 0, done.out + done.err
    assert len(entries_of(run)) == 2


def test_without_the_token_nobody_submits(deployed: Deployed) -> None:
    request = urllib.request.Request(f"{deployed.dashboard}/api/jobs/")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=10)


def test_the_image_trains_by_itself(tmp_path: Path, environment: dict[str, str]) -> None:
    with Command(tmp_path, environment) as command:
        words = ready(entrypoints()["Dockerfile"], tmp_path / "run")
        assert words[0] == "metafleet"
        done = command.run(*words[1:])
    assert done.code == 0, done.err
    assert len(entries_of(tmp_path / "run")) == 2


def test_the_launcher_takes_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.scripts.scripts import start

    config = prepare_config(one(DEPLOY / "ray-cluster.yaml"))
    validate_config(config)
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    for role in ("head", "worker"):
        (line,) = (line for line in config[f"{role}_start_ray_commands"] if "ray start" in line)
        words = line.partition("ray start ")[2].split()
        assert start.make_context("ray start", words).params["head"] == (role == "head")
