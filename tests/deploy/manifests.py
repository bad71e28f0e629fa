"""What is in deploy/, read as its programs read it.

documents     the YAML documents of a file          rendered     what `kubectl kustomize` makes of an overlay
instructions  a Dockerfile's, with their stages      entrypoints  the command that each file starts training with
dashboard_module  what makes the Grafana dashboard
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
OVERLAYS = ("cpu", "gpu")


@functools.cache
def dashboard_module() -> ModuleType:
    """The module that makes the dashboard, which is in no package."""
    spec = importlib.util.spec_from_file_location("metafleet_dashboard", DEPLOY / "grafana" / "dashboard.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def one(path: Path) -> Any:
    (document,) = documents(path)
    return document


@functools.cache
def rendered(overlay: str) -> dict[str, Any]:
    """The objects of an overlay by kind."""
    kubectl = shutil.which("kubectl")
    assert kubectl, "ask for kubectl first"
    argv = (kubectl, "kustomize", str(KUBERAY / "overlays" / overlay))
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    objects = list(yaml.safe_load_all(done.stdout))
    assert len({item["kind"] for item in objects}) == len(objects)
    return {item["kind"]: item for item in objects}


def base() -> dict[str, Any]:
    """The objects of the base by kind, as they are written."""
    names = one(KUBERAY / "base/kustomization.yaml")["resources"]
    return {item["kind"]: item for name in names for item in documents(KUBERAY / "base" / name)}


def pods(job: Any) -> dict[str, Any]:
    """The pod templates of a RayJob by role."""
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {
        "submitter": job["spec"]["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": workers["template"],
    }


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """A Dockerfile's instructions, continued lines joined, without comments."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name.upper(), rest.strip()


def compose(*, gpus: bool = False, **environment: str) -> Any:
    """compose.yaml as its program reads it in an environment; what that must have and has not stays as it is written.

    Args:
        gpus: as on a machine with GPUs.
        environment: variables that are set.
    """
    text = (DEPLOY / "compose.yaml").read_text("utf-8")
    if gpus:
        text = re.sub(r"# (.+) # GPUs$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: environment.get(found[1], found[2]), text)
    return yaml.safe_load(text.replace("$$", "$"))


def after_dashes(command: list[str]) -> list[str]:
    """What `ray job submit … -- COMMAND` runs."""
    return command[command.index("--") + 1 :]


def entrypoints() -> dict[str, list[str]]:
    """Each file's command that trains, as words."""
    cmd = next(rest for name, rest in instructions(DEPLOY / "Dockerfile") if name == "CMD")
    (entry,) = (patch for patch in one(KUBERAY / "overlays/gpu/workers.yaml") if patch["path"] == "/spec/entrypoint")
    return {
        "Dockerfile": json.loads(cmd),
        "compose.yaml": after_dashes(compose()["services"]["train"]["command"]),
        "compose.yaml on GPUs": after_dashes(compose(gpus=True)["services"]["train"]["command"]),
        "kuberay/base": shlex.split(base()["RayJob"]["spec"]["entrypoint"]),
        "kuberay/overlays/gpu": shlex.split(entry["value"]),
    }
